"""Published checkpoints: where they are, which layout they have, and reading and writing their tensors.

Files are safetensors, single or sharded. Every known key layout is mapped to the names of the hub's checkpoint, which
are also ours. Loading is strict in both directions: only a tied `lm_head.weight` and the unused vision head may differ.
Files are mapped: where neither a cast nor another device is in the way, tensors are the mapped file itself; else they
are copied in parts into preallocated ones, and each part of the file is forgotten at once.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import mmap
import operator
import os
import re
import shutil
import struct
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import INSTEAD_OF_QUANTIZED

if TYPE_CHECKING:
    from model.paligemma import PaliGemma

TIED_HEAD = "lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
SIDE_FILES = ["tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"]
SIDE_FILES += ["*processor_config.json", "generation_config.json", "chat_template.json", "chat_template.jinja"]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PACKED_DTYPES = re.compile("[UI](8|16|32)|F(4|6|8)(_.*)?")  # in which quantised weights are stored
PART = 2**24  # elements copied at a time where a cast or another device is in the way


def fetch(path_or_hub_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The local directory of a checkpoint; a Hub id (`owner/name`) is downloaded to the Hub's cache first, without
    `weights` its small files alone: config.json, tokenizer and processor.

    Raises:
        ValueError: no such directory, or the Hub does not give it out; says what to do.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        if revision is not None:
            warnings.warn(f"{path} is a directory: revision {revision!r}, of a Hub id, has no effect", stacklevel=2)
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) or path.parts[0] in (".", ".."):
        raise ValueError(
            f"{path_or_hub_id} is neither a directory nor a Hub id (owner/name): correct the path, or give the Hub id"
        )
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{path_or_hub_id}"
    wanted = ["config.json", *SIDE_FILES]
    if weights:
        wanted += ["*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(str(path_or_hub_id), revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        reason = f"its licence must be accepted first: log in at {page}, accept it, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}: see the branches at {page}/tree/main"
    except errors.RepositoryNotFoundError:
        reason = (
            f"neither a directory here nor a model on the Hub, unless a private one: correct the name ({page}), or run "
            "`hf auth login`"
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise ValueError(f"{path_or_hub_id} cannot be written to the Hub's cache ({error}); see HF_HOME") from error
        reason = (
            f"no directory here, and neither in the Hub's cache nor to be had from it ({type(error).__name__}). Accept "
            f"the licence at {page}, run `hf auth login` and start again with a network, or give the directory of a "
            "checkpoint"
        )
    raise ValueError(f"{path_or_hub_id}: {reason}")


def canonical_name(name: str) -> str | None:
    """The hub layout's name of a parameter or module in any known layout; None for the unused vision head.

    >>> canonical_name("model.language_model.layers.0.mlp.up_proj.weight")
    'language_model.model.layers.0.mlp.up_proj.weight'
    >>> canonical_name("vision_tower.encoder.layers.0.mlp.fc1.weight")
    'vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight'
    """
    name = name.removeprefix("model.")
    if name == f"language_model.{TIED_HEAD}":
        return TIED_HEAD
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    name = re.sub(r"^language_model\.(?!model\.)", "language_model.model.", name)
    return None if name.startswith("vision_tower.vision_model.head.") else name


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
        """Fill a contiguous tensor of the same shape, casting to its dtype and device in parts."""
        flat, size = target.detach().view(-1), self.dtype.itemsize
        for start in range(0, flat.numel(), PART):
            part = flat[start : start + PART]
            begin = self.offset + start * size
            end = begin + len(part) * size
            content = file.content[begin:end]
            # A tensor may begin anywhere, but not be looked at there.
            part.copy_((content.clone() if begin % size else content).view(self.dtype))
            file.forget(begin, end)


class MappedFile:
    """A file's bytes, `content`, u8 [bytes]: read when they are looked at; what is written to them stays in memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.content = torch.frombuffer(self._map, dtype=torch.uint8)

    def forget(self, begin: int, end: int) -> None:
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


def load_weights(model: nn.Module, directory: Path, device: str | torch.device) -> None:
    """Bring `model`, which takes no memory yet (meta), to `device` with every parameter from a checkpoint, strictly.

    Raises:
        ValueError: lists all missing, unexpected and mis-shaped names; or an output head that is not the embedding.
    """
    stored: dict[str, StoredTensor] = {}
    twice = []
    for key, tensor in stored_tensors(directory).items():
        name = canonical_name(key)
        if name in stored:
            twice.append(f"{name} (as {key} too)")
        elif name is not None:
            stored[name] = tensor
    head = stored.pop(TIED_HEAD, None)
    parameters = model.state_dict()
    if problems := mismatches(stored, parameters, {"present twice": twice}):
        raise ValueError(f"{directory} does not fit its config.json:\n{problems}")
    model.to_empty(device=device)
    mapped = cache(MappedFile)
    for name, parameter in model.named_parameters():
        place = stored[name]
        as_it_is = parameter.device.type == "cpu" and parameter.dtype == place.dtype
        if as_it_is and place.offset % place.dtype.itemsize == 0:
            parameter.data = place.within(mapped(place.file).content)
        else:
            place.read_into(parameter, mapped(place.file))
    if head is not None:
        embedding = model.get_parameter(EMBEDDING).cpu()
        other = torch.empty_like(embedding)
        if tied := head.shape == embedding.shape:
            head.read_into(other, mapped(head.file))
        if not tied or not torch.equal(other, embedding):
            raise ValueError(f"{directory}: {TIED_HEAD} differs from the embedding; PaliGemma ties the two")


def mismatches(
    found: Mapping[str, Any], wanted: Mapping[str, Any], others: Mapping[str, list[str]] | None = None, limit: int = 20
) -> str:
    """What is wrong with tensors by name, one line per kind of problem with at most `limit` names; "" for nothing.

    found, wanted: whatever has a `shape`, or shapes. others: further problems, names by kind.
    """
    shapes = [{name: tuple(getattr(t, "shape", t)) for name, t in side.items()} for side in (found, wanted)]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "mis-shaped": [
            f"{name} {list(shapes[0][name])} instead of {list(shape)}"
            for name, shape in shapes[1].items()
            if shapes[0].get(name, shape) != shape
        ],
        **(others or {}),
    }
    return "\n".join(
        f"  {kind} ({len(names)}): {', '.join(names[:limit])}{', ...' if len(names) > limit else ''}"
        for kind, names in problems.items()
        if names
    )


def save(model: PaliGemma, directory: Path) -> None:
    """Write `model` in the hub layout: config.json, model.safetensors, and the side files of `model.source`."""
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    tensors = model.state_dict()
    if problems := mismatches(tensors, expected):
        raise ValueError(
            f"only a plain PaliGemma can be saved as a checkpoint: remove or merge adapters first\n{problems}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if model.source is not None and model.source.resolve() != directory.resolve():
        for path in (path for pattern in SIDE_FILES for path in model.source.glob(pattern)):
            shutil.copyfile(path, directory / path.name)
    config = json.dumps(model.config.to_hf(model.dtype), indent=2) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
    unfinished = directory / "model.safetensors.unfinished"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors leaves it to the owner alone
    os.replace(unfinished, directory / "model.safetensors")
