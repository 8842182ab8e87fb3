"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Module paths differ between versions of transformers; all three known layouts are read. One is written, which 4.57 and
5.x both open: tensor keys as 4.57 has them (the configuration is in peft_config.py). Every tensor must land
on a module that the adapter's own configuration selects, and every such module must have its tensors.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.adapters.fingerprint import fingerprint
from finetune.adapters.metadata import (
    BASE_FINGERPRINT,
    BASE_QUANTIZATION,
    CONFIG_FILE,
    TRAINING,
    WEIGHTS_FILE,
    TrainingFacts,
    metadata_of,
)
from finetune.adapters.network import changes_in, require_network, with_changes, with_network, without_network
from finetune.adapters.peft_config import (
    LAYOUTS,
    NEUTRAL,
    REQUIRED,
    SETTINGS,
    UNSET,
    WITHOUT_EFFECT,
    WRITTEN,
    Selection,
    peft_config,
    select_by_peft,
    split,
)
from finetune.lora.linear import put_adapter, put_in_full
from finetune.lora.nf4 import NF4Linear, quantization_of
from finetune.lora.protocol import METHODS, AdapterModule, adapters
from finetune.system.atomic import recover, require_whole, write_whole
from model import PaliGemma
from model.checkpoint import canonical_name, mismatches
from model.convert import convert
from model.safetensors_io import DTYPES

PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    base: str | None = None,
    revision: str | None = None,
    facts: TrainingFacts | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write the adapters that `inject_lora` put into `model`; opens in PEFT on the same base, where that was not
    converted. The directory is there whole or not at all, with a manifest; one that was there is replaced.

    Args:
        base, revision: what the adapter belongs to, a Hub id or a directory: stored as `base_model_name_or_path`.
        facts: how it was trained, stored in the metadata of the tensors' file.
        base_fingerprint: of the base, where it was taken before the base's weights were sharded.

    Raises:
        ValueError: the model has no adapters, or their values are not finite.
    """
    tensors = adapter_tensors(model)
    if not tensors:
        raise ValueError("the model has no adapters to save: inject_lora(model, config) first")
    poisoned = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if poisoned:
        raise ValueError(f"not saved: {len(poisoned)} tensors hold values that are not finite, e.g. {poisoned[0]}")
    about_base = {"base_model_name_or_path": base, "revision": revision}
    config = json.dumps(with_network(peft_config(model) | about_base, model), indent=2) + "\n"
    about = {BASE_FINGERPRINT: base_fingerprint or fingerprint(model), BASE_QUANTIZATION: quantization_of(model)}
    about |= {TRAINING: facts.to_json() if facts else None}
    metadata = {"format": "pt"} | {key: value for key, value in about.items() if value}

    def fill(path: Path) -> None:
        (path / CONFIG_FILE).write_text(config, encoding="utf-8")
        (path / WEIGHTS_FILE).write_bytes(serialized(tensors, metadata))

    write_whole(Path(directory), fill, sum(tensor.nbytes for tensor in tensors.values()), replace=True)


def serialized(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes depend on nothing else: the library leaves the order of the metadata to chance."""
    content = save(tensors, metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    return content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(size) + content[8 + size :]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every trained tensor under its key in the file: fp32, on the CPU.

    PEFT on transformers 5 renames a file's LoRA keys, but looks for modules_to_save under its own paths only: of the
    vision tower's these stand in both layouts.
    """
    tensors = {}
    for path, adapter in adapters(model):
        for layout in (WRITTEN,) if adapter.method else (WRITTEN, LAYOUTS["transformers 5"]):
            for name, tensor in named_for_file(adapter).items():
                tensors[f"{PREFIX}{layout(path)}.{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
    return tensors


def load_adapter(model: nn.Module, directory: str | Path, dropout: float | None = None) -> list[str]:
    """Put the adapters stored in `directory` into `model` (ours or PEFT's files); returns their paths.

    The base is frozen, and converted to the network that the adapter was trained on (another connector, resolution or
    tiles), if it is not that yet. The model is untouched when the adapter is refused.

    Args:
        dropout: in further training, instead of the adapter's own.

    Raises:
        ValueError: no adapter there, a setting that is not implemented, any tensor missing, unexpected or mis-shaped,
        or the adapter was trained on another base (known of ours only).
    """
    directory = Path(directory)
    config, tensors = read_adapter(directory)
    undo = convert_for(model, directory)
    try:
        selection = select_modules(model, directory, config, tensors)
        require_base(model, directory, config)
    except BaseException:
        undo()
        raise
    method = config["peft_type"].lower()
    model.requires_grad_(False)
    for path, settings in selection.linears.items():
        dropped = settings.dropout if dropout is None else dropout
        put_adapter(model, path, dataclasses.replace(settings, dropout=dropped), method)
    for path in selection.full:
        put_in_full(model, path)
    with torch.no_grad():
        for name, parameter in file_parameters(model).items():
            parameter.copy_(tensors[name])
    return [*selection.linears, *selection.full]


def convert_for(model: nn.Module, directory: Path) -> Callable[[], None]:
    """Convert a base, as it was opened, to the network that an adapter was trained on; returns what takes it back.

    Raises:
        ValueError: there are adapters already, or the adapter's network cannot be made of this base.
    """
    if any(adapters(model)):
        raise ValueError("the model has adapters already: remove_lora(model) first")
    if not isinstance(model, PaliGemma) or model.config != model.opened_config:
        return lambda: None
    return convert(model, with_changes(model.config, changes_in(directory), directory))


def require_base(model: nn.Module, directory: Path, config: dict[str, Any]) -> None:
    """ValueError where an adapter of ours was trained on a base whose weights have other values."""
    if (trained := metadata_of(directory).get(BASE_FINGERPRINT)) and trained != fingerprint(model):
        raise ValueError(
            f"{directory} was trained on another base than this, whose weights have other values: give the one it was "
            f"trained on ({config.get('base_model_name_or_path') or 'its name was not kept'})"
        )


def fit_adapter(model: nn.Module, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], Selection]:
    """What `read_adapter` reads, and which modules of `model` it adapts: by names and shapes, the base's values are not
    looked at (they may be on the meta device). Nothing is changed.

    Raises:
        ValueError: no adapter there, or it does not fit; as `load_adapter` says.
    """
    config, tensors = read_adapter(directory)
    if any(adapters(model)):
        raise ValueError("the model has adapters already: remove_lora(model) first")
    return config, tensors, select_modules(model, directory, config, tensors)


def select_modules(model: nn.Module, directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Selection:
    """Which modules of `model` an adapter adapts. ValueError where it does not fit."""
    require_network(model, directory, changes_in(directory))
    try:
        selection, problems = plan_loading(model, config, tensors)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{directory / CONFIG_FILE} holds a value that cannot be used: {error}") from error
    if problems:
        if sizes := other_sizes(model, tensors):
            raise ValueError(f"{directory} was made for another base: {sizes}; give the base it was trained on")
        raise ValueError(f"{directory} does not fit this model and its own {CONFIG_FILE}:\n{problems}")
    return selection


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration, checked to be one that is implemented, and tensors by our path and their name in files. What the
    configuration says of the network is left out of it.
    """
    recover(path)
    require_whole(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no {name}: expected an adapter directory")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        stored = load_file(path / WEIGHTS_FILE)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / CONFIG_FILE} is not JSON: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_FILE} is damaged or no safetensors file: {error}") from error
    lacking = {"peft_type", *REQUIRED} - set(config if isinstance(config, dict) else ())
    if lacking:
        raise ValueError(
            f"{path / CONFIG_FILE} lacks {', '.join(sorted(lacking))}: not the configuration of an adapter"
        )
    config, _ = without_network(path / CONFIG_FILE, config)
    require_readable(path / CONFIG_FILE, config, any(key.endswith(".bias") for key in stored))
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{path / WEIGHTS_FILE} holds {key} in {tensor.dtype}; expected one of {', '.join(DTYPES)}"
            )
        name = canonical_name(key.removeprefix(PREFIX)) or key
        if name in tensors and not torch.equal(tensors[name].float(), tensor.float()):
            raise ValueError(f"{path / WEIGHTS_FILE} holds {name} twice, in two layouts and with other values")
        tensors[name] = tensor
    return config, tensors


def other_sizes(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """How the base that an adapter was made for differs from `model` in width or number of layers; "" for in neither.

    Only what the adapter's tensors tell: the width from the inputs of its linears, the layers if it is in all of them.
    """
    found = []
    for tower in ("language_model", "vision_tower"):
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and tower in name]
        widths = {
            name.split(".")[-3]: tensor.shape[-1]
            for name, tensor in tensors.items()
            if name.startswith(tower) and name.endswith(".lora_A.weight") and tensor.ndim == 2
        }
        for name in linears:
            kind, width = name.rsplit(".", 1)[1], model.get_submodule(name).in_features
            if (
                kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
                and widths.get(kind, width) != width
            ):
                found.append(f"its {tower} has hidden size {widths[kind]}, this one's has {width}")
                break
        adapted, present = (
            {split(name)[1] for name in names if name.startswith(tower)} - {""} for names in (tensors, linears)
        )
        if present < adapted == {str(number) for number in range(len(adapted))}:
            found.append(f"its {tower} has {len(adapted)} layers, this one's has {len(present)}")
    return "; ".join(found)


def require_readable(file: Path, config: dict[str, Any], has_biases: bool) -> None:
    """ValueError where a configuration asks for what is not implemented, or holds a value that cannot be used."""
    ours = (*SETTINGS, *WITHOUT_EFFECT)
    strange = {key: value for key, value in config.items() if key not in ours and value not in NEUTRAL.get(key, UNSET)}
    if strange.get("bias") in ("all", "lora_only") and not has_biases:
        del strange["bias"]  # nothing that it applies to has a bias
    if config["peft_type"] not in [name.upper() for name in METHODS]:
        strange = {"peft_type": config["peft_type"]}
    if strange:
        raise ValueError(
            f"{file} asks for what is not implemented here: {strange}. An adapter that PEFT can merge can be used as a "
            "base of its own: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)"
        )
    unusable = {
        key: config[key]
        for key, is_usable in SETTINGS.items()
        if not (is_usable(config.get(key)) or (config.get(key) is None and key not in REQUIRED))
    }
    if unusable:
        raise ValueError(f"{file} holds a value that cannot be used: {unusable}")


def plan_loading(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Selection, str]:
    """What to adapt, in the layout that differs least from the tensors; and every problem found, "" for none."""
    modules = {path: module for path, module in model.named_modules() if any(module.named_parameters(recurse=False))}
    present = {path for name in tensors for path in (name.rsplit(".", 1)[0], name.rsplit(".", 2)[0]) if path in modules}
    selections = [select_by_peft(modules, config, layout) for layout in LAYOUTS.values()]
    selection = min(selections, key=lambda found: len({*found.linears, *found.full} ^ present))
    wanted: dict[str, tuple[int, ...]] = {}
    for path, settings in selection.linears.items():
        linear = modules[path]
        with FakeTensorMode():  # shapes alone: no memory, for any rank
            twin = nn.Linear(int(linear.in_features), int(linear.out_features))
            adapter = METHODS[config["peft_type"].lower()](twin, settings, 0, 0)
        wanted |= {f"{path}.{name}": tuple(p.shape) for name, p in named_for_file(adapter).items()}
    for path in selection.full:
        wanted |= {f"{path}.{name}": tuple(p.shape) for name, p in modules[path].named_parameters(recurse=False)}
    others = {
        "not finite": [name for name, tensor in tensors.items() if not tensor.isfinite().all()],
        "not to be trained in full": [path for path in selection.full if isinstance(modules[path], nn.Embedding)],
        "in NF4, not to be trained in full": [path for path in selection.full if isinstance(modules[path], NF4Linear)],
    }
    return selection, mismatches(tensors, wanted, others)


def named_for_file(adapter: AdapterModule) -> dict[str, nn.Parameter]:
    return {name + adapter.file_suffix: parameter for name, parameter in adapter.adapter_parameters().items()}


def file_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained: `<path>.<name in files>`."""
    return {f"{path}.{name}": p for path, adapter in adapters(model) for name, p in named_for_file(adapter).items()}
