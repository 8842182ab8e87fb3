"""Published checkpoints: key layouts, strict loading and saving.

Every known key layout is mapped to the names of the hub's checkpoint, which are also ours. Loading is strict in both
directions: only a tied `lm_head.weight` and the unused vision head may differ.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.hub import SIDE_FILES
from model.progress import Progress, silent
from model.safetensors_io import MappedFile, StoredTensor, stored_tensors

TIED_HEAD = "lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


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


def load_weights(model: nn.Module, directory: Path, device: str | torch.device, progress: Progress = silent) -> None:
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
    for name, parameter in progress(model.named_parameters(), len(parameters)):
        tensor = stored[name]
        unchanged = parameter.device.type == "cpu" and parameter.dtype == tensor.dtype
        if unchanged and tensor.offset % tensor.dtype.itemsize == 0:
            parameter.data = tensor.within(mapped(tensor.file).content)
        else:
            tensor.read_into(parameter, mapped(tensor.file))
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

    found, wanted: things with a `shape`, or shapes. others: further problems, names by kind.
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


def adjust_image_size(directory: Path, config: Mapping[str, Any]) -> None:
    """Make the processor's files say what config.json says of images, where the network's resolution was changed."""
    size, tokens = config["vision_config"]["image_size"], config["text_config"]["num_image_tokens"]
    wanted = {"size": {"height": size, "width": size}, "image_seq_length": tokens}
    for path in directory.glob("*processor_config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        form = content.get("image_processor", content)
        differing = {key: value for key, value in wanted.items() if form.get(key, value) != value}
        if differing:
            form.update(differing)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(
    directory: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: Path | None,
) -> None:
    """Write config.json, model.safetensors and the side files of the checkpoint at `source` in the hub layout.

    expected: the tensors of a plain PaliGemma; only their names and shapes matter.

    Raises:
        ValueError: lists the names of `tensors` that are not a plain PaliGemma's.
    """
    if problems := mismatches(tensors, expected):
        raise ValueError(
            f"only a plain PaliGemma can be saved as a checkpoint: remove or merge adapters first\n{problems}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if source is not None and source.resolve() != directory.resolve():
        for path in (path for pattern in SIDE_FILES for path in source.glob(pattern)):
            shutil.copyfile(path, directory / path.name)
        adjust_image_size(directory, config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # safetensors puts a new file in place: tensors may lie in the one that is there, mapped into memory.
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # it makes it readable for its owner alone
