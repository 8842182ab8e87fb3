"""The keys of LoRA: which modules are adapted, and how. Imports no torch, so that help can list them at once."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

SCOPES = {
    "language": "language_model.model.",
    "vision": "vision_tower.vision_model.",
    "connector": "multi_modal_projector.",
}
LANGUAGE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def known_method(method: str) -> str:
    """The method, if there is one of that name.

    Raises:
        ValueError: there is none.
    """
    if method != "lora":
        # Only now, for it imports torch, and by name, because it imports this file.
        methods = importlib.import_module("finetune.lora.linear").METHODS
        if method not in methods:
            raise ValueError(f"got {method!r}; expected {' or '.join(methods)}")
    return method


# Pydantic checks these limits key by key where a configuration is read, and LoRAConfig itself where Python makes one.
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0)]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how. A target is SCOPE.COMPONENT...: a scope (language, vision or connector), then whole
    components of the module's path in order, the last one being its name, or `*` for every name:
    `language.q_proj`, `language.17.*`, `vision.layers.26.fc1`, `connector.linear`.
    """

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # noqa: RUF012 (pydantic reads it)

    rank: Rank = 16
    """Rank r of the update B A."""
    alpha: Alpha = 16.0
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora."""
    targets: tuple[str, ...] = tuple(f"language.{name}" for name in LANGUAGE_LINEARS)
    """Linears to adapt, each SCOPE.COMPONENT such as language.q_proj or vision.*; scopes: language, vision,
    connector.
    """
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input element of the low-rank branch is dropped in training."""
    rslora: bool = False
    """Rank-stabilised scaling alpha / sqrt(rank)."""
    rank_pattern: Mapping[str, Rank] = dataclasses.field(default_factory=dict)
    """Another rank for some of the targets, keyed as targets are; the last match counts."""
    alpha_pattern: Mapping[str, Alpha] = dataclasses.field(default_factory=dict)
    """Another alpha for some of the targets, keyed as targets are; the last match counts."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full, in fp32, without a low-rank form, named as targets are, such as connector.linear. The
    name is PEFT's.
    """
    start_from: str | None = None
    """Directory of an adapter, or of a run, to start from: rank, targets and all else that is not given here are that
    adapter's. null: a new one.
    """

    method: Annotated[str, AfterValidator(known_method)] = "lora"
    """How targets are adapted: lora, or another method that was registered."""

    def __post_init__(self) -> None:
        known_method(self.method)
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"{name}: got {rank}; expected rank >= 1")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not alpha > 0:
                raise ValueError(f"{name}: got {alpha}; expected alpha > 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; expected 0 <= dropout < 1")
