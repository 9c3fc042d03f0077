"""TL;DR posts and human comparisons -> queries, responses, pairs (N+ details 1 to 4, 21).

A query is the formatted post, BOS first, cut to a number of tokens without losing its beginning or its end. A response
is one space, the summary, EOS. Both are lists of token ids that are joined as they are and never decoded and encoded
again. Left out: the CNN/DM rows of the comparisons (they are counted), padding (there is none), downloading.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanorlhf.errors import UserError
from nanorlhf.tokenizer import Tokenizer

SOURCE = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
SPLITS = ("train", "valid", "test")
CNNDM_BATCHES = ("batch0_cnndm", "cnndm0", "cnndm2")


@dataclass(frozen=True)
class Post:
    """A Reddit post with its author's TL;DR. `subreddit` is without "r/", `summary` without a leading space."""

    id: str
    subreddit: str
    title: str
    post: str
    summary: str


@dataclass(frozen=True)
class Comparison:
    """Two summaries of a post and the one a person preferred. Texts are raw: in OpenAI's files they begin with a space.

    `post.summary` is empty. `split` is train, valid1 or valid2; `confidence` runs from 1 (surely the first summary) to
    9 (surely the second), None where it was not asked.
    """

    post: Post
    chosen: str
    rejected: str
    chosen_policy: str
    rejected_policy: str
    batch: str
    split: str
    confidence: int | None
    worker: str


@dataclass
class ComparisonStats:
    """What `load_comparisons` did with the rows it read; `str()` is a line for the log."""

    kept: int = 0
    equal_summaries: int = 0
    cnndm: int = 0
    other_split: int = 0

    def __str__(self) -> str:
        return (
            f"comparisons: {self.kept:,} kept; dropped {self.equal_summaries:,} with equal summaries, "
            f"{self.cnndm:,} CNN/DM, {self.other_split:,} of other splits"
        )


# ------------------------------------------------------------------------------------------------------ text to tokens

# Encoding a longer post never gives fewer tokens than a shorter one, up to the few that its last word or two re-merge
# into. `encode_query` searches with this margin, in tokens, so that its answer is the one of the slow rule.
SLACK = 16


def format_query(subreddit: str, title: str, post: str) -> str:
    """The text of a query, fields raw, no space at the end: it belongs to the response (N+ details 2.1, 2.3)."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def encode_query(tokenizer: Tokenizer, subreddit: str, title: str, post: str, max_length: int) -> list[int]:
    """BOS and the formatted post, at most `max_length` ids in all (N+ detail 2.2).

    While it is too long, the post loses its last newline and what follows, or, where it has none, one character; the
    subreddit, the title and "TL;DR:" stay whole. Raises UserError when it does not fit even with an empty post.
    """

    def encode(length: int) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode(format_query(subreddit, title, post[:length]))]

    if len(query := encode(len(post))) <= max_length:
        return query

    # The rule tries each line end, from the last; then, if not even the first line fits, each character of that line.
    # Bisect to a length from which on everything is too long for sure, then walk down as the rule does.
    newlines = [i for i, character in enumerate(post) if character == "\n"]
    for lengths in (newlines, range(newlines[0] if newlines else len(post))):
        start = bisect_left(lengths, True, key=lambda length: len(encode(length)) > max_length + SLACK)
        for length in reversed(lengths[:start]):
            if len(query := encode(length)) <= max_length:
                return query
    raise UserError(
        f"query: {len(encode(0))} tokens with an empty post, expected at most max_length {max_length}: its title "
        f"({title[:40]!r}) is too long; drop the post or raise the maximum query length"
    )


def encode_response(tokenizer: Tokenizer, summary: str) -> list[int]:
    """One space, the summary, EOS; no BOS (N+ detail 3). The space is added only where the text does not bring it:
    authors' summaries have none, comparison texts have one (N+ trap T2)."""
    return [*tokenizer.encode(summary if summary.startswith(" ") else " " + summary), tokenizer.eos_id]


