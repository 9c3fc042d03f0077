"""Byte-level BPE of other Llamas than Meta's, by the tokenizers library: against transformers, and what is refused."""

import json
import shutil

import pytest
from hypothesis import given, settings
from test_tokenizer import CORPUS, QUERY, TEXTS, unicode_text

from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]
DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write_smollm_like(folder, corpus=CORPUS, size=420, about=None):
    """A tokenizer.json built as SmolLM2's: specials first, digits one by one, and no token for bytes never seen."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    learner = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    learner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False)
    seen = "".join(chr(i) for i in range(32, 127)) + "\n"
    learner.train_from_iterator([*corpus.splitlines(keepends=True), seen], trainer)
    learner.save(str(folder / "tokenizer.json"))
    about = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[0], "unk_token": SPECIALS[0]} if about is None else about
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"} | about), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_smollm_like(tmp_path_factory.mktemp("smollm") / "base")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def changed(folder, to, change):
    """A copy of the folder whose tokenizer.json went through change(data)."""
    shutil.copytree(folder, to)
    data = json.loads((to / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (to / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return to


def test_ids_equal_those_of_transformers(tokenizer, reference):
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False, split_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=unicode_text)
def test_ids_equal_those_of_transformers_on_any_text(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.encode_batch([text, "a", text]) == [ids, tokenizer.encode("a"), ids]


def test_ids_inside_the_vocabulary_that_no_token_has_are_refused_by_number(folder, tmp_path):
    with pytest.raises(UserError, match=r"1 of its \d+ ids have no token \(3\), expected one for each"):
        load_tokenizer(changed(folder, tmp_path / "hole", lambda data: data["added_tokens"].pop(3) and
                               data["model"]["vocab"].pop("<repo_name>")))  # fmt: skip


def test_digits_are_tokens_of_their_own(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]


def test_a_byte_without_a_token_is_dropped_and_never_becomes_eos(tokenizer):
    ids = tokenizer.encode("a\x00\x01\x7fb")
    assert not set(range(len(SPECIALS))) & set(ids) and tokenizer.decode(ids) == "ab"


def test_an_unknown_token_in_the_file_changes_nothing(folder, tokenizer, tmp_path):
    def with_unk(data):
        data["model"]["unk_token"] = SPECIALS[0]

    assert load_tokenizer(changed(folder, tmp_path / "unk", with_unk)).encode("a\x00b") == tokenizer.encode("a\x00b")


@pytest.mark.parametrize("name", SPECIALS)
def test_the_name_of_a_special_token_in_a_text_is_ordinary_text(tokenizer, name):
    ids = tokenizer.encode(f"a {name} b")
    assert not set(range(len(SPECIALS))) & set(ids) and tokenizer.decode(ids) == f"a {name} b"


def test_bos_may_be_eos_and_pad_is_a_special_token_that_nothing_uses(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 4)


def test_a_pad_token_that_is_eos_is_not_taken(folder, tmp_path):
    about = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>"}
    instruct = write_smollm_like(tmp_path / "instruct", about=about)
    tokenizer = load_tokenizer(instruct)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 4)
    (instruct / "tokenizer_config.json").write_text(json.dumps(about | {"pad_token": "<repo_name>"}), encoding="utf-8")
    assert load_tokenizer(instruct).pad_id == 3


def test_decoding_the_joined_ids_gives_the_joined_text(tokenizer):
    for response in (" A cat.", "  two", " \n x", " 's"):
        ids = [tokenizer.bos_id, *tokenizer.encode(QUERY), *tokenizer.encode(response), tokenizer.eos_id]
        assert tokenizer.decode(ids) == QUERY + response


def test_tokens_of_text_that_were_added_are_decoded(folder, tmp_path):
    def with_blanks(data):
        one = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
        data["added_tokens"].append({"id": len(data["model"]["vocab"]), "content": "\n\n\n\n"} | one)

    tokenizer = load_tokenizer(changed(folder, tmp_path / "added", with_blanks))
    ids = tokenizer.encode("a\n\n\n\nb")
    assert ids[1] == tokenizer.vocab_size - 1 and tokenizer.decode(ids) == "a\n\n\n\nb"


def test_transformers_opens_a_prompt_of_the_saved_folder_as_we_open_a_query(folder, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(QUERY).input_ids == [tokenizer.bos_id, *tokenizer.encode(QUERY)]
    assert theirs("12 cats", add_special_tokens=False).input_ids == tokenizer.encode("12 cats")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 4)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again._tokens == tokenizer._tokens  # written once, then kept


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["model"].update(type="WordPiece"), "model.type is 'WordPiece', expected BPE"),
        (lambda d: d["model"].update(type="Unigram"), "model.type is 'Unigram', expected BPE .*tokenizer.model"),
        (lambda d: d["model"].update(byte_fallback=True), "model.byte_fallback is True"),
        (lambda d: d["model"].update(dropout=0.1), "model.dropout is 0.1"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix is '</w>'"),
        (
            lambda d: d.update(normalizer={"type": "Prepend", "prepend": "x"}),
            "normalizer is 'Prepend', expected none or",
        ),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer is 'Whitespace'"),
        (lambda d: d.update(pre_tokenizer=DIGITS), "expected one with the step ByteLevel"),
        (lambda d: d.update(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space is True"),
        (lambda d: d["model"]["vocab"].update({"▁cat": 420}), "a token contains '▁'"),
        (lambda d: d["model"]["vocab"].update({"cats": 3}), "has the id 3, expected a number of its own"),
        (lambda d: d["model"]["vocab"].update({"cats": 9999}), "has the id 9999, expected a number of its own"),
        (
            lambda d: d["added_tokens"][1].update(content="<|new|>"),
            r"token '<\|new\|>' has the id 1, expected a number",
        ),
        (
            lambda d: d["added_tokens"].append(d["added_tokens"][0] | {"content": "<|new|>", "id": 700}),
            r"<\|new\|>.* has the id 700, expected the one that",
        ),
        (lambda d: d["model"]["vocab"].update({"catĠdog": 420}), "'cat dog' holds a space between two words"),
        (lambda d: d["model"]["merges"].append(["qqq", "zzz"]), "not a complete tokenizer.json"),
        (lambda d: d["model"].pop("merges"), "not a complete tokenizer.json"),
        (lambda d: d["pre_tokenizer"].pop("type"), "not a complete tokenizer.json"),
        (lambda d: d.pop("added_tokens"), "not a complete tokenizer.json"),
    ],
)
def test_a_file_that_means_something_else_is_refused_by_the_name_of_the_field(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(changed(folder, tmp_path / "other", change))


def test_a_normaliser_and_another_expression_work_as_the_library_runs_them(folder, tmp_path):
    from transformers import PreTrainedTokenizerFast

    def change(data):
        data["normalizer"] = {"type": "NFC"}
        split = {
            "type": "Split",
            "pattern": {"Regex": r"\p{N}| ?\p{L}+|\s+|."},
            "behavior": "Isolated",
            "invert": False,
        }
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}

    other = changed(folder, tmp_path / "nfc", change)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(other / "tokenizer.json"))
    tokenizer = load_tokenizer(other)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.mark.parametrize("about, named", [({}, "bos_token is None"), ({"bos_token": "<s>"}, "bos_token is '<s>'"),
                                          ({"bos_token": "<|im_start|>"}, "eos_token is None")])  # fmt: skip
def test_a_folder_that_names_no_bos_or_eos_is_refused(tmp_path, about, named):
    with pytest.raises(UserError, match=f"{named}, expected one of the special tokens"):
        load_tokenizer(write_smollm_like(tmp_path / "unnamed", about=about))


def test_a_cut_tokenizer_config_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer_config.json").write_text('{"bos_token"', encoding="utf-8")
    with pytest.raises(UserError, match="not a complete tokenizer_config.json"):
        load_tokenizer(tmp_path / "cut")
