"""Both kinds of tokenizer against transformers', and what must hold where a query and a response are joined."""

import base64
import json
import shutil
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.data.tokenizer import FILES, Tokenizer, check_matches, check_same, chunks, llama3_specials, load_tokenizer
from nanorlhf.errors import UserError

CORPUS = """My sister (24F) told me that she's moving to Berlin with her boyfriend, and I don't know what to do.
We have been together for 3 years and 6 months; last week I found 1234 messages on his phone.  He says it's nothing!
tl;dr: quit my job, adopted a cat, the cat hates me... What would you do? I'm lost and I can't sleep.
I've asked everybody at work. They'll never understand: "it's just a cat". Naïve café, 你好, привет.
"""
QUERY = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It hates me.\n\nWhy?\n\nTL;DR:"
TEXTS = [
    "",
    " ",
    "a",
    " a",
    "  two blanks",
    "trailing \n\n ",
    "\n\nlines\r\n\ttabs \n \n x",
    "I'm sure they'LL say it's 123456 n't . ,",
    "naïve café Ünïcödé ﬁ ① e\u0301",
    "你好，世界 привет мир مرحبا",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 and 👍🏽",
    "\u00a0\u2003\u200b\u3000 x",
    "a" * 300 + " " * 300 + "\n" * 40 + "=" * 99,
    "\x00\x01\x7f",
    "▁ metaspace▁▁ ▁",
    "<|end_of_text|> </s> <s> <unk> <|begin_of_text|> <pad> <0x0A>",
    QUERY,
]
unicode_text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\tabcdest'1▁é🙂")), max_size=60)


