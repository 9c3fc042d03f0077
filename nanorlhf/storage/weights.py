"""Weights in: from safetensors files straight into a model's parameters, a piece at a time.

A safetensors file is 8 bytes (the header's length), a JSON header (dtype, shape and place of each tensor), and the
tensors' bytes. We read the bytes ourselves, because the usual way maps the file into memory, where every page that was
touched stays resident until the file is closed: Llama-3.2-1B in bf16 then peaks at 2.06 times its size, and read like
this at 1.0 times (`python -m experiments.llama_1b load`).

Our q, k, v and gate, up are one matrix each; in the files they are Hugging Face's separate ones.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from nanorlhf import sharding
from nanorlhf.errors import UserError
from nanorlhf.llama import LlamaConfig
from nanorlhf.storage.model_config import read_json

PIECE_BYTES = 16 * 2**20  # read at a time where a tensor changes dtype or device on its way
LOOKED_AT = 2**22  # numbers at a time, in the search for nan
MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
AGAIN = "copy or download it again"


class TensorFile:
    """One safetensors file. `names` are its tensors'; `read` fills a tensor from it.

    Raises UserError that names the file when it is missing, cut, or does not hold what its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise UserError(f"{path}: not found, expected a file of the model: {AGAIN}") from None
        size = os.fstat(self._file.fileno()).st_size
        try:
            self._entries, self._begin = self._read_header(size)
        except (ValueError, RecursionError) as error:  # also bad JSON and bad UTF-8
            self._file.close()
            raise UserError(f"{path}: not a complete safetensors file ({error}), {AGAIN}") from None

    def _read_header(self, size: int) -> tuple[dict[str, dict], int]:
        """({tensor name: its entry}, where the tensors' bytes begin). Raises ValueError saying what is wrong."""
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{size:,} bytes, with a header of {length:,}")
        header = json.loads(self._file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a JSON {type(header).__name__}")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                first, last = entry["data_offsets"]
                numbers = [first, last, *entry["shape"]]
                well_formed = isinstance(entry["dtype"], str) and all(type(n) is int and n >= 0 for n in numbers)
            except (TypeError, KeyError, ValueError):
                well_formed = False
            if not well_formed:
                raise ValueError(f"the header's entry of {name} is {str(entry)[:80]}")
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            if first != end or last < first:  # the format has neither gaps nor bytes that two tensors share
                raise ValueError(f"{name} has the bytes {first:,} to {last:,}, expected it to begin at {end:,}")
            end = last
        if 8 + length + end != size:
            raise ValueError(f"{size:,} bytes where its header promises {8 + length + end:,}")
        return header, 8 + length

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def read(self, name: str, target: Tensor, rows: int | None = None, first: int = 0) -> None:
        """Fill `target` (any float dtype and device, contiguous) with the tensor, cast. rows: how many the file must
        have, where the target is some of them, from the row `first` on. Raises UserError that names the tensor when it
        has another shape or is no ordinary float."""
        entry = self._entries[name]
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        expected = tuple(target.shape) if rows is None else (rows, *target.shape[1:])
        if shape != expected:
            raise UserError(
                f"{self.path}: tensor {name} has shape {shape}, expected {expected} for the config.json beside it"
            )
        dtype = self._dtype(name)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{self.path}: tensor {name} has {end - begin:,} bytes for shape {shape}, {AGAIN}")
        flat, position = target.view(-1), self._begin + begin + first * math.prod(shape[1:]) * dtype.itemsize
        if not flat.numel():
            return
        if target.device.type == "cpu" and target.dtype == dtype:
            self._fill(flat, position)
            return
        piece = torch.empty(min(PIECE_BYTES // dtype.itemsize, flat.numel()), dtype=dtype)
        for part in flat.split(piece.numel()):
            self._fill(piece[: part.numel()], position)
            part.copy_(piece[: part.numel()])
            position += part.numel() * dtype.itemsize

    def _dtype(self, name: str) -> torch.dtype:
        found = self._entries[name]["dtype"]
        if found not in DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} is {found}, expected {', '.join(DTYPES)}: quantised weights cannot be "
                "trained, take the model they were made from"
            )
        return DTYPES[found]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor's numbers in order, a piece at a time."""
        dtype, (begin, end) = self._dtype(name), self._entries[name]["data_offsets"]
        for start in range(begin, end, PIECE_BYTES):
            piece = torch.empty(min(PIECE_BYTES, end - start) // dtype.itemsize, dtype=dtype)
            self._fill(piece, self._begin + start)
            yield piece

    def _fill(self, flat: Tensor, position: int) -> None:
        """Read a CPU tensor's bytes from a place of the file."""
        view = memoryview(flat.view(torch.uint8).numpy())
        self._file.seek(position)
        while view:
            count = self._file.readinto(view)  # may be less than asked for, above 2 GiB always
            if count == 0:
                raise UserError(f"{self.path}: became shorter while it was read, {AGAIN}")
            view = view[count:]

    def close(self) -> None:
        self._file.close()


def _is_file_name(name) -> bool:
    return isinstance(name, str) and Path(name).name.endswith(".safetensors")


def _read_index(path: Path) -> dict[str, Path]:
    """{tensor: its file} of a model.safetensors.index.json."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
        raise UserError(f"{path}: weight_map is missing or names no files, expected a file for each tensor, {AGAIN}")
    return {name: path.with_name(Path(file).name) for name, file in weight_map.items()}


class TensorFolder:
    """The tensors of a Hugging Face folder: model.safetensors, or shards and their index. A context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[Path, TensorFile] = {}
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        shards = _read_index(index) if index.exists() else {}
        files = set(shards.values())
        if files and single.exists() and all(path.exists() for path in files) and files != {single}:
            raise UserError(
                f"{folder}: holds the weights twice, in {single.name} and in the {len(files)} files that {index.name} "
                "names, expected one of the two: delete the older"
            )
        if files and not single.exists():
            self.where, seen = shards, {}
            for path in sorted(path for path in files if path.exists()):
                for name in self._open(path).names:
                    if name not in shards:
                        raise UserError(f"{path}: holds tensor {name}, which {index.name} does not name, {AGAIN}")
                    if name in seen:
                        raise UserError(f"{path}: holds tensor {name}, as {seen[name].name} does, {AGAIN}")
                    seen[name] = path
        elif single.exists():  # also where an index is left from earlier shards, which are gone
            self.where = dict.fromkeys(self._open(single).names, single)
        else:
            others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth", ".gguf"))
            found = f" (but {others[0]}, which is not read: nothing is unpickled)" if others else ""
            raise UserError(
                f"{folder}: no model.safetensors and no model.safetensors.index.json{found}, expected a Hugging Face "
                "model folder"
            )

    def _open(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._open(self.where[name]).shape(name)

    def read(self, name: str, target: Tensor, rows: int | None = None, first: int = 0) -> None:
        """Fill `target` with a tensor, or with those of its `rows` rows that begin at `first`. Raises UserError that
        names it when it is missing or does not fit."""
        self._file_of(name).read(name, target, rows, first)

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        pieces = zip_longest(self._file_of(name).pieces(name), self._file_of(other).pieces(other))
        return all(a is not None and b is not None and torch.equal(a.double(), b.double()) for a, b in pieces)

    def bounds(self, name: str) -> Tensor:
        """(smallest, largest) of each piece of a tensor, (n, 2); nan where a piece holds one."""
        return torch.stack([torch.stack(piece.aminmax()) for piece in self._file_of(name).pieces(name)])

    def _file_of(self, name: str) -> TensorFile:
        if name not in self.where:
            raise UserError(f"{self.folder}: tensor {name} is missing, expected it for the config.json beside it")
        file = self._open(self.where[name])
        if name not in file.names:
            raise UserError(f"{file.path}: tensor {name} is missing, though the index says that it is here, {AGAIN}")
        return file

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()


def file_tensors(name: str, config: LlamaConfig) -> list[tuple[str, int | None]]:
    """Where a parameter of ours lives in a Hugging Face file: [(tensor name, rows)], in order.

    rows is None for the whole parameter.
    """
    for merged, parts, sizes in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj"), config.qkv_sizes),
        ("gate_up_proj", ("gate_proj", "up_proj"), (config.intermediate_size,) * 2),
    ):
        if merged in name:
            return [(name.replace(merged, part), rows) for part, rows in zip(parts, sizes, strict=True)]
    return [(name, None)]


def file_parts(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, str, Tensor]]:
    """(our name, name in a file, the rows of the parameter that it is) for everything in a model. dtype: cast. Of a
    model in parts every process must ask, and gets the whole of each parameter in turn."""
    for ours, parameter in model.named_parameters():
        if dtype is not None or sharding.is_part(parameter):
            kept = torch.float32 if ours.startswith("score.") else dtype or parameter.dtype
            parameter = sharding.whole(parameter.detach().to(kept))
        begin = 0
        for name, rows in file_tensors(ours, model.config):
            yield ours, name, parameter if rows is None else parameter[begin : begin + rows]
            begin += rows or 0


def own_parts(model: nn.Module) -> Iterator[tuple[str, Tensor, int | None, int]]:
    """(name in a file, where this process keeps its rows of it, how many rows the file has, the first of its own); the
    number of rows is None where it keeps them all."""
    for ours, parameter in model.named_parameters():
        here, (first, last), begin = sharding.local(parameter), sharding.rows(parameter), 0
        for name, rows in file_tensors(ours, model.config):
            end = begin + (len(parameter) if rows is None else rows)
            low, high = max(first, begin), max(first, begin, min(last, end))
            target = here[min(low, last) - first : min(high, last) - first]
            whole = here is parameter or (low, high) == (begin, end)
            yield name, target, None if whole else end - begin, low - begin
            begin = end


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The only tensors that a file may hold and nobody reads: tables of rotary frequencies, which older files of Llama 2
# carry and which config.json says as well.
MAY_BE_LEFT_OUT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def load_weights(model: nn.Module, folder: str | Path, rows: int | None = None) -> None:
    """Fill a model's parameters from a folder, cast to each parameter's dtype. rows: of the embedding in the file,
    where the model has only the first ones of them.

    Raises UserError that names the tensor when one is missing, misshapen, not finite, or in the file but in no
    parameter: a head beside tied embeddings must be equal to them.
    """
    with TensorFolder(Path(folder)) as tensors, torch.no_grad():
        unused = {name for name in tensors.where if not MAY_BE_LEFT_OUT.fullmatch(name)}
        bounds = {}
        for name, part, in_file, first in own_parts(model):
            tensors.read(name, part, rows if name in (EMBEDDING, HEAD) and rows else in_file, first)
            if part.numel():
                bounds[name] = torch.stack([torch.stack(x.aminmax()) for x in part.view(-1).split(LOOKED_AT)])
            unused.discard(name)
        tied = not hasattr(model, "lm_head") and not hasattr(model, "score")
        if tied and HEAD in unused and tensors.equal(HEAD, EMBEDDING):
            unused.discard(HEAD)
    if tied and HEAD in unused:
        raise UserError(
            f"{folder}: {HEAD} differs from {EMBEDDING}, expected the same numbers, because config.json says "
            "tie_word_embeddings true: write false there if the head is meant, or remove the tensor"
        )
    if unused:
        raise UserError(
            f"{folder}: unexpected tensors {sorted(unused)[:4]}, expected exactly those of the config.json beside them"
        )
    check_finite(folder, bounds)


def check_weights(folder: str | Path) -> None:
    """What `load_weights` would say of the numbers in a folder, without a model. Raises UserError for a nan."""
    with TensorFolder(Path(folder)) as tensors:
        check_finite(folder, {name: tensors.bounds(name) for name in tensors.where})


def check_finite(folder: str | Path, bounds: dict[str, Tensor]) -> None:
    """args: bounds: (smallest, largest) of the pieces of each tensor, (n, 2). Raises UserError for a nan or an
    infinity: no score and no summary of such a model is one, which would show only after hours."""
    finite = torch.stack([torch.isfinite(pieces).all() for pieces in bounds.values()]).tolist()  # one wait for a GPU
    bad = [name for name, fine in zip(bounds, finite, strict=True) if not fine]
    if bad:
        values = bounds[bad[0]]
        value = values[~torch.isfinite(values)][0].item()
        more = f" (and {len(bad) - 1} other tensors)" if len(bad) > 1 else ""
        raise UserError(
            f"{folder}: tensor {bad[0]} holds {value}{more}, expected finite numbers: its training went wrong or the "
            "file is damaged; take an earlier checkpoint"
        )
