"""Byte-level BPE from any tokenizer.json, by Hugging Face's `tokenizers` library: SmolLM2 and its kind.

    SmolLM2: 49,152 ids, of which the first 17 are special (0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|> ...); digits
    one by one; no space is put in front; 21 of the 256 bytes have no token and are dropped

Llama 3's file means the same to tiktoken, which runs it (tokenizer.py). What the library would run but our
reading could not trust is refused by the name of the field: a step that looks at the whole text (a space put in front,
blanks stripped), since queries are cut and encoded in parts; a vocabulary that is not bytes, since `decode` joins them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before it: encoding.py's processes are the parallel part
import tokenizers

from nanorlhf.data import word_cache
from nanorlhf.errors import UserError

CACHED_WORDS = 200_000  # of which the library keeps the ids: half of all time on real posts with its own 10,000
# Steps that change or cut a text by what stands near, so that a text may be encoded in parts.
NORMALISERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")
PRE_TOKENIZERS = ("ByteLevel", "Digits", "Split", "Punctuation")
SPECIALS = ("bos", "eos", "unk", "pad")
FORMAT = "BPE whose tokens spell bytes"


def read(path: Path, data: dict, files: dict[str, bytes]) -> dict:
    """The arguments of a Tokenizer, from a parsed tokenizer.json and the bytes of the files beside it.

    `files` come back with BOS, EOS and PAD spelled out and a template that puts BOS first, so that transformers and
    vLLM open a prompt as our queries open. Raises UserError that names the field for what is refused.
    """
    model = data["model"]
    try:
        _check(path, data, model)
        tokens = _token_bytes(path, model["vocab"], data["added_tokens"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a complete tokenizer.json ({error!r}): fetch the file again") from None
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(data | {"truncation": None, "padding": None}))
        library.model = tokenizers.models.BPE(
            vocab=model["vocab"],
            merges=[tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]],
            cache_capacity=CACHED_WORDS,
            ignore_merges=model.get("ignore_merges") or False,
        )  # without unk_token: a byte that has no token is dropped, and never becomes an id that may be EOS
    except Exception as error:  # noqa: BLE001  the library raises Exception itself, with what it read
        if type(error) is not Exception:
            raise
        raise UserError(f"{path}: not a complete tokenizer.json ({error}): fetch the file again") from None
    for token in data["added_tokens"]:
        if library.token_to_id(token["content"]) != token["id"]:  # the library numbers them itself
            raise UserError(
                f"{path}: added token {token['content']!r} has the id {token['id']}, expected the one that the library "
                f"finds in it, {library.token_to_id(token['content'])}: fetch the file again"
            )
    library.encode_special_tokens = True  # "<|im_end|>" in a post is text

    def encode(text: str) -> list[int]:
        return library.encode(text, add_special_tokens=False).ids

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]

    added = data["added_tokens"]
    steps = _steps(data["pre_tokenizer"], "pretokenizers"), _steps(data.get("normalizer"), "normalizers")
    if pattern := word_cache.pattern_of(*steps, added):
        encode = word_cache.WordCache(encode, pattern).encode
        encode_batch = None  # one after the other
    named = _named_specials(path, files, {token["content"]: token["id"] for token in added if token["special"]})
    return dict(
        encode=encode,
        encode_batch=encode_batch,
        tokens=tokens,
        bos_id=named["bos"][1],
        eos_id=named["eos"][1],
        pad_id=named["pad"][1],
        dummy_prefix=False,
        files=files | _files(data, files, named),
    )


def _check(path: Path, data: dict, model: dict) -> None:
    """Raise UserError that names the first field whose meaning is not ours."""

    def refuse(field: str, got, expected: str, fix: str):
        raise UserError(f"{path}: {field} is {got!r}, expected {expected}: {fix}")

    other = (
        "for Llama 2 and TinyLlama put the model's tokenizer.model into the folder; other families are not supported"
    )
    if model["type"] != "BPE":
        refuse("model.type", model["type"], FORMAT, other)
    if model.get("byte_fallback"):
        refuse("model.byte_fallback", True, FORMAT, other)
    if model.get("dropout"):
        refuse("model.dropout", model["dropout"], "none: the same text must give the same ids", "set it to null")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            refuse(f"model.{field}", model[field], FORMAT, other)
    for step in _steps(data.get("normalizer"), "normalizers"):
        if step["type"] not in NORMALISERS:
            refuse("normalizer", step["type"], f"none or {', '.join(NORMALISERS)}", other)
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    for step in steps:
        if step["type"] not in PRE_TOKENIZERS:
            refuse("pre_tokenizer", step["type"], f"one of {', '.join(PRE_TOKENIZERS)}", other)
        if step["type"] in ("Split", "Punctuation") and step["behavior"] == "Removed":
            refuse(f"pre_tokenizer.{step['type']}.behavior", "Removed", "one that keeps the text", other)
        if step.get("add_prefix_space"):
            refuse("pre_tokenizer.add_prefix_space", True, "false: a response brings its own space", other)
    if all(step["type"] != "ByteLevel" for step in steps):
        refuse("pre_tokenizer", [step["type"] for step in steps], "one with the step ByteLevel", other)
    for token in data["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            refuse("added_tokens.lstrip or rstrip", token["content"], "false for a token of text", other)


def _steps(step: dict | None, name: str) -> list[dict]:
    """A normaliser or pre-tokenizer as the list of its single steps."""
    if step is None:
        return []
    return [one for part in step[name] for one in _steps(part, name)] if step["type"] == "Sequence" else [step]


def byte_of_character() -> dict[str, int]:
    """tokenizer.json spells every byte as a printable character: 188 as themselves, the other 68 from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _token_bytes(path: Path, vocab: dict[str, int], added: list[dict]) -> list[bytes | None]:
    """The bytes of each id: b"" for special ones, None for ids without a token."""
    ids = vocab | {token["content"]: token["id"] for token in added}
    limit, taken = 2 * len(ids), set()  # free ids are named later, if they are few
    for token, i in ids.items():
        if type(i) is not int or not 0 <= i < limit or i in taken:
            raise UserError(
                f"{path}: token {token!r} has the id {i!r}, expected a number of its own below {limit:,}: fetch the "
                "file again"
            )
        taken.add(i)
    byte_of, own = byte_of_character(), {token["content"] for token in added}
    tokens = [None] * (1 + max(taken))
    try:
        for token, i in vocab.items():
            if token not in own:
                tokens[i] = bytes(byte_of[character] for character in token)
    except KeyError as error:
        raise UserError(f"{path}: a token contains {error}, expected {FORMAT}: fetch the file again") from None
    for token in added:
        tokens[token["id"]] = b"" if token["special"] else token["content"].encode()
    superwords = [token for token in tokens if token and _reaches_across_words(token)]
    if superwords:
        raise UserError(
            f"{path}: the token {superwords[0].decode()!r} holds a space between two words, expected none: queries are "
            "cut between words; other families are not supported"
        )
    return tokens