# ----------------------------------------------------------------------------------- tokenizer folders made on the spot


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder with small tokenizers of each format; `llama3` and `tiktoken` hold the same vocabulary."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_llama3_folders(root)
    train_sentencepiece(root / "llama2", add_dummy_prefix=True, byte_fallback=True, vocab_size=500)
    train_sentencepiece(root / "plain", add_dummy_prefix=False, byte_fallback=True, vocab_size=500)
    tiny = {"user_defined_symbols": ["\n\n"], "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    train_sentencepiece(root / "tiny", add_dummy_prefix=False, vocab_size=300, **tiny)
    return {folder.name: folder for folder in root.iterdir()}


def write_llama3_folders(root, corpus=CORPUS, size=600):
    """A byte-level BPE as tiktoken file and, converted by transformers as Llama 3 was, as tokenizer.json."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus.splitlines(), trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in trained.get_vocab().items()}
    lines = [f"{base64.b64encode(t).decode()} {r}\n" for t, r in sorted(ranks.items(), key=lambda item: item[1])]

    (root / "tiktoken").mkdir()
    (root / "tiktoken" / "tokenizer.model").write_text("".join(lines), encoding="utf-8")
    (root / "original" / "original").mkdir(parents=True)
    (root / "original" / "original" / "tokenizer.model").write_text("".join(lines), encoding="utf-8")
    (root / "llama3").mkdir()
    specials = list(llama3_specials(len(ranks)))
    converter = TikTokenConverter(str(root / "tiktoken" / "tokenizer.model"), extra_special_tokens=specials)
    converter.converted().save(str(root / "llama3" / "tokenizer.json"))
    (root / "llama3" / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}\r\n', encoding="utf-8")


def train_sentencepiece(folder, corpus=CORPUS, **options):
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def references(folders):
    """transformers' tokenizer for each folder that it can read as it is."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(folders["llama3"] / "tokenizer.json"))
    return {
        "llama3": fast,
        "tiktoken": fast,
        "llama2": LlamaTokenizer.from_pretrained(folders["llama2"], legacy=False),
        "plain": LlamaTokenizer.from_pretrained(folders["plain"], legacy=False, add_prefix_space=False),
    }


EVERY = ["llama3", "tiktoken", "original", "llama2", "plain", "tiny"]
LOSSLESS = ["llama3", "tiktoken", "original", "plain"]


def reference_ids(reference, text):
    return reference.encode(text, add_special_tokens=False, split_special_tokens=True)


# ----------------------------------------------------------------------------------------------- parity and round trips


@pytest.mark.parametrize("name", ["llama3", "tiktoken", "llama2", "plain"])
def test_ids_equal_those_of_transformers(tokenizers, references, name):
    for text in TEXTS:
        assert tokenizers[name].encode(text) == reference_ids(references[name], text), repr(text)


@settings(max_examples=200, deadline=None)
@given(text=unicode_text)
def test_ids_equal_those_of_transformers_on_any_text(tokenizers, references, text):
    for name, reference in references.items():
        assert tokenizers[name].encode(text) == reference_ids(reference, text), name


@settings(max_examples=200, deadline=None)
@given(text=unicode_text)
def test_decode_undoes_encode_on_any_text(tokenizers, text):
    for name in LOSSLESS:
        spaces = text.replace("▁", " ") if name == "plain" else text  # sentencepiece spells a space as U+2581
        assert tokenizers[name].decode(tokenizers[name].encode(text)) == spaces, name


@pytest.mark.parametrize("name", ["llama3", "tiktoken", "original", "llama2", "plain"])
@pytest.mark.parametrize("response", [" A cat.", "  two", " \n x", " ", " 's", " .", " \u00a0x"])
def test_decoding_the_joined_ids_gives_the_joined_text(tokenizers, name, response):
    tokenizer = tokenizers[name]
    ids = [tokenizer.bos_id, *tokenizer.encode(QUERY), *tokenizer.encode(response), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == QUERY + response


def test_without_byte_fallback_known_characters_survive_and_unknown_ones_are_lost(tokenizers):
    tiny = tokenizers["tiny"]
    assert tiny.decode(tiny.encode("the cat\n\nhates") + tiny.encode(" me")) == "the cat\n\nhates me"
    assert tiny.encode("a\n\nb") != tiny.encode("a") + tiny.encode("b")
    assert tiny.decode(tiny.encode("a 🙂 cat")) == "a  cat"
    assert tiny.pad_id not in tiny.encode("a 🙂 cat")  # unknown is an id of its own here


@pytest.mark.parametrize("name", EVERY)
def test_a_space_at_the_start_is_encoded_exactly_once(tokenizers, name):
    ids = tokenizers[name].encode(" cat")
    assert tokenizers[name].decode([*tokenizers[name].encode("the"), *ids]) == "the cat"
    assert (tokenizers[name].encode("cat") == ids) == (name == "llama2")  # only a dummy prefix makes the two the same


def test_a_dummy_prefix_costs_one_leading_space_and_no_more(tokenizers):
    llama2 = tokenizers["llama2"]
    assert [llama2.decode(llama2.encode(text)) for text in ("x", " x", "  x", "\n x")] == ["x", "x", " x", "\n x"]


def test_the_two_formats_of_llama_3_give_the_same_tokenizer(tokenizers):
    first, *others = (tokenizers[name] for name in ("llama3", "tiktoken", "original"))
    for other in others:
        assert other._tokens == first._tokens
        assert (other.bos_id, other.eos_id, other.pad_id) == (first.bos_id, first.eos_id, first.pad_id)


def test_text_keeps_its_spaces_under_a_model_that_would_collapse_them(tmp_path):
    options = {"vocab_size": 500, "byte_fallback": True, "add_dummy_prefix": True}
    train_sentencepiece(tmp_path / "model", **options)
    path = tmp_path / "model" / "tokenizer.model"
    path.write_bytes(path.read_bytes() + bytes([0x1A, 2, 0x20, 1]))  # remove_extra_whitespaces = true
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.decode(tokenizer.encode("a  b \n c ")) == "a  b \n c "


# ---------------------------------------------------------------------------------------------------------- special ids


def test_special_ids_of_llama_3_stand_at_their_published_places():
    specials = llama3_specials(128_000)
    assert specials["<|begin_of_text|>"] == 128_000
    assert specials["<|end_of_text|>"] == 128_001
    assert specials["<|finetune_right_pad_id|>"] == 128_004
    assert specials["<|eot_id|>"] == 128_009
    assert specials["<|python_tag|>"] == 128_010
    assert specials["<|reserved_special_token_247|>"] == 128_255 and len(specials) == 256


@pytest.mark.parametrize("name", ["llama3", "tiktoken", "original"])
def test_special_ids_of_llama_3_follow_the_ordinary_tokens(tokenizers, name):
    tokenizer = tokenizers[name]
    first = tokenizer.vocab_size - 256
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (first, first + 1, first + 4)


@pytest.mark.parametrize("name", ["llama2", "plain", "tiny"])
def test_special_ids_of_sentencepiece_are_1_2_and_0(tokenizers, name):
    assert (tokenizers[name].bos_id, tokenizers[name].eos_id, tokenizers[name].pad_id) == (1, 2, 0)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("text", ["<|end_of_text|>", "</s>", "<s>", "<|begin_of_text|>", "a</s>b", " <|eot_id|>"])
def test_the_name_of_a_special_token_in_a_text_is_ordinary_text(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text)
    assert len(ids) > 1 and not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    if name in LOSSLESS:
        assert tokenizer.decode(ids) == text and tokenizer.pad_id not in ids


@pytest.mark.parametrize("name", EVERY)
def test_decode_skips_special_ids_and_shows_ids_without_a_token(tokenizers, name):
    tokenizer = tokenizers[name]
    cat = tokenizer.encode("the cat")
    with_specials = [tokenizer.bos_id, *cat, tokenizer.eos_id, tokenizer.pad_id, *cat[1:]]
    assert tokenizer.decode(with_specials).startswith("the cat")
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]) == ""
    assert tokenizer.decode([*cat, tokenizer.vocab_size, -1]) == "the cat\ufffd\ufffd"


