"""The keys of LoRA: which modules are adapted, and how. Imports no torch, so that help can list them at once."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping

SCOPES = {
    "language": "language_model.model.",
    "vision": "vision_tower.vision_model.",
    "connector": "multi_modal_projector.",
}
LANGUAGE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class SettingError(ValueError):
    """A value that a key of `LoRAConfig` cannot have. keys: its name, then the position in a list or the target that a
    pattern has.
    """

    def __init__(self, keys: tuple[str | int, ...], message: str) -> None:
        super().__init__(f"{'.'.join(map(str, keys))}: {message}")
        self.keys, self.message = keys, message


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how. A target is SCOPE.COMPONENT...: a scope (language, vision or connector), then whole
    components of the module's path in order, the last one being its name, or `*` for every name:
    `language.q_proj`, `language.17.*`, `vision.layers.26.fc1`, `connector.linear`.
    """

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # noqa: RUF012 (pydantic reads it)

    rank: int = 16
    """Rank r of the update B A."""
    alpha: float = 16.0
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora."""
    targets: tuple[str, ...] = tuple(f"language.{name}" for name in LANGUAGE_LINEARS)
    """Linears to adapt, each SCOPE.COMPONENT such as language.q_proj or vision.*; scopes: language, vision,
    connector.
    """
    dropout: float = 0.0
    """Probability with which an input element of the low-rank branch is dropped in training, in [0, 1)."""
    rslora: bool = False
    """Rank-stabilised scaling alpha / sqrt(rank)."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Another rank for some of the targets, keyed as targets are; the last match counts."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Another alpha for some of the targets, keyed as targets are; the last match counts."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full, in fp32, without a low-rank form, named as targets are, such as connector.linear. The
    name is PEFT's.
    """
    start_from: str | None = None
    """Directory of an adapter, or of a run, to start from: rank, targets and all else that is not given here are that
    adapter's. null: a new one.
    """

    method: str = "lora"
    """How targets are adapted: lora, or another method that was registered."""

    def __post_init__(self) -> None:
        if self.method != "lora":
            # Only now, for it imports torch, and by name, because it imports this file.
            methods = importlib.import_module("finetune.lora.linear").METHODS
            if self.method not in methods:
                raise SettingError(("method",), f"got {self.method!r}; expected {' or '.join(methods)}")
        for keys, rank in with_pattern("rank", self.rank, self.rank_pattern).items():
            if rank < 1:
                raise SettingError(keys, f"got {rank}; expected whole number >= 1")
        for keys, alpha in with_pattern("alpha", self.alpha, self.alpha_pattern).items():
            if not alpha > 0:
                raise SettingError(keys, f"got {alpha:g}; expected number > 0")
        if not 0 <= self.dropout < 1:
            raise SettingError(("dropout",), f"got {self.dropout:g}; expected number >= 0, < 1")
        for key, targets in (("targets", self.targets), ("modules_to_save", self.modules_to_save)):
            for number, target in enumerate(targets):
                require_scope((key, number), target)
        for key, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for target in pattern:
                require_scope((key, target), target)


def require_scope(keys: tuple[str | int, ...], target: str) -> None:
    """That a target begins with a scope. Which modules there are only the network knows (`select` in linear.py).

    Raises:
        SettingError: it does not.
    """
    scope, _, component = target.partition(".")
    if scope not in SCOPES or not component:
        meant = f"; did you mean language.{target}?" if target in LANGUAGE_LINEARS else ", such as language.q_proj"
        expected = f"expected SCOPE.COMPONENT with scope {', '.join(SCOPES)}"
        raise SettingError(keys, f"got {target!r}; {expected}{meant}")


def with_pattern(key: str, value: float, pattern: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    """Every value that a key and its pattern give, by where it stands."""
    return {(key,): value, **{(f"{key}_pattern", target): other for target, other in pattern.items()}}
