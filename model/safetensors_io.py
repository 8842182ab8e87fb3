"""Reading safetensors files, single or sharded, without a copy where none is needed.

Files are mapped into memory. Where neither a cast nor another device is in the way, a tensor is the mapped file itself;
otherwise it is copied in chunks into a preallocated one, and each chunk of the file is released at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import operator
import os
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import INSTEAD_OF_QUANTIZED

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PACKED_DTYPES = re.compile("[UI](8|16|32)|F(4|6|8)(_.*)?")  # in which quantised weights are stored
CHUNK = 2**24  # elements copied at a time where a cast or another device is in the way


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, byte offset, dtype, shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def within(self, content: Tensor) -> Tensor:
        """The tensor in the bytes of its file, u8 [bytes], without a copy."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return content[self.offset : self.offset + size].view(self.dtype).view(self.shape)

    def read_into(self, target: Tensor, file: MappedFile) -> None:
        """Fill a contiguous tensor of the same shape, casting to its dtype and device in chunks."""
        flat, size = target.detach().view(-1), self.dtype.itemsize
        for start in range(0, flat.numel(), CHUNK):
            chunk = flat[start : start + CHUNK]
            begin = self.offset + start * size
            end = begin + len(chunk) * size
            content = file.content[begin:end]
            # A tensor may begin at any byte, but a view needs an aligned one.
            chunk.copy_((content.clone() if begin % size else content).view(self.dtype))
            file.release(begin, end)


class MappedFile:
    """A file's bytes, `content`, u8 [bytes]: read when they are looked at; what is written to them stays in memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.content = torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self, begin: int, end: int) -> None:
        """Give the memory of these bytes back, where the system can; what was written to them is lost."""
        begin -= begin % mmap.PAGESIZE
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint under its published name, from `model.safetensors` or the shards of its index."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in files if Path(name).name != name]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of shards: {error!r}") from error
        if outside:
            raise ValueError(f"{index} names a file outside its own directory: refused")
    else:
        files = ["model.safetensors"]
    missing = [name for name in files if not os.path.isfile(directory / name)]
    if missing:
        hint = ": it is an adapter, give its base" if (directory / "adapter_config.json").exists() else ""
        raise ValueError(f"{directory} lacks {', '.join(missing)}{hint}")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        for key, tensor in _read_header(directory / name).items():
            if key in tensors:
                raise ValueError(f"{directory}: {key} is in {tensors[key].file.name} and in {name}")
            tensors[key] = tensor
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The safetensors header: 8 bytes of length, then JSON of names, dtypes, shapes and offsets.

    As the format asks, the tensors lie side by side and fill the rest of the file: no gaps, no overlaps.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        packed = {name: entry["dtype"] for name, entry in header.items() if PACKED_DTYPES.fullmatch(entry["dtype"])}
        tensors = {} if packed else _layout(path, header, 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file of floats ({error!r}): copy or download it again"
        ) from error
    if packed:
        name, dtype = next(iter(packed.items()))
        raise ValueError(
            f"{path} is of a quantised checkpoint ({name} is stored in {dtype}); {INSTEAD_OF_QUANTIZED.format('')}"
        )
    return tensors


def _layout(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
    """Where the tensors of a header lie, in a file of `size` bytes that holds them from `start` on."""
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = map(operator.index, entry["data_offsets"])
        dtype, shape = DTYPES[entry["dtype"]], tuple(map(operator.index, entry["shape"]))
        if begin != end or min(shape, default=0) < 0 or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not fit its bytes")
        tensors[name], end = StoredTensor(path, start + begin, dtype, shape), stop
    if start + end != size:
        raise ValueError(f"its tensors end at byte {start + end} of {size}")
    return tensors


def refuse_unreadable(directory: Path) -> None:
    """ValueError where the header of one of the weight files that a directory holds says that it cannot be used."""
    for path in sorted(directory.glob("*.safetensors")):
        if path.name != "adapter_model.safetensors":
            _read_header(path)