def test_decode_shows_half_a_character_as_a_replacement_sign(tokenizers):
    for name in LOSSLESS:
        ids = tokenizers[name].encode("a🙂")
        assert tokenizers[name].decode(ids[:-1]).rstrip("\ufffd") == "a"


def test_half_a_surrogate_pair_becomes_a_replacement_sign(tokenizers):
    for name in LOSSLESS:
        assert tokenizers[name].decode(tokenizers[name].encode("a\ud83db")) == "a\ufffdb"
        assert tokenizers[name].decode(tokenizers[name].encode("\ud83d\ude42")) == "🙂"


def test_a_llama_3_without_a_pad_token_uses_a_reserved_one(folders, tmp_path):
    text = (folders["llama3"] / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(
        text.replace("<|finetune_right_pad_id|>", "<|something_else|>"), encoding="utf-8"
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == tokenizer.bos_id + 2  # <|reserved_special_token_0|>


def test_pad_equal_to_eos_is_refused():
    with pytest.raises(UserError, match="pad_id and eos_id are both 2"):
        Tokenizer(encode=list, tokens=[b""] * 3, bos_id=1, eos_id=2, pad_id=2, dummy_prefix=False, files={})


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tokenizers):
    size = tokenizers["llama2"].vocab_size
    check_matches(tokenizers["llama2"], size)
    check_matches(tokenizers["llama2"], size + 7)
    with pytest.raises(UserError, match=f"has {size} ids but the model has 32000 embedding rows, expected an id a row"):
        check_matches(tokenizers["llama2"], 32_000)  # the special ids are the same: only the size tells
    with pytest.raises(UserError, match=f"has {size} ids but the model has {size - 1} embedding rows"):
        check_matches(tokenizers["llama2"], size - 1)


def test_a_tokenizer_that_ends_responses_with_another_token_than_the_model_is_refused(tokenizers):
    tokenizer = tokenizers["llama2"]
    check_matches(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
    check_matches(tokenizer, tokenizer.vocab_size, [5, tokenizer.eos_id])  # newer configs list several
    check_matches(tokenizer, tokenizer.vocab_size)  # nothing said of EOS
    with pytest.raises(UserError, match="its EOS is 2, expected the model's eos_token_id 7"):
        check_matches(tokenizer, tokenizer.vocab_size, [7])
    with pytest.raises(UserError, match="its EOS is 2, expected the model's eos_token_id 0"):
        check_matches(tokenizer, tokenizer.vocab_size, [0])


def test_models_that_read_each_others_ids_must_have_one_tokenizer(folders, tokenizers):
    check_same(tokenizers["llama2"], load_tokenizer(folders["llama2"]), "the reward model")
    check_same(tokenizers["llama3"], tokenizers["tiktoken"], "the reward model")  # two formats of the same tokens
    with pytest.raises(UserError, match="that of the reward model has other tokens"):
        check_same(tokenizers["llama2"], tokenizers["tiny"], "the reward model")
    renamed = load_tokenizer(folders["llama2"])
    renamed._tokens[300], renamed._tokens[301] = renamed._tokens[301], renamed._tokens[300]  # equally many, swapped
    with pytest.raises(UserError, match="that of the sft policy has other tokens"):
        check_same(tokenizers["llama2"], renamed, "the sft policy")


# ----------------------------------------------------------------------------------------------------------- long texts


@pytest.mark.parametrize("name", ["llama3", "llama2", "tiny"])
@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "\n" * 100_000, "🙂" * 50_000, "=" * 99_999 + "a"])
def test_long_runs_of_one_character_neither_hang_nor_crash(tokenizers, name, text):
    start = time.perf_counter()
    ids = tokenizers[name].encode(text)
    assert time.perf_counter() - start < 5
    if name == "llama3":
        assert tokenizers[name].decode(ids) == text


