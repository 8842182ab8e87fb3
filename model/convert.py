"""A checkpoint's network with another connector, at another resolution, or with tiles: what `config` says, in place.

What is new starts from what was there: a connector from the published projector (model/connectors.py), the position
embedding by interpolation. Only config.json is needed to know whether a network can be converted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MAX_DIMENSION, ConnectorConfig, PaliGemmaConfig
from model.connectors import Connector, LinearConnector, make_connector, start
from model.paligemma import PaliGemma

KEYS = ("connector", "image_size", "tiles", "aspect")
VALUES: dict[str, Sequence[int | str]] = {  # but for the connector's
    "image_size": range(1, MAX_DIMENSION + 1),
    "tiles": (1, 4),
    "aspect": ("squash", "pad"),
}
POSITIONS, CONNECTOR = "vision_tower.vision_model.embeddings.position_embedding.", "multi_modal_projector."  # names


def changed(
    config: PaliGemmaConfig,
    connector: ConnectorConfig | None = None,
    image_size: int | None = None,
    tiles: int | None = None,
    aspect: str | None = None,
) -> PaliGemmaConfig:
    """The configuration of a network with these changes; None: as it is. A connector that the network has already
    stays, with its values, unless all of it is to be drawn.

    Raises:
        ValueError: a size that is no multiple of the patch size, another connector in place of one that is not the
            published one, one that does not fit, or more image tokens than the decoder has positions.
    """
    size = image_size or config.vision.image_size
    if size % config.vision.patch_size:
        patch = config.vision.patch_size
        raise ValueError(
            f"an image of {size} pixels is no whole number of patches of {patch} pixels: take a multiple of {patch}, "
            f"such as {max(1, round(size / patch)) * patch}"
        )
    if connector is None or (dims(connector) == dims(config.connector) and connector.start == "pretrained"):
        connector = config.connector
    if dims(connector) != dims(config.connector) and config.connector.kind != "linear":
        raise ValueError(
            f"the checkpoint has the connector {described(config.connector)}, in whose place {described(connector)} "
            "cannot be put: name the checkpoint's own, or take a base with the published connector"
        )
    found = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=size),
        connector=connector,
        tiles=tiles or config.tiles,
        aspect=aspect or config.aspect,
    )
    if found.num_image_tokens >= config.text.max_position_embeddings:
        raise ValueError(
            f"an image would take {found.num_image_tokens:,} tokens ({size} pixels, tiles {found.tiles}, connector "
            f"{described(connector)}), and the decoder has {config.text.max_position_embeddings:,} positions: take "
            "smaller images, no tiles, or a connector that makes fewer tokens, such as resampler"
        )
    return found


def dims(connector: ConnectorConfig) -> tuple[object, ...]:
    """What of a connector's configuration its parameters depend on."""
    own = {"resampler": ("latents", "depth"), "pixel_shuffle": ("factor",)}.get(connector.kind, ())
    return connector.kind, *(getattr(connector, name) for name in own)


def described(connector: ConnectorConfig) -> str:
    """Its kind, and the numbers that belong to it."""
    kind, *numbers = dims(connector)
    return f"{kind} ({', '.join(map(str, numbers))})" if numbers else str(kind)


def changes_of(model: PaliGemma) -> dict[str, Any]:
    """What `convert` changed since the network was opened, in JSON's types, to be given to `apply_changes`."""
    now, before = (
        {**vars(config), "image_size": config.vision.image_size} for config in (model.config, model.opened_config)
    )
    found = {key: now[key] for key in KEYS if now[key] != before[key]}
    return {key: dataclasses.asdict(value) if key == "connector" else value for key, value in found.items()}


def apply_changes(config: PaliGemmaConfig, changes: Mapping[str, Any]) -> PaliGemmaConfig:
    """The configuration after these changes. ValueError where they are not what `changes_of` gives, or do not fit."""
    if changes == {}:
        return config
    require_changes(changes)
    rest = {key: value for key, value in changes.items() if key != "connector"}
    connector = ConnectorConfig.from_dict(changes["connector"]) if "connector" in changes else None
    return changed(config, connector, **rest)


def require_changes(changes: object) -> None:
    """ValueError where `changes` are not what `changes_of` gives of a network that was changed."""
    if not isinstance(changes, Mapping) or not changes or changes.keys() - set(KEYS):
        raise ValueError(f"the changes are {changes!r}; expected an object with some of {', '.join(KEYS)}")
    if "connector" in changes and not isinstance(changes["connector"], Mapping):
        raise ValueError(f"the connector is {changes['connector']!r}; expected an object")
    ConnectorConfig.from_dict(changes.get("connector", {}))
    for key, expected in VALUES.items():
        value = changes.get(key, expected[0])
        if value not in expected or isinstance(value, bool) or not isinstance(value, int | str):
            one_of = f"1 to {MAX_DIMENSION}" if isinstance(expected, range) else " or ".join(map(str, expected))
            raise ValueError(f"{key} is {value!r}; expected {one_of}")


def convert(model: PaliGemma, config: PaliGemmaConfig) -> Callable[[], None]:
    """Make `model` what `config` says (one that `changed` gave); returns what takes it back."""
    embeddings, before, replaced = model.vision_tower.vision_model.embeddings, model.config, model.replaced
    kept = (model.multi_modal_projector, embeddings.position_embedding, embeddings.image_size)

    def undo() -> None:
        model.multi_modal_projector, embeddings.position_embedding, embeddings.image_size = kept
        model.config, model.replaced = before, replaced

    if config.vision.image_size != before.vision.image_size:
        model.replaced = values_within(model, POSITIONS) | model.replaced
        old = embeddings.position_embedding
        weight = interpolated(old.weight.detach(), config.vision.num_patches)
        embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=not old.weight.requires_grad)
        embeddings.image_size = config.vision.image_size
    if config.connector != before.connector:
        if not any(name.startswith(CONNECTOR) for name in model.replaced):
            model.replaced = values_within(model, CONNECTOR) | model.replaced
        model.multi_modal_projector = replacement(model.multi_modal_projector, config)
    model.config = config
    return undo


def values_within(model: PaliGemma, prefix: str) -> dict[str, Tensor]:
    """The parameters whose names begin so, in host memory."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if name.startswith(prefix)}


def replacement(old: Connector, config: PaliGemmaConfig) -> Connector:
    """The connector of `config`, filled, to stand where `old` stood."""
    like = next(old.parameters())
    with torch.device("meta"):
        connector = make_connector(config).to(like.dtype)
    connector = connector.to_empty(device=like.device).train(old.training)
    start(connector, config, old.linear if isinstance(old, LinearConnector) else None)
    return connector.requires_grad_(like.requires_grad)


def interpolated(positions: Tensor, num_patches: int) -> Tensor:
    """A position embedding [N, D] of a square of patches for another one: bicubic, without antialiasing, in fp64."""
    side, wanted = round(len(positions) ** 0.5), round(num_patches**0.5)
    grid = positions.to("cpu", torch.float64).unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, s, s)
    resized = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False, antialias=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(positions)  # (N', D)
