"""A run that starts from an adapter (`lora.start_from`) instead of a new one: it takes the adapter's shape and values.

Keys of the configuration that are not given are the adapter's. Those that are given must say what the adapter is, but
for dropout, which is a property of the training alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.locate import find_adapter
from finetune.adapters.network import changes_in
from finetune.adapters.peft_config import LAYOUTS, pattern_value
from finetune.adapters.storage import file_parameters, fit_adapter, load_adapter, read_adapter
from finetune.lora.linear import SCOPES, LoRAConfig, inject_lora, remove_lora
from finetune.lora.protocol import AdapterSettings, adapters
from finetune.system.paths import expand
from model import ConnectorConfig, PaliGemma
from model.checkpoint import mismatches
from model.convert import described, dims

SHAPE = ("rank", "alpha", "targets", "rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "dropout")
LORA_TENSOR = re.compile(r"\.lora_[AB]\.weight$")
SHOWN = 3  # contradictions in a message


def complete(section: dict[str, Any]) -> dict[str, Any]:
    """The section `lora` of a configuration, what it leaves open taken from the adapter that it starts from.

    Raises:
        ValueError: there is no adapter, or it cannot be read.
    """
    if all(key in section for key in SHAPE):
        return section  # that of a run, which says all of it, and may outlive the adapter
    return shape_of(find_adapter(Path(expand(section["start_from"])))) | section


def shape_of(adapter: Path) -> dict[str, Any]:
    """What an adapter is, as the keys of SHAPE say it: every module by its whole path."""
    config, tensors = read_adapter(adapter)
    adapted = {LORA_TENSOR.sub("", name): None for name in sorted(tensors) if LORA_TENSOR.search(name)}
    full = {name.rsplit(".", 1)[0]: None for name in sorted(tensors) if not LORA_TENSOR.search(name)}
    ranks = {path: value_at(config.get("rank_pattern"), path, config["r"]) for path in adapted}
    alphas = {path: value_at(config.get("alpha_pattern"), path, config["lora_alpha"]) for path in adapted}
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "targets": [target_of(path) for path in ranks],
        "rslora": bool(config.get("use_rslora")),
        "rank_pattern": {target_of(path): rank for path, rank in ranks.items() if rank != config["r"]},
        "alpha_pattern": {target_of(path): alpha for path, alpha in alphas.items() if alpha != config["lora_alpha"]},
        "modules_to_save": [target_of(path) for path in full],
        "dropout": config.get("lora_dropout") or 0.0,
    }


def network_sections(adapter: Path) -> dict[str, dict[str, Any]]:
    """The network that an adapter was trained on, as the keys of a configuration's sections say it: those that differ
    from the checkpoint's.

    Raises:
        ValueError: the adapter cannot be read.
    """
    changes = changes_in(adapter)
    image = {key.removeprefix("image_"): changes[key] for key in ("image_size", "aspect", "tiles") if key in changes}
    connector = dict(changes.get("connector", {}))
    model = {"connector": connector.pop("kind")} if connector else {}
    return {"model": model, "connector": connector, "image": image}


def value_at(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of one of PEFT's patterns for one of our paths, whichever layout it was written for."""
    found = (pattern_value(pattern, layout(path), None) for layout in LAYOUTS.values())
    return next((value for value in found if value is not None), default)


def target_of(path: str) -> str:
    """The target that names exactly this module."""
    for scope, prefix in SCOPES.items():
        if path.startswith(prefix):
            return f"{scope}.{path.removeprefix(prefix)}"
    raise ValueError(f"the adapter trains {path}, which is in none of {', '.join(SCOPES)}")


def start(model: nn.Module, config: LoRAConfig, seed: int) -> None:
    """Freeze `model` and put the adapters of `config` into it, with the values of those that it starts from, if any.

    Raises:
        ValueError: a target that names nothing; or what it starts from cannot be read, belongs to another base, or is
            not what `config` says: names each contradiction.
    """
    if config.start_from is None:
        inject_lora(model, config, seed)
        return
    require_agreement(model, config)
    load_adapter(model, find_adapter(Path(expand(config.start_from))), config.dropout)


