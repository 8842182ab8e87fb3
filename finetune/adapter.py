"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Module paths differ between versions of transformers; all three known layouts are read. One is written: tensor keys as
4.57 has them and `target_modules` as a regular expression that selects the same modules in every layout, which 4.57 and
5.x both open. Every tensor must land on a module that the adapter's own configuration names, and every such module must
have its tensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from finetune.durable import require_whole, settle, write_whole
from finetune.fingerprint import fingerprint
from finetune.lora import LoRALinear, TrainedInFull, adapters, put_adapter, trained_in_full, trained_parameters
from finetune.quantize import quantization_of
from model.checkpoint import DTYPES, canonical_name, mismatches

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys in the metadata of the tensors' file.
BASE_QUANTIZATION, BASE_FINGERPRINT, TRAINING = "base_quantization", "base_fingerprint", "training"

# Our path -> the path that each version of transformers gives the module. The 4.57 form is the one written.
LAYOUTS: dict[str, Callable[[str], str]] = {
    "transformers 4.57": lambda path: "model." + path.replace("language_model.model.", "language_model."),
    "transformers 5": lambda path: "model." + re.sub(r"(language_model\.)model\.|vision_model\.", r"\1", path),
    "transformers < 4.52": lambda path: path,
}
WRITTEN = LAYOUTS["transformers 4.57"]

# Values under which settings of PEFT's LoraConfig that are not implemented change nothing; of those not listed, UNSET.
# The initialisations left out (PiSSA, OLoRA, CorDA, LoftQ, ...) also change the base weights.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
UNSET: tuple[Any, ...] = (None, False, [], {})
# Where an adapter comes from and how it is trained: nothing of what it computes.
WITHOUT_EFFECT = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
]


def is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# The settings that are implemented, and the values they may have; all but the first three may be null.
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "r": is_rank,
    "lora_alpha": is_number,
    "target_modules": lambda value: value is None or isinstance(value, str) or are_texts(value),
    "exclude_modules": lambda value: isinstance(value, str) or are_texts(value),
    "modules_to_save": are_texts,
    "rank_pattern": lambda value: isinstance(value, dict) and all(map(is_rank, value.values())),
    "alpha_pattern": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
    "use_rslora": lambda value: isinstance(value, bool),
    "lora_dropout": lambda value: is_number(value) and 0 <= value < 1,
}
REQUIRED = ("r", "lora_alpha", "target_modules")


@dataclasses.dataclass(frozen=True)
class TrainingFacts:
    """How an adapter was trained, as far as its use depends on it; None: not known."""

    step: int | None = None
    """The optimizer step whose weights these are."""
    metric: str | None = None
    """Name of the metric that the run was judged by."""
    metric_value: float | None = None
    """Its value at that step."""
    validation_loss: float | None = None
    """In nats per token, at that step."""
    prompt: str | None = None
    """Prompt of the questions, with {question} where the question goes."""
    max_new_tokens: int | None = None
    """Tokens of the longest answer that was trained, <eos> included."""
    max_text_tokens: int | None = None
    """The most that prefix, newline, suffix and <eos> took together."""

    def __post_init__(self) -> None:
        kinds = {"metric": (str,), "prompt": (str,), "metric_value": (int, float), "validation_loss": (int, float)}
        for name, value in vars(self).items():
            fits = type(value) in kinds.get(name, (int,)) and (isinstance(value, str) or 0 <= abs(value) < math.inf)
            if value is not None and not fits:
                expected = " or ".join(kind.__name__ for kind in kinds.get(name, (int,)))
                raise ValueError(f"{name} is {value!r}; expected {expected}, finite, or null")

    def to_json(self) -> str:
        """What is known, as one JSON object."""
        return json.dumps({name: value for name, value in vars(self).items() if value is not None})

    @classmethod
    def from_json(cls, text: str) -> TrainingFacts:
        """Keys that a later version may add are ignored; ValueError where a value is of another type."""
        try:
            stored = json.loads(text)
        except RecursionError as error:
            raise ValueError(f"nested too deeply: {text:.50}") from error
        if not isinstance(stored, dict):
            raise ValueError(f"got {text:.50}; expected an object")
        return cls(**{field.name: stored.get(field.name) for field in dataclasses.fields(cls)})


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    base: str | None = None,
    revision: str | None = None,
    facts: TrainingFacts | None = None,
) -> None:
    """Write the adapters that `inject_lora` put into `model`; opens in PEFT on the same base. The directory is there
    whole or not at all, with a manifest; one that was there gives way.

    Args:
        base, revision: what the adapter belongs to, a Hub id or a directory: stored as `base_model_name_or_path`.
        facts: how it was trained, stored in the metadata of the tensors' file.

    Raises:
        ValueError: the model has no adapters, or their values are not finite.
    """
    tensors = adapter_tensors(model)
    if not tensors:
        raise ValueError("the model has no adapters to save: inject_lora(model, config) first")
    poisoned = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if poisoned:
        raise ValueError(f"not saved: {len(poisoned)} tensors hold values that are not finite, e.g. {poisoned[0]}")
    config = json.dumps(peft_config(model) | {"base_model_name_or_path": base, "revision": revision}, indent=2) + "\n"
    about = {BASE_FINGERPRINT: fingerprint(model), BASE_QUANTIZATION: quantization_of(model)}
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


