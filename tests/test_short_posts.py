"""A data folder of short posts: which are kept, that none is changed, and what is refused."""

import json
import shutil

import pytest

from experiments.short_posts import write_short_posts
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_comparisons, load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.run.inputs import EMBEDDED


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED / "sft")


def test_posts_up_to_the_limit_are_kept_as_they_are_and_all_comparisons(world, tokenizer, tmp_path):
    lengths = {split: encode_posts(load_posts(world, split), tokenizer, 10**6)[0].lengths
               for split in ("train", "valid")}  # fmt: skip
    longest = int(sorted(lengths["valid"])[len(lengths["valid"]) // 2])
    counts = write_short_posts(world, tmp_path, tokenizer, longest)
    for split, of in lengths.items():
        posts = load_posts(world, split)
        kept = [post for post, length in zip(posts, of, strict=True) if length <= longest]
        assert load_posts(tmp_path, split) == kept and counts[split] == [len(kept), len(posts)]
        assert 0 < len(kept) < len(posts)
    assert load_comparisons(tmp_path, "train") == load_comparisons(world, "train")


def test_a_limit_that_no_post_keeps_is_one_sentence(world, tokenizer, tmp_path):
    with pytest.raises(UserError, match="longest 3 is not at least [0-9]+, the shortest query of .*train.jsonl"):
        write_short_posts(world, tmp_path, tokenizer, 3)


def test_a_folder_that_lacks_something_is_one_sentence(world, tokenizer, tmp_path):
    shutil.copytree(world, tmp_path / "data")
    (tmp_path / "data" / "tldr" / "valid.jsonl").unlink()
    with pytest.raises(UserError, match="valid.jsonl"):
        write_short_posts(tmp_path / "data", tmp_path / "short", tokenizer, 500)
    shutil.rmtree(tmp_path / "data" / "comparisons")
    with pytest.raises(UserError, match="is not a folder with comparisons/ beside its posts: fetch them too"):
        write_short_posts(tmp_path / "data", tmp_path / "short", tokenizer, 500)


def test_blank_lines_and_letters_of_other_alphabets_stay(world, tokenizer, tmp_path):
    row = json.loads((world / "tldr" / "valid.jsonl").read_text(encoding="utf-8").split("\n")[0])
    line = json.dumps(row | {"title": "na\u00efve \u2028 cat"}, ensure_ascii=False)
    for split in ("train", "valid"):
        (tmp_path / "data" / "tldr").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "tldr" / f"{split}.jsonl").write_text(f"\n{line}\n\n", encoding="utf-8")
    (tmp_path / "data" / "comparisons").mkdir()
    assert write_short_posts(tmp_path / "data", tmp_path / "short", tokenizer, 500)["train"] == [1, 1]
    assert (tmp_path / "short" / "tldr" / "train.jsonl").read_text(encoding="utf-8") == f"{line}\n"
