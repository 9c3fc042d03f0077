"""A data folder with only those posts whose query is short: none is cut, and a step on a CPU costs half.

Longer posts are left out whole, where --max_query_length would cut off their ends: a summary then never speaks of what
the model has not read. The comparisons stay as they are.
"""

import shutil
from pathlib import Path

from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.errors import check
from nanorlhf.storage.jsonl import write_whole


def write_short_posts(data: Path, folder: Path, tokenizer: Tokenizer, longest: int) -> dict[str, list[int]]:
    """Writes `folder` in the format of `data`, with the posts whose query has at most `longest` tokens, in their order.

    -> {split: [posts kept, posts that there were]}. Raises UserError where no post of a split is so short.
    """
    counts, pairs = {}, data / "comparisons"
    check(pairs.is_dir(), "data", data, "a folder with comparisons/ beside its posts", "fetch them too")
    for split in ("train", "valid"):
        posts = load_posts(data, split)
        source = next(data / name / f"{split}.jsonl" for name in ("tldr", "tldr_3_filtered")
                      if (data / name / f"{split}.jsonl").is_file())  # fmt: skip
        queries, _ = encode_posts(posts, tokenizer, max_query_length=10**6)  # none is cut
        lines = [line.strip() for line in source.read_bytes().split(b"\n") if line.strip()]
        kept = [line for line, length in zip(lines, queries.lengths, strict=True) if length <= longest]
        check(len(kept) > 0, "longest", longest, f"at least {queries.lengths.min()}, the shortest query of {source}")
        (folder / "tldr").mkdir(parents=True, exist_ok=True)
        write_whole(folder / "tldr" / f"{split}.jsonl", b"".join(line + b"\n" for line in kept).decode())
        counts[split] = [len(kept), len(lines)]
    shutil.copytree(pairs, folder / "comparisons", dirs_exist_ok=True)
    return counts