def test_llama_3_cuts_runs_of_25_000_characters_as_its_own_tokenizer_does(tokenizers):
    encode = tokenizers["llama3"].encode
    assert len(encode("he")) == 1
    assert encode("x" * 24_999 + "hello") == encode("x" * 24_999 + "h") + encode("ello")


def test_chunks_cut_only_runs_that_are_too_long():
    def lengths(text):
        parts = list(chunks(text))
        assert "".join(parts) == text
        return [len(part) for part in parts]

    assert lengths("a" * 25_000) == [25_000]
    assert lengths("a" * 25_001) == [25_000, 1]
    assert lengths("x " + "a" * 50_000 + " y") == [25_002, 25_002]
    assert lengths("x" + " " * 60_000) == [25_001, 25_000, 10_000]
    assert lengths("ab " * 20_000) == [60_000]
    assert lengths("ab " * 200_000) == [400_000, 200_000]


# -------------------------------------------------------------------------------------------------------- files, errors


@pytest.mark.parametrize("name", EVERY)
def test_save_copies_the_files_byte_for_byte(folders, tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(folders[name], source)
    tokenizer = load_tokenizer(source)
    shutil.rmtree(source)  # a run may outlive the folder it started from
    tokenizer.save(tmp_path / "copy")
    found = {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert found == {path.relative_to(folders[name]) for path in folders[name].rglob("*") if path.is_file()}
    for path in found:
        assert path.as_posix() in FILES
        assert (tmp_path / "copy" / path).read_bytes() == (folders[name] / path).read_bytes()
    assert load_tokenizer(tmp_path / "copy").encode(QUERY) == tokenizer.encode(QUERY)


def test_transformers_reads_a_saved_folder(tokenizers, references, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizers["llama3"].save(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert reference_ids(saved, QUERY) == tokenizers["llama3"].encode(QUERY)


def test_a_folder_without_a_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.model or tokenizer.json in .*: download"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer.model"):
        load_tokenizer(tmp_path / "missing")


def _bad(content, folders):
    good = {name: (folders[name] / "tokenizer.model").read_bytes() for name in ("tiktoken", "llama2")}
    return {
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "empty": b"",
        "cut sentencepiece": good["llama2"][:1000],
        "cut tiktoken": good["tiktoken"][:1000],
        "shared rank": good["tiktoken"] + b"cXFxcQ== 0\n",
        "negative rank": good["tiktoken"] + b"cXFxcQ== -3\n",
        "bad line": good["tiktoken"].replace(b"\n", b"\n?!?! 7\n", 1),
    }[content]


@pytest.mark.parametrize(
    "content, message",
    [
        ("pointer", "neither a sentencepiece model nor a tiktoken file .*Git LFS"),
        ("empty", "neither a sentencepiece model nor a tiktoken file .0 bytes"),
        ("cut sentencepiece", "neither a sentencepiece model nor a tiktoken file .1000 bytes"),
        ("cut tiktoken", "expected a base64 token|of the 256 single bytes have no token"),
        ("shared rank", "token b'qqqq' has the id 0, expected a number of its own below"),
        ("negative rank", r"tokenizer\.model.*(b'cXFxcQ== -3'|b'qqqq' has the id -3)"),
        ("bad line", r"tokenizer\.model:2: got b'\?!\?! 7', expected a base64 token and its rank"),
    ],
)
def test_a_damaged_tokenizer_model_is_a_clear_error(folders, tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(_bad(content, folders))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"type": "BPE"', '"type": "Unigram"', "model.type is 'Unigram', expected BPE .*tokenizer.model"),
        ("<|end_of_text|>", "<|endoftext|>", "not a Llama 3 tokenizer"),
        ('"vocab"', '"vocabulary"', "not a complete tokenizer.json"),
        ('"vocab": {', '"vocab": [], "was": {', "not a complete tokenizer.json"),
        ('"t": ', '"t": -', "token b't' has the id -.*, expected a number of its own below"),
        ('"t": ', '"t": 1000', "token b't' has the id 1000.*, expected a number of its own below"),
        ('"t": ', '"t": 0, "was": ', "has the id 0, expected a number of its own below"),
        ('{\n  "version"', '{,\n  "version"', "not a complete tokenizer.json"),
    ],
)
def test_a_tokenizer_json_that_is_not_llama_3_is_refused(folders, tmp_path, old, new, message):
    text = (folders["llama3"] / "tokenizer.json").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "tokenizer.json").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_ids_inside_a_vocabulary_that_no_token_has_are_refused_by_number(folders, tmp_path):
    """A policy would sample them as it samples every row, and nobody could read what it meant."""
    data = json.loads((folders["llama3"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: i for token, i in data["model"]["vocab"].items() if i not in (300, 305)}
    named = [token for token in data["added_tokens"] if token["content"] != "<|reserved_special_token_5|>"]
    for changed, lost in (({"added_tokens": named}, 1), ({"model": data["model"] | {"vocab": vocab, "merges": []}}, 2)):
        (tmp_path / "tokenizer.json").write_text(json.dumps(data | changed), encoding="utf-8")
        ids = ", ".join(map(str, (300, 305))) if lost == 2 else "\\d+"
        with pytest.raises(UserError, match=rf"{lost} of its \d+ ids have no token \({ids}\), expected one for each"):
            load_tokenizer(tmp_path)


def test_an_added_token_is_one_id_wherever_its_text_stands(folders, tokenizers, tmp_path):
    folder, plain = shutil.copytree(folders["plain"], tmp_path / "added"), tokenizers["plain"]
    added = plain.vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"TL;DR:": added}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("cat TL;DR: it") == [*plain.encode("cat "), added, *plain.encode(" it")]
    assert tokenizer.decode(tokenizer.encode("TL;DR:TL;DR: it")) == "TL;DR:TL;DR: it"
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "TL;DR:"}), encoding="utf-8")
    assert load_tokenizer(folder).encode(QUERY) == plain.encode(QUERY)  # a special one in a text is text


