"""Files that are complete or absent, whatever moment a process or a machine dies at: written beside, flushed to the
disk, then renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nanorlhf import parallel, sharding

DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PIECE_BYTES = 16 * 2**20  # written and hashed at a time
AHEAD = 16  # pieces that may wait for the hash: what is copied from a GPU at a time is twice that at most, 512 MiB


@contextlib.contextmanager
def atomic_folder(folder: str | Path):
    """A folder that is complete or absent: what is written into the yielded one takes its name only at the end.

    An earlier folder of that name stands aside as <name>.old between the two renames, so a kill never loses both.
    """
    folder = Path(folder)
    partial, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))
    if old.exists() and not folder.exists():  # a save was killed between its renames: the earlier folder is the best
        os.replace(old, folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
    except OSError:  # a full disk: give back what was taken
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)  # the names are on the disk too
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file with plain writes and return its SHA-256, hashed on the way by a second thread.

    The usual writer maps the file into memory, where a full disk is a bus error that kills the process, and wants every
    tensor on the CPU at once. Here a full disk is an OSError with the file's name, and a tensor is copied in pieces.
    Of tensors in parts all processes must ask: they come together one after another, and process 0 writes.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each begins aligned
    if not parallel.first():
        for name in names:
            sharding.whole(tensors[name])
        return ""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, hashing = hashlib.sha256(), deque()
    try:
        with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
            pieces = _pieces([len(text).to_bytes(8, "little") + text], (tensors[name] for name in names))
            for number, piece in enumerate(pieces, start=1):
                hashing.append(hasher.submit(digest.update, piece))
                while piece:
                    piece = piece[file.write(piece) :]  # a write may take less than it is given
                if number % AHEAD == 0:
                    os.fsync(file.fileno())  # the disk works while the second thread hashes, not after it
                    while len(hashing) > AHEAD:
                        hashing.popleft().result()
            for hashed in hashing:
                hashed.result()
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()


def _pieces(first: list[bytes], tensors: Iterable[Tensor]) -> Iterable[memoryview]:
    yield from map(memoryview, first)
    for tensor in tensors:
        flat = sharding.whole(tensor.detach()).contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(PIECE_BYTES):
            yield memoryview(part.cpu().numpy())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
