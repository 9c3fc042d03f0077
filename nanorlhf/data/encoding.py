"""Many posts and comparisons -> token ids: in parallel, and remembered on disk.

116,722 posts take seconds on two cores (`python -m bench.encoding`), and nothing the second time: the result lies in
data/tokens under a name made from the texts, the tokenizer's files, the limit and the code that encodes, ours and its
libraries' versions, so it is never stale; it may be deleted at any time.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import tokenizers
from safetensors.numpy import load, save

from nanorlhf import parallel
from nanorlhf.data.tldr import MAX_RESPONSE, Comparison, Post, cut_query, end_response, format_query, response_text
from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.errors import UserError

CACHE = Path("data/tokens")
CACHED_FROM = 4_000  # rows; fewer are encoded in a second or two
PARALLEL_FROM = 4_000  # rows; starting the workers takes as long as fewer
PIECE = 500  # rows a worker encodes at a time
LIBRARIES = " ".join(f"{library.__name__} {library.__version__}" for library in (sentencepiece, tiktoken, tokenizers))
NAMES = "encoding tldr tokenizer tokenizer_json word_cache added_tokens".split()
CODE = [Path(__file__).with_name(f"{name}.py") for name in NAMES]

Row = tuple[Post, tuple[str, ...]]  # a post, and the responses to it


class TokenLists(Sequence):
    """Lists of token ids in one array: 4 bytes a token, where a list of Python's takes 8 and the numbers themselves.

    lists[i] is a list of ints, as in a list of lists. `lengths` (n,) int64. `truncated`: how many of them lost
    something to a limit.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, truncated: int = 0):
        self.tokens, self.lengths, self.truncated = tokens, lengths, truncated
        self._ends = lengths.cumsum()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        end = int(self._ends[i])
        return self.tokens[end - int(self.lengths[i]) : end].tolist()


Progress = Callable[..., Iterable]  # run.progress: (iterable, total=..., what=...) -> the same items


def encode_posts(
    posts: Sequence[Post], tokenizer: Tokenizer, max_query_length: int, progress: Progress | None = None
) -> tuple[TokenLists, TokenLists]:
    """Posts -> queries, responses: a token list a post, in the posts' order."""
    rows = [(post, (post.summary,)) for post in posts]
    queries, responses = _encode(rows, 1, tokenizer, max_query_length, progress, "encoding posts")
    return queries, responses


def encode_comparisons(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, max_query_length: int, progress: Progress | None = None
) -> tuple[TokenLists, TokenLists, TokenLists]:
    """Comparisons -> queries, chosen, rejected: a token list a comparison, in their order."""
    rows = [(c.post, (c.chosen, c.rejected)) for c in comparisons]
    queries, chosen, rejected = _encode(rows, 2, tokenizer, max_query_length, progress, "encoding comparisons")
    return queries, chosen, rejected


def describe(lengths: Sequence[int], limit: int | None = None) -> dict[str, float]:
    """Mean, 99th percentile and maximum of token counts and, given a `limit`, the share above it: what a cut at the
    limit would touch."""
    if len(lengths) == 0:
        raise UserError("lengths: got none, expected at least one sequence to describe")
    stats = {"mean": float(np.mean(lengths)), "p99": float(np.percentile(lengths, 99)), "max": float(np.max(lengths))}
    return stats if limit is None else stats | {"share_over_limit": float(np.mean(np.asarray(lengths) > limit))}


def length_report(queries: TokenLists, responses: Sequence[TokenLists], response_length: int | None = None) -> str:
    """The lengths with the tokenizer in use, a line for the console; N+ detail 4 gives Pythia's, which differ."""
    query = describe(queries.lengths)
    response = describe(np.concatenate([lists.lengths for lists in responses]), response_length)
    line = (
        f"queries mean {query['mean']:.0f} max {query['max']:.0f}, {queries.truncated / len(queries):.1%} cut; "
        f"responses mean {response['mean']:.0f} p99 {response['p99']:.0f} max {response['max']:.0f}"
    )
    if cut := sum(lists.truncated for lists in responses):
        line += f", {cut:,} of them cut at {MAX_RESPONSE}"
    if response_length is None:
        return line
    return f"{line}, {response['share_over_limit']:.1%} longer than response_length {response_length}"


# ------------------------------------------------------------------------------------------------------------ encoding


def _encode(
    rows: list[Row], texts: int, tokenizer: Tokenizer, max_length: int, progress: Progress | None, what: str
) -> list[TokenLists]:
    """[queries, one TokenLists for each of the `texts` responses of a row], from the cache or anew. Under torchrun
    process 0 encodes what is cached, the others find it; raises UserError where they have other texts."""
    if parallel.on():
        parallel.check_same("data", _fingerprint(rows, tokenizer, max_length))
    with parallel.in_turn():
        return _encode_rows(rows, texts, tokenizer, max_length, progress, what)