def trained_on(directory: str | Path) -> str | None:
    """How the base was kept while the adapter in `directory` was trained: "nf4", or None (unknown for PEFT's files)."""
    kept = metadata_of(Path(directory)).get(BASE_QUANTIZATION)
    if kept not in (None, "nf4"):
        raise ValueError(f"{Path(directory) / WEIGHTS_FILE} says it was trained on a base in {kept!r}; expected nf4")
    return kept


def training_facts(directory: str | Path) -> TrainingFacts:
    """How the adapter in `directory` was trained; nothing is known of PEFT's files.

    Raises:
        ValueError: what is stored cannot be used; names the value.
    """
    try:
        return TrainingFacts.from_json(metadata_of(Path(directory)).get(TRAINING, "{}"))
    except ValueError as error:
        raise ValueError(
            f"{Path(directory) / WEIGHTS_FILE} says in its metadata, under {TRAINING!r}, what cannot be used: {error}"
        ) from error


def metadata_of(directory: Path) -> dict[str, str]:
    """What the tensors' file says of itself, beside the tensors; nothing in PEFT's files."""
    try:
        with safe_open(directory / WEIGHTS_FILE, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory} holds no readable {WEIGHTS_FILE}: {error}") from error


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every trained tensor under its key in the file: fp32, on the CPU.

    PEFT on transformers 5 renames a file's LoRA keys, but looks for modules_to_save under its own paths only: of the
    vision tower's these stand in both layouts.
    """
    tensors = {}
    for name, tensor in trained_parameters(model).items():
        is_lora = name.endswith(("lora_A", "lora_B"))
        for layout in (WRITTEN,) if is_lora else (WRITTEN, LAYOUTS["transformers 5"]):
            tensors[PREFIX + layout(name) + ".weight" * is_lora] = tensor.detach().to("cpu", torch.float32, copy=True)
    return tensors


def peft_config(model: nn.Module) -> dict[str, Any]:
    """The `adapter_config.json` that describes the adapters in `model`."""
    modules = dict(adapters(model))
    first = next(iter(modules.values()), None)
    rank = most_common(adapter.rank for adapter in modules.values()) if first else 1
    alpha = most_common(adapter.alpha for adapter in modules.values()) if first else 1
    every_linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | LoRALinear)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout if first else 0.0,
        "use_rslora": first.rslora if first else False,
        "target_modules": target_regex(list(modules), every_linear),
        "rank_pattern": {in_any_layout(path): a.rank for path, a in modules.items() if a.rank != rank},
        "alpha_pattern": {in_any_layout(path): a.alpha for path, a in modules.items() if a.alpha != alpha},
        "modules_to_save": [common_ending(path) for path, _ in trained_in_full(model)] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
    }


def most_common(values: Iterable[Any]) -> Any:
    counted = list(values)
    return max(counted, key=counted.count)


def in_any_layout(path: str) -> str:
    """A regular expression, anchored at whole components by PEFT, for one module in every layout."""
    tower, rest = path.split(".", 1)
    rest = re.sub(r"^(model|vision_model)\.", "", rest)
    return rf"{tower}\.((vision_)?model\.)?{re.escape(rest)}"


def common_ending(path: str) -> str:
    """How the module's path ends in transformers 4.57 and 5: PEFT compares modules_to_save literally (str.endswith)."""
    return path.replace("language_model.model.", "language_model.").removeprefix("vision_tower.vision_model.")


