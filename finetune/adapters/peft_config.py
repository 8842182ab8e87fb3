"""PEFT's adapter_config.json: what its settings select, by PEFT's own rules, and the one that describes our adapters.

Rules are those of PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`, `_set_trainable`). What is written
selects the same modules in all three layouts of module paths: `target_modules` is a regular expression.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from finetune.lora.protocol import AdapterModule, AdapterSettings, adapters

# Our path -> the path that each version of transformers gives the module. The 4.57 form is the one written.
LAYOUTS: dict[str, Callable[[str], str]] = {
    "transformers 4.57": lambda path: "model." + path.replace("language_model.model.", "language_model."),
    "transformers 5": lambda path: "model." + re.sub(r"(language_model\.)model\.|vision_model\.", r"\1", path),
    "transformers < 4.52": lambda path: path,
}
WRITTEN = LAYOUTS["transformers 4.57"]

# Values under which settings of PEFT's LoraConfig that are not implemented change nothing; of those not listed, UNSET.
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) also change the base weights.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
UNSET: tuple[Any, ...] = (None, False, [], {})
# Where an adapter comes from and how it is trained: nothing of what it computes.
WITHOUT_EFFECT = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
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
    return type(value) is int and 1 <= value < 2**20


def is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0


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
    "layers_to_transform": lambda value: is_layer(value) or (isinstance(value, list) and all(map(is_layer, value))),
    "layers_pattern": lambda value: isinstance(value, str) or are_texts(value),
    "rank_pattern": lambda value: isinstance(value, dict) and all(map(is_rank, value.values())),
    "alpha_pattern": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
    "use_rslora": lambda value: isinstance(value, bool),
    "lora_dropout": lambda value: is_number(value) and 0 <= value < 1,
}
REQUIRED = ("r", "lora_alpha", "target_modules")


def peft_config(model: nn.Module) -> dict[str, Any]:
    """The `adapter_config.json` that describes the adapters in `model`."""
    modules = {path: adapter.settings for path, adapter in adapters(model) if adapter.settings}
    full = [path for path, adapter in adapters(model) if adapter.settings is None]
    first = next(iter(modules.values()), AdapterSettings(rank=1, alpha=1))
    rank = most_common([settings.rank for settings in modules.values()] or [1])
    alpha = most_common([settings.alpha for settings in modules.values()] or [1])
    every_linear = [path for path, module in model.named_modules() if is_linear(module)]
    return {
        "peft_type": next((adapter.method for _, adapter in adapters(model) if adapter.method), "lora").upper(),
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": target_regex(list(modules), every_linear),
        "rank_pattern": {in_any_layout(path): a.rank for path, a in modules.items() if a.rank != rank},
        "alpha_pattern": {in_any_layout(path): a.alpha for path, a in modules.items() if a.alpha != alpha},
        "modules_to_save": [common_ending(path) for path in full] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
    }


def is_linear(module: nn.Module) -> bool:
    return issubclass(module.base_class if isinstance(module, AdapterModule) else type(module), nn.Linear)


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
    alternatives = [
        rf".*{tower}.*" + (rf"\.layers\.({'|'.join(layers)})\..*" if layers else "") + rf"\.({'|'.join(sorted(names))})"
        for (tower, layers), names in by_layers.items()
    ]
    regex = alternatives[0] if len(alternatives) == 1 else "|".join(f"({one})" for one in alternatives)
    for layout in LAYOUTS.values():
        selected = [path for path in every_linear if re.fullmatch(regex, layout(path))]
        assert sorted(selected) == sorted(paths), f"{regex} selects {selected} instead of {paths}"
    return regex


def split(path: str) -> tuple[str, str, str]:
    """Tower, layer number ("" outside the layers) and name of a module."""
    layer = re.search(r"\.layers\.(\d+)\.", path)
    return path.split(".", 1)[0], layer[1] if layer else "", path.rsplit(".", 1)[1]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a configuration of PEFT selects, under the paths of one layout.

    Attributes:
        linears: settings of the linears to adapt. full: modules to be trained in full.
    """

    linears: dict[str, AdapterSettings]
    full: list[str]


def select_by_peft(modules: Mapping[str, nn.Module], config: dict[str, Any], layout: Callable[[str], str]) -> Selection:
    """By PEFT's rules, where each of our paths is called `layout(path)`.

    modules: those that hold parameters, by our path.
    """
    names = {path: layout(path) for path in modules}
    saved, excluded = config.get("modules_to_save") or [], config.get("exclude_modules") or []
    linears = {}
    for path, name in names.items():
        if (
            isinstance(modules[path], nn.Linear)
            and is_targeted(name, config)
            and not is_listed(name, excluded)
            and not any(re.match(rf"(^|.*\.){pattern}($|\..*)", name) for pattern in saved)
        ):
            linears[path] = AdapterSettings(
                pattern_value(config.get("rank_pattern"), name, config["r"]),
                float(pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])),
                bool(config.get("use_rslora")),
                float(config.get("lora_dropout") or 0.0),
            )
    return Selection(linears, [path for path, name in names.items() if is_saved(name, saved)])


def is_targeted(name: str, config: dict[str, Any]) -> bool:
    """By `target_modules`, and where those are a list by `layers_to_transform`: the first number in the path counts."""
    targets, layers = config["target_modules"] or [], config.get("layers_to_transform")
    if not is_listed(name, targets):
        return False
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return True
    pattern = config.get("layers_pattern") or []
    containers = [pattern] if isinstance(pattern, str) else pattern
    expressions = [rf"(?:^|.*?\.){container}\.(\d+)\." for container in containers] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(expression, name) for expression in expressions) if match), None)
    return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])


def is_listed(name: str, names: str | list[str]) -> bool:
    """A string is a regular expression for the whole path, a list holds endings of whole components."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == listed or name.endswith(f".{listed}") for listed in names)


def is_saved(name: str, endings: list[str]) -> bool:
    """Whether `modules_to_save` holds the ending of a module's path, or of a module's around it, letter by letter."""
    components = name.split(".")
    paths = [".".join(components[:count]) for count in range(1, len(components) + 1)]
    return any(path.endswith(ending) for path in paths for ending in endings)


def pattern_value(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The first key that matches the end of the path, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