def load_connector(model: PaliGemma, adapter: Path) -> None:
    """Fill what is trained in full of the connector with an adapter's values.

    Raises:
        ValueError: as `connector_tensors`.
    """
    wanted = {name: p for name, p in file_parameters(model).items() if name.startswith(SCOPES["connector"])}
    tensors = connector_tensors(adapter, model.config.connector, wanted)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def connector_tensors(adapter: Path, connector: ConnectorConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter has for the parameters of a connector, by their names in files.

    Raises:
        ValueError: the adapter cannot be read, has another connector, or does not train all of it.
    """
    _, tensors = read_adapter(adapter)
    advice = "name an adapter, or a run, with the same connector, of which all is trained"
    given = changes_in(adapter).get("connector")
    if given and dims(ConnectorConfig.from_dict(given)) != dims(connector):
        raise ValueError(
            f"{adapter}, which connector.start_from names, has the connector "
            f"{described(ConnectorConfig.from_dict(given))}, and model.connector is {described(connector)}: {advice}"
        )
    there = {name: tensor for name, tensor in tensors.items() if name.startswith(SCOPES["connector"])}
    not_finite = [name for name, tensor in there.items() if not tensor.isfinite().all()]
    if problems := mismatches(there, parameters, {"not finite": not_finite}):
        raise ValueError(
            f"{adapter}, which connector.start_from names, does not train the connector {described(connector)}: "
            f"{advice}\n{problems}"
        )
    return there


def require_agreement(model: nn.Module, config: LoRAConfig, named_by: str = "lora.start_from") -> None:
    """That the adapter which `config` starts from fits `model` and is what `config` says, by names and shapes: a
    network on the meta device will do. Which base it was trained on is not looked at.

    named_by: the key of the configuration that names it.

    Raises:
        ValueError: a target that names nothing; or the adapter cannot be read, does not fit, or is not what `config`
            says: names each contradiction.
    """
    assert config.start_from is not None, "there is an adapter to agree with"
    path = find_adapter(Path(expand(config.start_from)))
    _, _, selection = fit_adapter(model, path)
    inject_lora(model, config)
    asked = settings_of(model)
    remove_lora(model)
    there = settings_by_key({**selection.linears, **dict.fromkeys(selection.full)})
    differences = [
        f"{key} at {module}: {'not' if ours is None else ours}, in the adapter {'not' if theirs is None else theirs}"
        for module in sorted(asked.keys() | there.keys())
        for key, ours, theirs in compared(asked.get(module, {}), there.get(module, {}))
    ]
    if differences:
        more = f"\n  and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        advice = "leave out what it says otherwise, and it is taken from the adapter"
        if named_by != "lora.start_from":
            advice = "say what it has, or name another one"
        raise ValueError(
            f"the configuration contradicts the adapter in {path}, which {named_by} names: {advice}\n  "
            + "\n  ".join(differences[:SHOWN])
            + more
        )


def settings_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is trained of each module, by the keys of the configuration that say so."""
    return settings_by_key({path: adapter.settings for path, adapter in adapters(model)})


def settings_by_key(trained: Mapping[str, AdapterSettings | None]) -> dict[str, dict[str, Any]]:
    """The same of settings by path, None where a module is trained in full."""
    found: dict[str, dict[str, Any]] = {}
    for path, settings in trained.items():
        if settings is None:
            found[path] = {"lora.modules_to_save": "trained"}
        else:
            found[path] = {"lora.targets": "adapted", "lora.rank": settings.rank, "lora.alpha": float(settings.alpha)}
            found[path]["lora.rslora"] = settings.rslora
    return found


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key and both values where they differ; the first key alone where one of the two does not train the module so."""
    keys = [*dict.fromkeys((*ours, *theirs))]
    found = [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]
    return found if ours.keys() == theirs.keys() else found[:1]
