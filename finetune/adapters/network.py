"""The network that an adapter was trained on, where that is not the checkpoint's: with another connector, at another
resolution, or with tiles. `adapter_config.json` says so under the key "network", and whoever opens the adapter follows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.metadata import CONFIG_FILE
from model import PaliGemma, PaliGemmaConfig
from model.convert import apply_changes, changes_of

NETWORK = "network"  # key in adapter_config.json


def network_key(model: nn.Module) -> dict[str, Any]:
    """What adapter_config.json says of the network: nothing where it is the checkpoint's."""
    changes = changes_of(model) if isinstance(model, PaliGemma) else {}
    return {NETWORK: changes} if changes else {}


def changes_in(adapter: Path) -> dict[str, Any]:
    """What the adapter's network differs in from its checkpoint's. ValueError where that cannot be read."""
    file = adapter / CONFIG_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get(NETWORK) or {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}; expected the directory of an adapter, or of a run"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {NETWORK} is {found!r}; expected an object")
    return found


def adapted_config(directory: Path, adapter: Path | None) -> PaliGemmaConfig:
    """The dimensions of a checkpoint's network, with the changes that an adapter was trained with.

    Raises:
        ValueError: the checkpoint's or the adapter's configuration cannot be read, or they do not fit each other.
    """
    config = PaliGemmaConfig.from_directory(directory)
    return with_changes(config, changes_in(adapter), adapter) if adapter else config


def with_changes(config: PaliGemmaConfig, changes: dict[str, Any], adapter: Path) -> PaliGemmaConfig:
    """The configuration with an adapter's changes. ValueError where they do not fit; names the adapter."""
    try:
        return apply_changes(config, changes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{adapter} does not fit this base: {error}") from error