def target_regex(paths: list[str], every_linear: list[str]) -> str:
    """One regular expression that selects exactly `paths` among the model's linears, in every layout.

    Names that are adapted in all layers stand without layer numbers: what most adapters amount to.
    """
    by_layers: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for tower, name in dict.fromkeys(split(path)[::2] for path in paths):
        adapted = tuple(split(path)[1] for path in paths if split(path)[::2] == (tower, name))
        present = tuple(split(path)[1] for path in every_linear if split(path)[::2] == (tower, name))
        by_layers.setdefault((tower, () if adapted == present else adapted), set()).add(name)
    parts = [
        rf".*{tower}.*" + (rf"\.layers\.({'|'.join(layers)})\..*" if layers else "") + rf"\.({'|'.join(sorted(names))})"
        for (tower, layers), names in by_layers.items()
    ]
    regex = parts[0] if len(parts) == 1 else "|".join(f"({part})" for part in parts)
    for layout in LAYOUTS.values():
        selected = [path for path in every_linear if re.fullmatch(regex, layout(path))]
        assert sorted(selected) == sorted(paths), f"{regex} selects {selected} instead of {paths}"
    return regex


def split(path: str) -> tuple[str, str, str]:
    """Tower, layer number ("" outside the layers) and name of a module."""
    layer = re.search(r"\.layers\.(\d+)\.", path)
    return path.split(".", 1)[0], layer[1] if layer else "", path.rsplit(".", 1)[1]


