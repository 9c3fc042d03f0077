"""Text <-> token ids, for the three kinds of Llama tokenizer, behind one small interface.

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(" a summary") + [tokenizer.eos_id]
    text = tokenizer.decode(ids)

Llama 3 is byte-level BPE run by tiktoken; Llama 2, TinyLlama and our tiny model are sentencepiece models; SmolLM2 and
other byte-level BPE is run by Hugging Face's own library (tokenizer_json.py). `encode` never adds a special
token and never produces one: "</s>" in a Reddit post is four ordinary characters. Left out: chat templates, training a
tokenizer, offsets.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import tiktoken

from nanorlhf.data import added_tokens, tokenizer_json
from nanorlhf.data.added_tokens import Added
from nanorlhf.errors import UserError

FILES = (  # what `save` copies, where it exists
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "original/tokenizer.model",
)
UNKNOWN = "\ufffd".encode()  # how an id without a token is shown


class Tokenizer:
    """A vocabulary with its special ids; `load_tokenizer` makes one.

    `bos_id`, `eos_id`, `pad_id` are ids (PAD is never EOS: N+ trap T1), `vocab_size` is the largest id plus one.

    A tokenizer with a *dummy prefix* (Llama 2) puts one space in front of a text that does not begin with one, and
    `decode` takes one leading space away, as transformers' LlamaTokenizer(legacy=False) does. A response, which begins
    with its own space, is therefore encoded as the continuation it is, and ids can be joined:
    decode(encode(query) + encode(response)) == query + response. What is lost is the leading space of a response
    decoded alone. Tokenizers without a dummy prefix (Llama 3, tiny) lose nothing.
    """

    def __init__(
        self,
        *,
        encode: Callable[[str], list[int]],
        tokens: list[bytes | None],
        bos_id: int,
        eos_id: int,
        pad_id: int,
        dummy_prefix: bool,
        files: dict[str, bytes],
        encode_batch: Callable[[Sequence[str]], list[list[int]]] | None = None,
        prefix_inside: bool = False,
    ):
        if pad_id == eos_id:
            raise UserError(
                f"tokenizer: pad_id and eos_id are both {eos_id}, expected two different ids: masks that drop PAD "
                "would drop EOS and the model would never learn to stop; use a reserved or <unk> token as PAD"
            )
        if holes := [i for i, token in enumerate(tokens) if token is None]:
            raise UserError(
                f"tokenizer: {len(holes)} of its {len(tokens)} ids have no token ({', '.join(map(str, holes[:8]))}), "
                "expected one for each: a policy samples from all of them; use the tokenizer files that came with the "
                "model, or give them names in added_tokens"
            )
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.vocab_size = len(tokens)
        self._encode = encode
        self._encode_batch = encode_batch or (lambda texts: [encode(text) for text in texts])
        self._tokens = tokens  # bytes of each id; empty for special ids
        self._dummy_prefix, self._prefix_inside = dummy_prefix, prefix_inside  # inside: `encode` puts it itself
        self._files = files  # kept in memory: the source folder may be gone when the run ends

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special id. Half a surrogate pair (JSON allows it) becomes U+FFFD."""
        return self._encode(self._prepared(text)) if text else []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """[encode(text) for text in texts], in one call of the library where it has one."""
        return self._encode_batch([self._prepared(text) for text in texts])

    def _prepared(self, text: str) -> str:
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return with_prefix(text) if self._dummy_prefix and text and not self._prefix_inside else text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special ids are skipped; bytes that are no UTF-8 and ids without a token become U+FFFD."""
        n = self.vocab_size
        text = b"".join(self._tokens[i] if 0 <= i < n else UNKNOWN for i in map(int, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._dummy_prefix else text

    def is_special(self, i: int) -> bool:
        """Whether an id has a token that no text is encoded to: EOS, the marks of a chat."""
        return 0 <= i < self.vocab_size and self._tokens[i] == b""

    @property
    def fingerprint(self) -> str:
        """A name for what `encode` does: two tokenizers with the same files have the same."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the original tokenizer files into `folder`, byte for byte."""
        for name, content in self._files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def with_prefix(text: str) -> str:
    """A text with the dummy prefix, where it does not begin with a space."""
    return text if text.startswith((" ", "▁")) else " " + text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder, from `tokenizer.model` (sentencepiece or tiktoken: the content
    decides, not the name), `tokenizer.json` (byte-level BPE) or `original/tokenizer.model`, in this order; but what is
    tiktoken's after a tokenizer.json.

    Raises UserError when none is there or when the one that is there is damaged or not a Llama's.
    """
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    added = added_tokens.read(folder, files)
    for name in ("tokenizer.model", "tokenizer.json", "original/tokenizer.model"):
        content = files.get(name)
        if content is None:
            continue
        path = folder / name
        if name == "tokenizer.json":
            data = _read_json(path, content)
            there = {token["content"] for token in data["added_tokens"]}
            added_tokens.check_known(folder, there, added, name)
            if not _is_llama3(data) or not all(token["special"] for token in data["added_tokens"]):
                return Tokenizer(**tokenizer_json.read(path, data, files))
            return _tiktoken(path, *_ranks_of(path, data), files)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", content):  # "IQ== 0": one token and its rank a line
            if name == "tokenizer.model" and "tokenizer.json" in files:
                continue  # which says more: the special tokens by name
            ranks = _read_ranks(path, content)
            specials = llama3_specials(len(ranks))
            there = {text for text, token in added.items() if token.special and token.id in specials.values()}
            added_tokens.check_known(folder, there, added, name)
            return _tiktoken(path, ranks, specials, files)
        return _sentencepiece(path, content, files, added)
    raise UserError(
        f"tokenizer: no tokenizer.model or tokenizer.json in {folder}: download the tokenizer files of the model into "
        "that folder"
    )


def check_matches(tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int] = ()) -> None:
    """Raise UserError when a model of `vocab_size` rows has no row for one of the ids, or stops at other ids only."""
    fix = "use the tokenizer files that came with the model"
    if not tokenizer.vocab_size <= vocab_size <= 1.25 * tokenizer.vocab_size + 64:  # rows may be rounded up, not more
        raise UserError(
            f"tokenizer: it has {tokenizer.vocab_size} ids but the model has {vocab_size} embedding rows, expected an "
            f"id a row: {fix}"
        )
    if eos_ids and tokenizer.eos_id not in eos_ids:
        ids = ", ".join(map(str, eos_ids))
        raise UserError(f"tokenizer: its EOS is {tokenizer.eos_id}, expected the model's eos_token_id {ids}: {fix}")


def check_same(
    tokenizer: Tokenizer, other: Tokenizer, what: str, than: str = "that of the policy", folder: str | None = None
) -> None:
    """Raise UserError when two models that read each other's token ids were trained with different tokenizers."""
    if tokenizer._tokens != other._tokens:
        which = f"{what} {folder}" if folder else what
        raise UserError(
            f"tokenizer: that of {which} has other tokens than {than}, expected the same: pass models that were "
            "trained from the same base model"
        )


