"""A checkpoint's network with another connector, at another resolution, or with tiles: what `config` says, in place.

What is new starts from what was there: a connector from the published projector (model/connectors.py), the position
embedding by interpolation. Only config.json is needed to know whether a network can be converted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ConnectorConfig, PaliGemmaConfig
from model.connectors import make_connector, start
from model.ops.linear import Linear
from model.paligemma import PaliGemma

KEYS = ("connector", "image_size", "tiles", "aspect")


def changed(
    config: PaliGemmaConfig,
    connector: ConnectorConfig | None = None,
    image_size: int | None = None,
    tiles: int | None = None,
    aspect: str | None = None,
) -> PaliGemmaConfig:
    """The configuration of a network with these changes; None: as it is.

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
    connector = connector or config.connector
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
            f"{described(connector)}), and the decoder has {config.text.max_position_embeddings:,} positions"
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
    if not isinstance(changes, Mapping) or changes.keys() - set(KEYS):
        raise ValueError(f"changes of the network are {changes!r}; expected an object with {', '.join(KEYS)}")
    connector = changes.get("connector")
    if connector is not None and not isinstance(connector, Mapping):
        raise ValueError(f"the connector is {connector!r}; expected an object")
    for key, kind in (("image_size", int), ("tiles", int), ("aspect", str)):
        if key in changes and type(changes[key]) is not kind:
            raise ValueError(f"{key} of the network is {changes[key]!r}; expected {kind.__name__}")
    rest = {key: value for key, value in changes.items() if key != "connector"}
    return changed(config, None if connector is None else ConnectorConfig.from_dict(connector), **rest)


def convert(model: PaliGemma, config: PaliGemmaConfig) -> Callable[[], None]:
    """Make `model` what `config` says (one that `changed` gave); returns what takes it back."""
    embeddings, before = model.vision_tower.vision_model.embeddings, model.config
    kept = (model.multi_modal_projector, embeddings.position_embedding, embeddings.image_size)

    def undo() -> None:
        model.multi_modal_projector, embeddings.position_embedding, embeddings.image_size = kept
        model.config = before

    if config.vision.image_size != before.vision.image_size:
        old = embeddings.position_embedding
        weight = interpolated(old.weight.detach(), config.vision.num_patches)
        embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=not old.weight.requires_grad)
        embeddings.image_size = config.vision.image_size
    if config.connector != before.connector:
        projector = model.multi_modal_projector.get_submodule("linear")
        assert isinstance(projector, Linear), "only the published connector is replaced"
        weight = projector.weight
        with torch.device("meta"):
            connector = make_connector(config).to(weight.dtype)
        model.multi_modal_projector = connector.to_empty(device=weight.device).train(model.training)
        start(model.multi_modal_projector, config, projector)
        model.multi_modal_projector.requires_grad_(weight.requires_grad)
    model.config = config
    return undo


def interpolated(positions: Tensor, num_patches: int) -> Tensor:
    """A position embedding [N, D] of a square of patches for another one: bicubic, without antialiasing, in fp64."""
    side, wanted = round(len(positions) ** 0.5), round(num_patches**0.5)
    grid = positions.to("cpu", torch.float64).unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, s, s)
    resized = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False, antialias=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(positions)  # (N', D)
