"""OpenAI's TL;DR data, as published (Stiennon et al. 2020; N+ details 1 and section 2):

    python -m nanorlhf download                  posts and comparisons into data/openai, about 0.8 GB
    python -m nanorlhf download --data DIR       elsewhere
    python -m nanorlhf download --only posts     what train_sft.py and train_ppo.py need

A file is whole or absent: it grows under the name <file>.partial, is checked (length, MD5 where the server states it,
JSON, number of rows), and only then takes its name. A broken connection is resumed at its last byte, in this run or in
the next; whatever is there already is not fetched again.
"""

import argparse
import base64
import hashlib
import http.client
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from nanorlhf.data.tldr import json_rows
from nanorlhf.errors import UserError, one_sentence

SOURCE = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
DOWNLOADED = Path("data/openai")
POSTS = {"train": 116_722, "valid": 6_447, "test": 6_553}  # split -> rows
BATCHES = (*(f"batch{n}" for n in (*range(3, 21), 22)), "batch0_cnndm", "cnndm0", "cnndm2", "edit_b2_eval_test")
COMPARISONS = {"train": 92_858, "valid": 86_086}  # of all batches together; valid: everything that is not train
ATTEMPTS = 5  # without a new byte in between; then the next run goes on
PIECE = 2**20
RETRIED = (408, 429, 500, 502, 503, 504)  # statuses that may be gone in a second


class Broken(Exception):
    """A transfer that ended early or was refused for now; worth another attempt."""


def download(data: Path, source: str = SOURCE, only: str | None = None, say: Callable[[str], None] = print) -> None:
    """Fetch what is missing of the posts and the comparisons (only: "posts" or "comparisons").

    Raises UserError naming the file for a server that refuses or keeps breaking off, and for content that is not what
    was published; what is complete by then is kept.
    """
    if only in (None, "posts"):
        for split, rows in POSTS.items():
            path = data / "tldr" / f"{split}.jsonl"
            if fetch(f"{source}/datasets/tldr_3_filtered/{split}.jsonl", path, rows):
                say(f"{path}: {rows:,} posts")
    if only in (None, "comparisons"):
        counts = dict.fromkeys(COMPARISONS, 0)
        for batch in BATCHES:
            path = data / "comparisons" / f"{batch}.json"
            fetch(f"{source}/dataset/comparisons/{batch}.json", path)
            for _, row in json_rows(path):
                counts["train" if row.get("split") == "train" else "valid"] += 1
        if counts != COMPARISONS:
            raise UserError(
                f"{data / 'comparisons'}: {counts} rows, expected {COMPARISONS}: a batch is not the published one, "
                "delete the folder and run the same command again"
            )
        say(f"{data / 'comparisons'}: {counts['train']:,} comparisons to train on, {counts['valid']:,} held out")


def fetch(url: str, path: Path, rows: int | None = None) -> bool:
    """Download one file of JSON lines unless it is there; returns whether it was fetched. rows: how many are published.

    Raises UserError when it cannot be had or is not what was published; then `path` does not exist.
    """
    if path.is_file():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    failures, furthest = 0, _size(partial)
    while True:
        try:
            md5 = _continue(url, partial)
            break
        except Broken as error:
            size = _size(partial)
            failures = 1 if size > furthest else failures + 1
            furthest = max(furthest, size)
            if failures >= ATTEMPTS:
                raise UserError(
                    f"{url}: the download broke off at {size:,} bytes ({error}), expected the whole file: run the same "
                    "command again, it goes on from there"
                ) from None
            time.sleep(_pause(failures))
    try:
        _verify(partial, rows, md5)
    except ValueError as error:
        partial.unlink()
        raise UserError(
            f"{url}: what came is not the published file ({error}): run the same command again, or fetch it by hand "
            f"into {path}"
        ) from None
    os.replace(partial, path)
    return True


def _pause(failures: int) -> float:
    """Seconds before another attempt: 0.5, 1, 2, 4."""
    return 0.5 * 2 ** (failures - 1)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _continue(url: str, partial: Path) -> str | None:
    """Fetch the rest of a file, from its last byte on; returns its MD5 in hex where the server states one.

    Raises Broken when another attempt may help, UserError when not.
    """
    have = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.status != 206:  # from the beginning: nothing was there, or the server does not do ranges
                have = 0
            length = response.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            with open(partial, "ab" if have else "wb") as file:
                bar = tqdm(desc=partial.stem, total=total, initial=have, unit="B", unit_scale=True, delay=1)
                with bar:
                    while piece := response.read(PIECE):
                        file.write(piece)
                        bar.update(len(piece))
                file.flush()
                os.fsync(file.fileno())
            if total is not None and _size(partial) != total:
                raise Broken(f"{_size(partial):,} of {total:,} bytes came")
            of_all = "Content-MD5" if response.status == 200 else "x-ms-blob-content-md5"  # of a part it is the part's
            md5 = response.headers.get(of_all)
            return base64.b64decode(md5).hex() if md5 else None
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the file was whole when the last run ended
            return None
        if error.code in RETRIED:
            raise Broken(f"status {error.code}") from None
        fix = "check the network's proxy, or fetch it by hand" if error.code in (401, 403, 407) else "fetch it by hand"
        raise UserError(
            f"{url}: the server answers {error.code} {error.reason}, expected the file: {fix} into "
            f"{partial.with_name(partial.stem)}"
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise Broken(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _verify(path: Path, rows: int | None, md5: str | None) -> None:
    """Raise ValueError saying what is wrong with a file that has come (UserError is one)."""
    if md5 is not None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise ValueError(f"its MD5 is {found}, the server's {md5}")
    count = sum(1 for _ in json_rows(path))
    if count == 0 or rows is not None and count != rows:
        raise ValueError(f"{count:,} rows" + (f", expected {rows:,}" if rows is not None else ""))


def main(argv: list[str] | None = None) -> None:
    """The command line of `python -m nanorlhf download`."""
    parser = argparse.ArgumentParser(
        prog="python -m nanorlhf download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DOWNLOADED, help=f"folder to write to (default {DOWNLOADED})")
    parser.add_argument("--only", choices=["posts", "comparisons"], help="fetch only these")
    parser.add_argument("--source", default=SOURCE, help="address that holds datasets/ and dataset/, for a mirror")
    args = parser.parse_args(argv)
    with one_sentence("the same command again goes on"):
        download(args.data, args.source, args.only)
    print(
        f"next    python train_sft.py --data {shlex.quote(str(args.data))}"
        + (" (found by itself)" if args.data == DOWNLOADED else "")
    )