# ---------------------------------------------------------------------------------------------- sentencepiece (Llama 2)

# A NormalizerSpec (field 3 of the model file) that says add_dummy_prefix =
# remove_extra_whitespaces = false. Joining two serialised protobuf messages merges them
# and the later value wins, so appending it edits the model without parsing it.
KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


def _sentencepiece(path: Path, content: bytes, files: dict[str, bytes], added: dict[str, Added]) -> Tokenizer:
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content + KEEP_SPACES)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: neither a sentencepiece model nor a tiktoken file ({len(content)} bytes, beginning with "
            f"{content[:16]!r}): the download is incomplete or a Git LFS pointer; fetch the file again"
        ) from error

    def token_bytes(i: int) -> bytes:
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            return b""
        piece = processor.id_to_piece(i)
        return bytes([int(piece[1:-1], 16)]) if processor.is_byte(i) else piece.replace("▁", " ").encode()

    try:
        tokens = [token_bytes(i) for i in range(processor.get_piece_size())]
    except ValueError as error:  # no UTF-8, or a byte token that names no byte
        raise UserError(f"{path}: a damaged sentencepiece model ({error}): fetch the file again") from error
    bos_id, eos_id, unk_id = processor.bos_id(), processor.eos_id(), processor.unk_id()
    if bos_id < 0 or eos_id < 0:
        raise UserError(
            f"{path}: BOS is {bos_id} and EOS is {eos_id}, expected both to be defined: not a Llama tokenizer"
        )
    size = len(tokens)

    vocabulary = {processor.id_to_piece(i): i for i in range(size)}
    for piece, i in _vocabulary(files).items():
        if vocabulary.get(piece, i) != i:
            raise UserError(
                f"{path.parent}: the token {piece!r} has the id {vocabulary[piece]} in {path.name} and {i!r} in "
                "tokenizer.json, expected the same: keep the files that came with the model"
            )
    there = {text for text, t in added.items() if vocabulary.get(text, max(t.id, size)) == t.id}  # as there, or behind
    added_tokens.check_known(path.parent, there, added, path.name)
    controls = {text for text, token in added.items() if token.id < size and not tokens[token.id]}
    added |= {text: added[text]._replace(special=True) for text in controls}  # </s> is special, whatever a file says
    find = added_tokens.finders(path.parent, added)
    dummy_prefix = original.normalize("a").startswith("▁")
    first = with_prefix if dummy_prefix else str
    return Tokenizer(
        encode=added_tokens.encode_around(processor.encode, find, added, first) if find else processor.encode,
        tokens=added_tokens.place(tokens, added, path),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=processor.pad_id() if processor.pad_id() >= 0 else unk_id,
        dummy_prefix=dummy_prefix,
        files=files,
        prefix_inside=bool(find),
    )


def _vocabulary(files: dict[str, bytes]) -> dict[str, int]:
    """{token: id} as a tokenizer.json beside a sentencepiece model says it: an object (BPE), or a list (unigram)."""
    model = json.loads(files.get("tokenizer.json", b"{}")).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        pairs = ((i, pair) for i, pair in enumerate(vocab) if isinstance(pair, list) and pair)
        return {pair[0]: i for i, pair in pairs if isinstance(pair[0], str)}
    return vocab if isinstance(vocab, dict) else {}