def _reaches_across_words(token: bytes) -> bool:
    at = token.find(b" ", 1)
    return 0 < at < len(token) - 1 and token[at - 1 : at].isalnum() and token[at + 1 : at + 2].isalpha()


def _named_specials(path: Path, files: dict[str, bytes], ids: dict[str, int]) -> dict[str, tuple[str, int]]:
    """bos, eos and pad as (name, id), from tokenizer_config.json or special_tokens_map.json.

    PAD is the model's own where that is neither BOS nor EOS; else the last special token that has no other part.
    """
    said = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            about = json.loads(files.get(name, b"{}"))
            found = {kind: about.get(f"{kind}_token") for kind in SPECIALS}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path.with_name(name)}: not a JSON object ({error}): fetch the file again") from None
        said |= {kind: t["content"] if isinstance(t, dict) else t for kind, t in found.items() if t}
    for kind in ("bos", "eos"):
        if said.get(kind) not in ids:
            raise UserError(
                f"{path.with_name('tokenizer_config.json')}: {kind}_token is {said.get(kind)!r}, expected one of the "
                f"special tokens of tokenizer.json ({', '.join(list(ids)[:4])} ...): copy the file of the model, or add "
                "it"
            )
    taken = {said["bos"], said["eos"]}
    own = [said["pad"]] if said.get("pad") in ids and said["pad"] not in taken else []
    free = own or [name for name in ids if "pad" in name.lower() and name not in taken]
    free = free or [name for name in sorted(ids, key=ids.get) if name not in taken | {said.get("unk")}][-1:]
    free = free or [name for name in ids if name not in taken]
    if not free:
        raise UserError(
            f"{path}: its special tokens are {sorted(ids)}, expected one beside BOS and EOS that can be PAD: "
            "add one to added_tokens"
        )
    return {kind: (name, ids[name]) for kind, name in (("bos", said["bos"]), ("eos", said["eos"]), ("pad", free[0]))}


def _files(data: dict, files: dict[str, bytes], named: dict[str, tuple[str, int]]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json as we write them: BOS opens a prompt there as it does here.

    PreTrainedTokenizerFast is the class that runs tokenizer.json as it stands: transformers 5 builds a GPT2Tokenizer
    anew and loses the step that splits digits.
    """
    (bos, id), written = named["bos"], {}
    if not _opens_with(data.get("post_processor"), bos):
        a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        first, second = ({"SpecialToken": {"id": bos, "type_id": of}} for of in (0, 1))
        template = {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, second, b]}
        template["special_tokens"] = {bos: {"id": bos, "ids": [id], "tokens": [bos]}}
        data = data | {"post_processor": template}
        written["tokenizer.json"] = json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")
    before = json.loads(files.get("tokenizer_config.json", b"{}"))
    about = before | {f"{kind}_token": name for kind, (name, _) in named.items()}
    about |= {"add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    if about != before:
        written["tokenizer_config.json"] = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    return written


def _opens_with(step: dict | None, bos: str) -> bool:
    """Whether a post-processor puts this token first."""
    steps = step["processors"] if step and step["type"] == "Sequence" else [step] if step else []
    return any(
        one["type"] == "TemplateProcessing" and one["single"][0].get("SpecialToken", {}).get("id") == bos
        for one in steps
    )