def _encode_rows(
    rows: list[Row], texts: int, tokenizer: Tokenizer, max_length: int, progress: Progress | None, what: str
) -> list[TokenLists]:
    path = CACHE / f"{_fingerprint(rows, tokenizer, max_length)}.tokens" if len(rows) >= CACHED_FROM else None
    if path is not None and (found := _load(path)) is not None:
        return found
    ranges = [range(i, min(i + PIECE, len(rows))) for i in range(0, len(rows), PIECE)]
    walk = progress or (lambda items, total, what: items)
    done = list(walk(_pieces(rows, ranges, tokenizer, max_length), total=len(ranges), what=what))
    lists = []
    for column in range(1 + texts):
        tokens = np.concatenate([piece[0][column] for piece in done]) if done else np.zeros(0, np.int32)
        lengths = np.concatenate([piece[1][column] for piece in done]) if done else np.zeros(0, np.int64)
        lists.append(TokenLists(tokens, lengths))
    for column, one in enumerate(lists):
        one.truncated = sum(piece[2][column] for piece in done)
    if path is not None:
        _save(path, lists)
    return lists


def _pieces(rows: list[Row], ranges: list[range], tokenizer: Tokenizer, max_length: int) -> Iterator[tuple]:
    """`_encode_piece` of each range, in order. Workers are forked (as torch's data loader does on Linux), so that they
    have the texts and the tokenizer without a copy; elsewhere, and for few rows, this process does the work."""
    workers = min(_cores(), len(ranges))
    if workers < 2 or len(rows) < PARALLEL_FROM or sys.platform != "linux":
        yield from (_encode_piece(indices, (rows, tokenizer, max_length)) for indices in ranges)
        return
    context = multiprocessing.get_context("fork")
    arguments = dict(initializer=_begin_worker, initargs=(rows, tokenizer, max_length))
    with ProcessPoolExecutor(workers, mp_context=context, **arguments) as pool:
        try:
            yield from pool.map(_encode_piece, ranges)
        except BrokenProcessPool:
            raise UserError(
                "encoding: a worker process was killed, most likely for want of memory: free some, or start the script "
                "with `taskset -c 0`, which leaves it one"
            ) from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


_work: tuple[list[Row], Tokenizer, int] | None = None  # what a worker process works on


def _begin_worker(*work) -> None:
    global _work
    _work = work
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's are for the parent, which stops its workers
        signal.signal(number, signal.SIG_IGN)


def _encode_piece(indices: range, work=None) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """(tokens int32, lengths int64, how many were cut, of each column) of some rows. A column: queries, then each
    response."""
    rows, tokenizer, max_length = work or _work
    columns = 1 + len(rows[indices[0]][1])
    tokens, lengths = [array("i") for _ in range(columns)], [array("q") for _ in range(columns)]
    truncated, part = [0] * columns, [rows[i] for i in indices]
    whole = tokenizer.encode_batch([format_query(post.subreddit, post.title, post.post) for post, _ in part])
    texts = iter(tokenizer.encode_batch([response_text(text) for _, responses in part for text in responses]))
    for (post, responses), ids in zip(part, whole, strict=True):
        query = [tokenizer.bos_id, *ids]
        if len(query) > max_length:
            try:
                query, kept = cut_query(tokenizer, post.subreddit, post.title, post.post, max_length)
            except UserError as error:
                raise UserError(f"post {post.id}: {error}") from None
            truncated[0] += kept < len(post.post)
        ended = [end_response(tokenizer, next(texts)) for _ in responses]
        for column, (ids, cut) in enumerate([(query, False), *ended]):
            truncated[column] += cut
            tokens[column].extend(ids)
            lengths[column].append(len(ids))
    return [np.array(t, np.int32) for t in tokens], [np.array(n, np.int64) for n in lengths], truncated


# --------------------------------------------------------------------------------------------------------------- cache


def _fingerprint(rows: list[Row], tokenizer: Tokenizer, max_length: int) -> str:
    """A name for the result of encoding, from everything that it depends on."""
    digest = hashlib.blake2b(digest_size=16)
    for path in CODE:
        digest.update(Path(path).read_bytes())
    digest.update(f"{LIBRARIES} {tokenizer.fingerprint} {max_length} {len(rows)}".encode())
    for post, responses in rows:
        for text in (post.subreddit, post.title, post.post, *responses):
            digest.update(text.encode("utf-8", "surrogatepass"))
            digest.update(b"\xff")  # a byte that UTF-8 does not have, so that texts cannot run into one another
    return digest.hexdigest()


def _save(path: Path, lists: list[TokenLists]) -> None:
    arrays = {"truncated": np.array([one.truncated for one in lists])}
    for i, one in enumerate(lists):
        arrays |= {f"{i}.tokens": one.tokens, f"{i}.lengths": one.lengths}
    content = save(arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(hashlib.blake2b(content).digest())
            file.write(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path) -> list[TokenLists] | None:
    """What `_save` wrote; None where there is nothing, or something damaged, which is then written anew."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    size = hashlib.blake2b().digest_size
    if hashlib.blake2b(content[size:]).digest() != content[:size]:
        print(f"note    {path} is damaged: encoding again", flush=True)
        return None
    arrays = load(content[size:])
    return [
        TokenLists(arrays[f"{i}.tokens"], arrays[f"{i}.lengths"], int(truncated))
        for i, truncated in enumerate(arrays["truncated"])
    ]