# --------------------------------------------------------------------------------------------------- tiktoken (Llama 3)

LLAMA3_SPLIT = (  # how a text is cut before merging: contractions, words, numbers of up to 3 digits, signs, blanks
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_RUN, MAX_CALL = 25_000, 400_000  # characters; longer runs of (non-)blanks overflow tiktoken's regex stack


def llama3_specials(first_id: int) -> dict[str, int]:
    """The 256 special tokens of Llama 3.1 and 3.2, which a tiktoken file does not list: name -> id."""
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"]
    names += ["eom_id", "eot_id", "python_tag"]
    names += [f"reserved_special_token_{n}" for n in range(3, 248)]
    return {f"<|{name}|>": first_id + n for n, name in enumerate(names)}


def _tiktoken(path: Path, ranks: dict[bytes, int], specials: dict[str, int], files: dict[str, bytes]) -> Tokenizer:
    taken, limit = set(), 2 * (len(ranks) + len(specials))  # free ids are named later, if they are few
    for token, i in [*ranks.items(), *specials.items()]:
        if type(i) is not int or not 0 <= i < limit or i in taken:  # tiktoken panics on an id that two tokens share
            raise UserError(
                f"{path}: token {token!r} has the id {i!r}, expected a number of its own below {limit:,}: fetch the "
                "file again"
            )
        taken.add(i)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of the 256 single bytes have no token: the file is cut or not Llama 3's"
        )
    pads = ["<|finetune_right_pad_id|>", *(f"<|reserved_special_token_{n}|>" for n in range(256))]
    pad = next((name for name in pads if name in specials), None)
    if pad is None or "<|begin_of_text|>" not in specials or "<|end_of_text|>" not in specials:
        raise UserError(
            f"{path}: special tokens {sorted(specials)[:8]}, expected <|begin_of_text|>, <|end_of_text|> and "
            "<|finetune_right_pad_id|> or a reserved one: not a Llama 3 tokenizer"
        )
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)

    def encode(text: str) -> list[int]:
        return [i for part in chunks(text) for i in encoding.encode_ordinary(part)]

    tokens = [None] * (1 + max(*ranks.values(), *specials.values()))  # None: an id without a token
    for token, i in ranks.items():
        tokens[i] = token
    for i in specials.values():
        tokens[i] = b""
    return Tokenizer(
        encode=encode,
        tokens=tokens,
        bos_id=specials["<|begin_of_text|>"],
        eos_id=specials["<|end_of_text|>"],
        pad_id=specials[pad],
        dummy_prefix=False,
        files=files,
    )


def chunks(text: str) -> Iterator[str]:
    """Cut `text` as Llama 3's own tokenizer does: at most 400,000 characters a call and in it no run of blanks or of
    non-blanks longer than 25,000. Texts within these limits come back whole."""
    for start in range(0, len(text), MAX_CALL):
        part = text[start : start + MAX_CALL]
        begin = 0
        for run in re.finditer(r"\s+|\S+", part) if len(part) > MAX_RUN else ():
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]


def _read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """tiktoken's own format: a line for each token, its bytes in base64 and its rank (= id)."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}:{number}: got {line[:40]!r}, expected a base64 token and its rank: fetch the file again"
            ) from error
    return ranks


def _read_json(path: Path, content: bytes) -> dict:
    """A tokenizer.json as far as both readers ask for it. Raises UserError for one that is cut or something else."""
    try:
        data = json.loads(content)
        added, vocab = data["added_tokens"], data["model"]["vocab"]
        whole = data["model"]["type"] != "BPE" or (type(vocab) is dict and type(data["model"]["merges"]) is list)
        whole = whole and all(type(t["content"]) is str and type(t["special"]) is bool and "id" in t for t in added)
        _is_llama3(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a complete tokenizer.json ({error!r}): fetch the file again") from error
    if not whole:
        raise UserError(f"{path}: not a complete tokenizer.json (vocab, merges or added_tokens): fetch the file again")
    return data


def _is_llama3(data: dict) -> bool:
    """Whether tiktoken means the same: it merges by rank, so ids must be ranks, whole words be looked up first, and the
    text be cut by Llama 3's expression."""
    model, steps = data["model"], (data.get("pre_tokenizer") or {}).get("pretokenizers", [])
    splits = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    whole_words = model["type"] == "BPE" and model.get("ignore_merges")
    return bool(whole_words) and splits == [LLAMA3_SPLIT] and data.get("normalizer") is None


def _ranks_of(path: Path, data: dict) -> tuple[dict[bytes, int], dict[str, int]]:
    """Of a Llama 3 tokenizer.json: ranks of the ordinary tokens, ids of the special ones."""
    added, byte_of = (
        {token["content"]: token["id"] for token in data["added_tokens"]},
        tokenizer_json.byte_of_character(),
    )
    try:
        ranks = {
            bytes(byte_of[c] for c in token): i for token, i in data["model"]["vocab"].items() if token not in added
        }
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: a token contains {error}, expected byte-level tokens: fetch the file again"
        ) from error
    return ranks, added
