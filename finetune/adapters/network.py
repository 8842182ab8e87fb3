"""The network that an adapter was trained on, where that is not the checkpoint's: with another connector, at another
resolution, or with tiles. `adapter_config.json` says so under the key "network", and whoever opens the adapter follows.

PEFT cannot build such a network, and would ignore the key with a warning: the `peft_type` of such an adapter is one
that PEFT does not know.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.metadata import CONFIG_FILE
from finetune.lora.protocol import AdapterModule
from model import PaliGemma, PaliGemmaConfig
from model.convert import apply_changes, changes_of, described, require_changes

NETWORK, OPENS_IN = "network", "opens_in"  # keys in adapter_config.json
ON_CHANGED_NETWORK = "_ON_CHANGED_NETWORK"  # ending of peft_type there


def with_network(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """An adapter's configuration with what it has to say of the network: nothing where it is the checkpoint's."""
    changes = network_of(model) if isinstance(model, PaliGemma) else {}
    if not changes:
        return config
    opens_in = "this toolkit alone: PEFT cannot make the network that the key network describes"
    return config | {"peft_type": config["peft_type"] + ON_CHANGED_NETWORK, OPENS_IN: opens_in, NETWORK: changes}


def network_of(model: PaliGemma) -> dict[str, Any]:
    """What was changed since the checkpoint was opened, and which connector it is where all of that is trained."""
    found, connector = changes_of(model), model.config.connector
    modules = model.multi_modal_projector.modules()
    holders = [module for module in modules if any(True for _ in module.parameters(recurse=False))]
    if connector.kind != "linear" and all(isinstance(m, AdapterModule) and m.settings is None for m in holders):
        found.setdefault("connector", dataclasses.asdict(connector))
    return found


def without_network(file: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration as it would be on the checkpoint's own network, and the changes of the network.

    Raises:
        ValueError: the changes are none, or `peft_type` says otherwise.
    """
    kind = config.get("peft_type")
    marked = isinstance(kind, str) and kind.endswith(ON_CHANGED_NETWORK)
    if marked != (NETWORK in config):
        expected = f"peft_type ending in {ON_CHANGED_NETWORK} and the key {NETWORK}, or neither"
        given = f"peft_type {kind!r} and {NETWORK} {config[NETWORK]!r}" if NETWORK in config else f"peft_type {kind!r}"
        raise ValueError(f"{file} has {given}; expected {expected}: take both from where the adapter was saved")
    if not marked:
        return config, {}
    changes = config[NETWORK]
    try:
        require_changes(changes)
    except ValueError as error:
        raise ValueError(f"{file}: {NETWORK}: {error}; take it from where the adapter was saved") from error
    plain = {key: value for key, value in config.items() if key not in (NETWORK, OPENS_IN)}
    return plain | {"peft_type": str(kind).removesuffix(ON_CHANGED_NETWORK)}, changes


def changes_in(adapter: Path) -> dict[str, Any]:
    """What the adapter's network differs in from its checkpoint's. ValueError where that cannot be read."""
    file = adapter / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{file} cannot be read ({reason}): expected the directory of an adapter, or of a run"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {config!r:.50}; expected the configuration of an adapter")
    return without_network(file, config)[1]


def adapted_config(directory: Path, adapter: Path | None) -> PaliGemmaConfig:
    """The dimensions of a checkpoint's network, with the changes that an adapter was trained with.

    Raises:
        ValueError: the checkpoint's or the adapter's configuration cannot be read, or they do not fit each other.
    """
    config = PaliGemmaConfig.from_directory(directory)
    return with_changes(config, changes_in(adapter), adapter) if adapter else config


def with_changes(config: PaliGemmaConfig, changes: Mapping[str, Any], adapter: Path) -> PaliGemmaConfig:
    """A checkpoint's configuration with an adapter's changes. ValueError where they do not fit; names the adapter."""
    try:
        return apply_changes(config, changes)
    except ValueError as error:
        raise ValueError(f"{adapter} does not fit this base: {error}") from error


def require_network(model: nn.Module, adapter: Path, changes: Mapping[str, Any]) -> None:
    """ValueError where `model` is another network than the one that the adapter was trained on; says in what."""
    if not isinstance(model, PaliGemma):
        return
    expected = with_changes(model.opened_config, changes, adapter)
    if expected != model.config:
        here, there = by_key(model.config), by_key(expected)
        differing = [f"{key}: {here[key]}, in the adapter {there[key]}" for key in here if here[key] != there[key]]
        raise ValueError(
            f"{adapter} was trained on another network than this; give it the one it was trained on, or leave out what "
            "says otherwise\n  " + "\n  ".join(differing)
        )


def by_key(config: PaliGemmaConfig) -> dict[str, str | int]:
    """What can be changed of a network, by the keys of a run's configuration."""
    return {
        "model.connector": described(config.connector),
        "connector.start": config.connector.start,
        "connector.seed": config.connector.seed,
        "image.size": config.vision.image_size,
        "image.aspect": config.aspect,
        "image.tiles": config.tiles,
    }


def network_text(config: PaliGemmaConfig) -> str:
    """In words what can be changed of a network."""
    size = config.vision.image_size
    tiles = f", tiles {config.tiles}" if config.tiles > 1 else ""
    return f"the connector {described(config.connector)} and images of {size} pixels, {config.aspect}{tiles}"