def load_adapter(model: nn.Module, directory: str | Path) -> list[str]:
    """Put the adapters stored in `directory` into `model` (ours or PEFT's files); returns their paths.

    The base is frozen. The model is untouched when the adapter is refused.

    Raises:
        ValueError: no adapter there, a setting that is not implemented, any tensor missing, unexpected or mis-shaped,
        or the adapter was trained on another base (known of ours only).
    """
    path = Path(directory)
    config, tensors = read_adapter(path)
    if any(adapters(model)) or any(trained_in_full(model)):
        raise ValueError("the model has adapters already: eject_lora(model) first")
    try:
        adapted, full, problems = plan_loading(model, config, tensors)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{path / CONFIG_FILE} holds a value that cannot be used: {error}") from error
    if problems:
        if sizes := other_sizes(model, tensors):
            raise ValueError(f"{path} was made for another base: {sizes}; give the base it was trained on")
        raise ValueError(f"{path} does not fit this model and its own {CONFIG_FILE}:\n{problems}")
    if (trained := metadata_of(path).get(BASE_FINGERPRINT)) and trained != fingerprint(model):
        raise ValueError(
            f"{path} was trained on another base than this, whose weights have other values: give the one it was "
            f"trained on ({config.get('base_model_name_or_path') or 'its name was not kept'})"
        )
    model.requires_grad_(False)
    for name, (rank, alpha) in adapted.items():
        put_adapter(model, name, rank, alpha, bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0.0))
    for name in full:
        model.set_submodule(name, TrainedInFull(model.get_submodule(name)))
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(tensors[name])
    return [*adapted, *full]


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration, checked to be one that is implemented, and tensors under our names: `<path>.lora_A`, ..."""
    settle(path)
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
    ours = (*SETTINGS, *WITHOUT_EFFECT)
    strange = {key: value for key, value in config.items() if key not in ours and value not in NEUTRAL.get(key, UNSET)}
    if strange:
        raise ValueError(f"{path / CONFIG_FILE} asks for what is not implemented here: {strange}")
    unusable = {
        key: config[key]
        for key, is_usable in SETTINGS.items()
        if not (is_usable(config.get(key)) or (config.get(key) is None and key not in REQUIRED))
    }
    if unusable:
        raise ValueError(f"{path / CONFIG_FILE} holds a value that cannot be used: {unusable}")
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{path / WEIGHTS_FILE} holds {key} in {tensor.dtype}; expected one of {', '.join(DTYPES)}"
            )
        name = canonical_name(key.removeprefix(PREFIX)) or key
        name = re.sub(r"\.(lora_[AB])\.weight$", r".\1", name)
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
            name.rsplit(".", 2)[1]: tensor.shape[-1]
            for name, tensor in tensors.items()
            if name.startswith(tower) and name.endswith(".lora_A") and tensor.ndim == 2
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


def plan_loading(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[int, float]], list[str], str]:
    """What to inject: rank and alpha of each linear, modules trained in full; and every problem found, "" for none."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    paired = sorted({name.rsplit(".", 1)[0] for name in tensors if name.endswith((".lora_A", ".lora_B"))})
    present = {name for name in linears if name in paired}
    targeted = closest([selected(list(linears), config, layout) for layout in LAYOUTS.values()], present)
    adapted = {
        name: (
            pattern_value(config.get("rank_pattern"), name, config["r"]),
            float(pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])),
        )
        for name in linears
        if name in targeted
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (rank, _) in adapted.items():
        wanted[f"{name}.lora_A"] = (rank, linears[name].in_features)
        wanted[f"{name}.lora_B"] = (linears[name].out_features, rank)
    full = [name for name, _ in model.named_modules() if is_saved_in_full(name, config)]
    for name in full:
        shapes = model.get_submodule(name).named_parameters(recurse=False)
        wanted |= {f"{name}.{leaf}": tuple(parameter.shape) for leaf, parameter in shapes}
    leaves = {
        name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
    }
    others = {
        "not finite": [name for name, tensor in tensors.items() if not tensor.isfinite().all()],
        "not to be trained in full": [n for n in full if n not in leaves or isinstance(leaves[n], nn.Embedding)],
    }
    return adapted, full, mismatches(tensors, wanted, others)


def selected(paths: list[str], config: dict[str, Any], layout: Callable[[str], str]) -> set[str]:
    """The linears that `target_modules` selects in one layout, by PEFT's rules."""
    targets, excluded = config["target_modules"] or [], config.get("exclude_modules") or []
    return {
        path
        for path in paths
        if is_listed(layout(path), targets)
        and not is_listed(layout(path), excluded)
        and not is_saved_in_full(path, config)
    }


def is_listed(path: str, names: str | list[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds endings of whole components."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_saved_in_full(path: str, config: dict[str, Any]) -> bool:
    patterns = config.get("modules_to_save") or []
    return any(
        re.fullmatch(rf"(.*\.)?({pattern})", layout(path)) for pattern in patterns for layout in LAYOUTS.values()
    )


def closest(candidates: list[set[str]], present: set[str]) -> set[str]:
    """The candidate that differs least: the layout the adapter was written in."""
    return min(candidates, key=lambda candidate: len(candidate ^ present))


def pattern_value(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the path, as a regular expression."""
    for key, value in (pattern or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", layout(path)) for layout in LAYOUTS.values()):
            return value
    return default