def encode_posts(
    posts: Iterable[Post], tokenizer: Tokenizer, max_query_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Posts -> queries, responses: a token list a post, in the posts' order."""
    queries, responses = [], []
    for p in posts:
        queries.append(encode_query(tokenizer, p.subreddit, p.title, p.post, max_query_length))
        responses.append(encode_response(tokenizer, p.summary))
    return queries, responses


def encode_comparisons(
    comparisons: Iterable[Comparison], tokenizer: Tokenizer, max_query_length: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Comparisons -> queries, chosen, rejected: a token list a comparison, in their order."""
    queries, chosen, rejected = [], [], []
    for c in comparisons:
        queries.append(encode_query(tokenizer, c.post.subreddit, c.post.title, c.post.post, max_query_length))
        chosen.append(encode_response(tokenizer, c.chosen))
        rejected.append(encode_response(tokenizer, c.rejected))
    return queries, chosen, rejected


def describe(lengths: Sequence[int], limit: int | None = None) -> dict[str, float]:
    """Mean, 99th percentile and maximum of token counts and, given a `limit`, the share above it: what a cut at the
    limit would touch."""
    if len(lengths) == 0:
        raise UserError("lengths: got none, expected at least one sequence to describe")
    stats = {"mean": float(np.mean(lengths)), "p99": float(np.percentile(lengths, 99)), "max": float(np.max(lengths))}
    return stats if limit is None else stats | {"share_over_limit": float(np.mean(np.asarray(lengths) > limit))}


# ---------------------------------------------------------------------------------------------------------- data order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices (batch_size,) int64 of the items of step `step` (from 0) in an endless pass over n items.

    Every epoch has its own order and its last incomplete batch is dropped (N+ detail 21, trap T45). A pure function of
    its arguments: to resume, the step is all that has to be known. Raises UserError when batch_size is not in [1, n].
    """
    if not 1 <= batch_size <= n:
        raise UserError(f"batch_size: got {batch_size}, expected 1 to {n}, the number of items: lower it or add data")
    if seed < 0:
        raise UserError(f"seed: got {seed}, expected 0 or more: choose another")
    epoch, batch = divmod(step, n // batch_size)
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(n)
    return order[batch * batch_size : (batch + 1) * batch_size]


# --------------------------------------------------------------------------------------------------------------- files


def load_posts(data: str | Path, split: str) -> list[Post]:
    """Posts of `{data}/tldr/{split}.jsonl`, or of OpenAI's own folder name `tldr_3_filtered`; split is train, valid or
    test. Raises UserError with file and line for a malformed row, an empty post or an empty summary."""
    if split not in SPLITS:
        raise UserError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    paths = [Path(data) / folder / f"{split}.jsonl" for folder in ("tldr", "tldr_3_filtered")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            f"data: no {paths[0]} (or {paths[1]}), expected one post a line; get it with "
            f"`curl --create-dirs -o {paths[0]} {SOURCE}/datasets/tldr_3_filtered/{split}.jsonl`"
        )
    posts = []
    for where, row in _rows(path):
        post = _post(where, row, summary=_text(where, row, "summary"))
        for name in ("post", "summary"):
            if not getattr(post, name).strip():
                raise UserError(f"{where}: {name} is empty, expected text: remove the line or fill it in")
        posts.append(post)
    if not posts:
        raise UserError(f"{path}: no posts, expected one JSON object a line: fetch the file again")
    return posts


def load_comparisons(data: str | Path, split: str, stats: ComparisonStats | None = None) -> list[Comparison]:
    """Comparisons of all `{data}/comparisons/*.json`, files in the order of their names; split is train, valid (both of
    OpenAI's halves), valid1 or valid2.

    Rows about CNN/DM articles, of other splits, and with two equal summaries (nothing to learn: loss ln 2, counted as
    wrong) are left out and counted in `stats` where one is given. Raises UserError with file and line for a bad row.
    """
    wanted = {"train": ("train",), "valid": ("valid", "valid1", "valid2"), "valid1": ("valid1",), "valid2": ("valid2",)}
    if split not in wanted:
        raise UserError(f"split: got {split!r}, expected one of {', '.join(wanted)}")
    folder = Path(data) / "comparisons"
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(
            f"data: no {folder}/batch*.json, expected one comparison a line; get batch3 to batch20 and batch22 with "
            f"`curl --create-dirs -o {folder}/batch3.json {SOURCE}/dataset/comparisons/batch3.json` and so on"
        )
    stats = ComparisonStats() if stats is None else stats
    comparisons = []
    for path in paths:
        for where, row in _rows(path):
            info = row.get("info")
            if not isinstance(info, dict):
                raise UserError(f"{where}: info is {info!r}, expected an object with id, subreddit, title, post")
            if row.get("batch") in CNNDM_BATCHES or info.get("article") is not None:
                stats.cnndm += 1
                continue
            comparison = _comparison(where, row)
            if comparison.split not in wanted[split]:
                stats.other_split += 1
            elif comparison.chosen == comparison.rejected:
                stats.equal_summaries += 1
            else:
                comparisons.append(comparison)
    stats.kept += len(comparisons)
    if not comparisons:
        raise UserError(f"{folder}: no comparisons of split {split!r} ({stats}): add files or use another split")
    return comparisons


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """("path:line", object) for each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # no JSON or no UTF-8
                raise UserError(
                    f"{where}: malformed JSON ({error}): the file is damaged or cut; fetch it again"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: got a {type(row).__name__}, expected a JSON object a line")
            yield where, row


def _text(where: str, row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {value!r}, expected text: remove the line or mend it")
    return value


def _post(where: str, row: dict, summary: str) -> Post:
    id, subreddit, title, post = (_text(where, row, name) for name in ("id", "subreddit", "title", "post"))
    return Post(id, subreddit, title, post, summary)


def _comparison(where: str, row: dict) -> Comparison:
    summaries, choice, split = row.get("summaries"), row.get("choice"), row.get("split")
    if not (isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, dict) for s in summaries)):
        raise UserError(
            f"{where}: summaries is {str(summaries)[:60]}, expected exactly two objects with text and policy"
        )
    if type(choice) is not int or choice not in (0, 1):
        raise UserError(f"{where}: choice is {choice!r}, expected 0 or 1, the index of the preferred summary")
    if split not in ("train", "valid", "valid1", "valid2"):
        raise UserError(f"{where}: split is {split!r}, expected train, valid1 or valid2")
    extra = row.get("extra") or {}
    confidence = extra.get("confidence") if isinstance(extra, dict) else extra
    if confidence is not None and type(confidence) is not int:
        raise UserError(f"{where}: extra.confidence is {confidence!r}, expected a whole number from 1 to 9 or null")
    chosen, rejected = summaries[choice], summaries[1 - choice]
    return Comparison(
        post=_post(where, row["info"], summary=""),
        chosen=_text(where, chosen, "text"),
        rejected=_text(where, rejected, "text"),
        chosen_policy=str(chosen.get("policy")),
        rejected_policy=str(rejected.get("policy")),
        batch=str(row.get("batch")),
        split=split,
        confidence=confidence,
        worker=str(row.get("worker")),
    )
