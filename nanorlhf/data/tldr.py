"""TL;DR posts and human comparisons -> queries, responses, pairs (N+ details 1 to 4, 21).

A query is the formatted post, BOS first, cut to a number of tokens without losing its beginning or its end. A response
is one space, the summary, EOS. Both are lists of token ids that are joined as they are and never decoded and encoded
again. Left out: the CNN/DM rows of the comparisons (they are counted), padding (there is none).

    python -m nanorlhf download       fetches OpenAI's files (nanorlhf/data/download.py)

With one post's numbers: docs/walk.md, station 1.
"""

import json
import re
import shlex
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.errors import UserError

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

FRAME = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: "
CLOSING = "\n\nTL;DR:"  # no space at the end: it belongs to the response (N+ detail 2.3)

# Encoding a longer post never gives fewer tokens than a shorter one, up to the few that its last word or two re-merge
# into. `encode_query` searches with this margin, in tokens, so that its answer is the one of the slow rule.
SLACK = 16
# No token of a Llama reaches across a single space between two words, so a text may be encoded in parts that are cut
# there, and the tokens of a shorter post counted from the last such place on.
BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z0-9.,!?]) (?=[A-Za-z])")
PART = 400  # characters
# Tokens of a response that are read, EOS included, wherever one is learned from or scored: what stands in a file of
# samples, or a post's first sentence in a probe of the reward model, has no end of its own. Summaries have about 50.
MAX_RESPONSE = 512


def format_query(subreddit: str, title: str, post: str) -> str:
    """The text of a query, fields raw (N+ detail 2.1)."""
    return FRAME.format(subreddit=subreddit, title=title) + post + CLOSING


def encode_query(tokenizer: Tokenizer, subreddit: str, title: str, post: str, max_length: int) -> list[int]:
    """BOS and the formatted post, at most `max_length` ids in all (N+ detail 2.2).

    While it is too long, the post loses its last newline and what follows, or, where it has none, one character; the
    subreddit, the title and "TL;DR:" stay whole. Raises UserError when it does not fit even with an empty post.
    """
    return fit_query(tokenizer, subreddit, title, post, max_length)[0]


def fit_query(tokenizer: Tokenizer, subreddit: str, title: str, post: str, max_length: int) -> tuple[list[int], int]:
    """`encode_query`, and how many characters of the post are in it."""
    whole = [tokenizer.bos_id, *tokenizer.encode(format_query(subreddit, title, post))]
    if len(whole) <= max_length:
        return whole, len(post)
    return cut_query(tokenizer, subreddit, title, post, max_length)


def cut_query(tokenizer: Tokenizer, subreddit: str, title: str, post: str, max_length: int) -> tuple[list[int], int]:
    """`fit_query` for a post that is known to be too long."""
    length = _fitting_length(tokenizer, FRAME.format(subreddit=subreddit, title=title), post, max_length)
    if length is None:
        empty = 1 + len(tokenizer.encode(format_query(subreddit, title, "")))
        raise UserError(
            f"query: {empty} tokens with an empty post, expected at most max_length {max_length}: its title "
            f"({title[:40]!r}) is too long; drop the post or raise the maximum query length"
        )
    return [tokenizer.bos_id, *tokenizer.encode(format_query(subreddit, title, post[:length]))], length


def _fitting_length(tokenizer: Tokenizer, frame: str, post: str, max_length: int) -> int | None:
    """Characters of a too long post that the rule of detail 2.2 keeps; None when not even 0 fit.

    The rule tries each line end, from the last; then, if not even the first line fits, each character of that line.
    Here both are bisected to a length from which on everything is too long for sure, and walked down as the rule does.
    """
    starts, before = [0], [1]  # where a part of the post begins; tokens before it, BOS and, from the second on, frame
    while before[-1] <= max_length + SLACK and (found := BETWEEN_WORDS.search(post, starts[-1] + PART)):
        part = (frame if len(starts) == 1 else "") + post[starts[-1] : found.start()]
        before.append(before[-1] + len(tokenizer.encode(part)))
        starts.append(found.start())

    def count(length: int) -> int:
        k = max(0, bisect_right(starts, length - 2) - 1)  # the last part that begins with its space and a letter
        return before[k] + len(tokenizer.encode((frame if k == 0 else "") + post[starts[k] : length] + CLOSING))

    newlines = [i for i, character in enumerate(post) if character == "\n"]
    for lengths in (newlines, range(newlines[0] if newlines else len(post))):
        if before[-1] > max_length + SLACK:
            lengths = lengths[: bisect_left(lengths, starts[-1])]
        start = bisect_left(lengths, True, key=lambda length: count(length) > max_length + SLACK)
        for length in reversed(lengths[:start]):
            if count(length) <= max_length:
                return length
    return None


def response_text(summary: str) -> str:
    """The text of a response: one space, the summary. The space is added only where the text does not bring it:
    authors' summaries have none, comparison texts have one (N+ trap T2)."""
    return summary if summary.startswith(" ") else " " + summary


def encode_response(tokenizer: Tokenizer, summary: str) -> list[int]:
    """The response's ids and EOS; no BOS (N+ detail 3). At most MAX_RESPONSE ids."""
    return end_response(tokenizer, tokenizer.encode(response_text(summary)))[0]


def end_response(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], bool]:
    """The ids of `response_text` with EOS, and whether they lost their end to the limit."""
    return [*ids[: MAX_RESPONSE - 1], tokenizer.eos_id], len(ids) >= MAX_RESPONSE


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
            f"data: no {paths[0]} (or {paths[1]}), expected one post a line: get it with "
            f"`python -m nanorlhf download --data {shlex.quote(str(data))}`"
        )
    posts = []
    for where, row in json_rows(path):
        posts.append(_not_empty(where, _post(where, row, summary=_text(where, row, "summary")), "post", "summary"))
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
            f"data: no {folder}/batch*.json, expected one comparison a line: get them with "
            f"`python -m nanorlhf download --data {shlex.quote(str(data))}`"
        )
    stats = ComparisonStats() if stats is None else stats
    comparisons = []
    for path in paths:
        for where, row in json_rows(path):
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


def without_posts_of(train: Sequence[Comparison], held_out: Sequence[Comparison]) -> list[Comparison]:
    """The held-out comparisons about posts that no comparison of the training split is about: one post is in many rows,
    and a split by rows would test what was learned by heart (N+ section 2C.7)."""
    seen = {comparison.post.id for comparison in train}
    return [comparison for comparison in held_out if comparison.post.id not in seen]


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """("path:line", object) for each line that is not blank. Raises UserError for a line that is no JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a thousand brackets
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


def _not_empty(where: str, post: Post, *names: str) -> Post:
    for name in names:
        if not getattr(post, name).strip():
            raise UserError(f"{where}: {name} is empty, expected text: remove the line or fill it in")
    return post


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
        post=_not_empty(where, _post(where, row["info"], summary=""), "post"),
        chosen=_text(where, chosen, "text"),
        rejected=_text(where, rejected, "text"),
        chosen_policy=str(chosen.get("policy")),
        rejected_policy=str(rejected.get("policy")),
        batch=str(row.get("batch")),
        split=split,
        confidence=confidence,
        worker=str(row.get("worker")),
    )