def test_a_sentencepiece_model_and_a_tokenizer_json_that_give_a_token_other_ids_are_refused(folders, tmp_path):
    shutil.copy(folders["llama2"] / "tokenizer.model", tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    bpe, unigram = {piece: i for i, piece in enumerate(pieces)}, [[piece, 0.0] for piece in pieces]
    swapped = bpe | {pieces[400]: 401, pieces[401]: 400}
    for vocab in (bpe, unigram, {}, None, [None, []], "no"):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}), encoding="utf-8")
        assert load_tokenizer(tmp_path).encode("cat") == processor.encode("cat")
    for vocab in (swapped, unigram[::-1]):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}), encoding="utf-8")
        with pytest.raises(UserError, match=r"has the id \d+ in tokenizer.model and \d+ in tokenizer.json, expected"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_json_comes_before_a_tiktoken_file_which_has_no_names_for_special_tokens(folders, tmp_path):
    shutil.copy(next(folders["tiktoken"].rglob("tokenizer.model")), tmp_path / "tokenizer.model")
    text = (folders["llama3"] / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace("<|finetune_right_pad_id|>", "<|mine|>")
    text = text.replace("<|reserved_special_token_9|>", "<|finetune_right_pad_id|>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    alone = load_tokenizer(folders["tiktoken"])
    both = load_tokenizer(tmp_path)
    assert both.encode(QUERY) == alone.encode(QUERY) and both.pad_id != alone.pad_id


def test_special_tokens_may_also_stand_in_the_vocabulary_of_a_tokenizer_json(folders, tokenizers, tmp_path):
    data = json.loads((folders["llama3"] / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"][-1]["content"] = "<|with a space|>"
    data["model"]["vocab"] |= {token["content"]: token["id"] for token in data["added_tokens"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert load_tokenizer(tmp_path)._tokens == tokenizers["llama3"]._tokens
    data["model"]["vocab"]["▁cat"] = 700
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError, match="a token contains '▁', expected byte-level tokens"):
        load_tokenizer(tmp_path)


def test_a_llama_2_folder_with_both_files_is_read_from_its_tokenizer_model(folders, tokenizers, tmp_path):
    shutil.copy(folders["llama2"] / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}', encoding="utf-8")
    assert load_tokenizer(tmp_path).encode(QUERY) == tokenizers["llama2"].encode(QUERY)
