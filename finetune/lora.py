"""LoRA by hand (arXiv 2106.09685): W x + scale * B (A x), with W frozen and shared, A and B in fp32.

A `LoRALinear` stands where the `Linear` stood and keeps its weight under the same name, so the base's keys never
change. There are no merged or disabled states: `eject_lora` puts the plain modules back. Rank-stabilised scaling is
arXiv 2312.03732. DoRA and PiSSA are not here.

Axes: B batch, S sequence, r rank.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from finetune.lowrank import FrozenProduct, LowRank
from finetune.quantize import NF4Linear, dense

SCOPES = {
    "language": "language_model.model.",
    "vision": "vision_tower.vision_model.",
    "connector": "multi_modal_projector.",
}
LANGUAGE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    train_in_full: tuple[str, ...] = ()
    """Modules trained in full, in fp32, without a low-rank form, keyed as targets are, such as connector.linear."""
    start_from: str | None = None
    """Directory of an adapter, or of a run, to start from: rank, targets and all else that is not given here are that
    adapter's. null: a new one.
    """

    def __post_init__(self) -> None:
        ranks, alphas = (self.rank, *self.rank_pattern.values()), (self.alpha, *self.alpha_pattern.values())
        if min(ranks) < 1 or min(alphas) <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank {ranks}, alpha {alphas}, dropout {self.dropout}: expected rank >= 1, alpha > 0, 0 <= dropout < 1"
            )


class LoRALinear(nn.Module):
    """x [..., in] -> W x + b + scale * B A dropout(x), [..., out] in the dtype of W x.

    Attributes:
        linear: the one it replaces, frozen: plain or NF4. weight, bias: that one's, the same tensors.
        lora_A: fp32 [r, in], uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5). lora_B: fp32 [out, r], zero, so that
            the network starts as the base, bit for bit.
        dropout_rows: i64 [B] or None. When set, the dropout mask of a row is a function of its entry and this module's
            key alone: whatever the batch it sits in, and the same again when the forward pass is recomputed.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, rslora: bool, dropout: float, key: int, seed: int
    ) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple: not a submodule, so base keys stay what they were
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.rslora, self.dropout, self.key = rank, alpha, rslora, dropout, key
        self.scale = alpha / (rank**0.5 if rslora else rank)
        self.dropout_rows: Tensor | None = None
        # Drawn on the CPU: the same start on every device.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
        a = torch.empty(rank, linear.in_features).uniform_(-1, 1, generator=generator) * linear.in_features**-0.5
        self.lora_A = nn.Parameter(a.to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        rows = None
        if self.training and self.dropout > 0:
            rows = self.dropout_rows
            if rows is None:
                rows = torch.randint(2**31, (len(x),)).to(x.device)
            if len(rows) != len(x):
                raise ValueError(f"{len(rows)} dropout rows were set for a batch of {len(x)}")
            rows = rows + self.key
        flat, update = LowRank.apply(x, self.lora_A, self.lora_B, self.bias, self.scale, rows, self.dropout)
        output: Tensor = FrozenProduct.apply(update, flat, self.linear)
        return output.view(*x.shape[:-1], -1)

    @property
    def linear(self) -> nn.Linear:
        return self._linear[0]

    def fold(self) -> Tensor:
        """W + scale * B A, summed in fp32 and cast once; [out, in] in the dtype of W."""
        weight = dense(self.linear)
        return (weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())).to(weight.dtype)

    def extra_repr(self) -> str:
        linear = self.linear
        return f"{linear.in_features} -> {linear.out_features}, rank={self.rank}, scale={self.scale:g}"


class TrainedInFull(nn.Module):
    """Stands where a leaf module stood and trains an fp32 copy of its parameters, under the same names.

    In bf16 an update smaller than 1/256 of a weight would round away; the forward pass casts the copy back.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._base = (module,)  # in a tuple: not a submodule, so base keys stay what they were
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.base.parameters()).dtype
        cast = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        output: Tensor = torch.func.functional_call(self.base, cast, (x.to(dtype),))
        return output


def set_dropout_rows(module: nn.Module, rows: Tensor | None) -> None:
    """Key the dropout of every adapter below `module` by the rows of the batch to come; None: plain random dropout."""
    for _, adapter in adapters(module):
        adapter.dropout_rows = rows


def adapters(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Path and module of every LoRALinear."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, LoRALinear))


def trained_in_full(module: nn.Module) -> Iterator[tuple[str, TrainedInFull]]:
    """Path and module of every TrainedInFull."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, TrainedInFull))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that adapters train, by its name in the model."""
    modules: list[tuple[str, nn.Module]] = [*adapters(model), *trained_in_full(model)]
    return {
        f"{path}.{name}": parameter
        for path, module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if not isinstance(module, LoRALinear) or name.startswith("lora_")
    }


def matches(target: str, path: str) -> bool:
    """Whether a target names a module path.

    >>> matches("language.3.q_proj", "language_model.model.layers.3.self_attn.q_proj")
    True
    >>> matches("language.q_proj", "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj")
    False
    """
    scope, *components = target.split(".")
    if not path.startswith(SCOPES[scope]):
        return False
    *parents, name = path.removeprefix(SCOPES[scope]).split(".")
    if not components or components[-1] not in (name, "*"):
        return False
    rest = iter(parents)
    return all(component in rest for component in components[:-1])  # in order: each search goes on where the last ended


def select(model: nn.Module, targets: Sequence[str], kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Paths of the modules of these kinds that the targets name, in the model's order.

    Raises:
        ValueError: an unknown scope, or a target that names nothing; lists what there is.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    for target in targets:
        scope, _, rest = target.partition(".")
        if scope not in SCOPES or not rest:
            raise ValueError(
                f"target {target!r}: expected SCOPE.COMPONENT with scope {', '.join(SCOPES)}, e.g. language.q_proj"
            )
        if not any(matches(target, path) for path in paths):
            names = sorted({path.rsplit(".", 1)[-1] for path in paths if path.startswith(SCOPES[scope])})
            raise ValueError(f"target {target!r} names nothing; the {scope} scope has: {', '.join(names) or 'nothing'}")
    return [path for path in paths if any(matches(target, path) for target in targets)]


def inject_lora(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze `model`, put a LoRALinear in place of each target and a TrainedInFull in place of `train_in_full`.

    Returns:
        The paths of what was adapted, `train_in_full` included.

    Raises:
        ValueError: a target or pattern that names nothing, a module named twice, the tied embedding, or adapters
            already in place. The model is untouched then.
    """
    if any(adapters(model)) or any(trained_in_full(model)):
        raise ValueError("the model has adapters already: eject_lora(model) first")
    linears = select(model, config.targets, (nn.Linear,))
    leaves = tuple({type(module) for module in model.modules() if any(True for _ in module.parameters(recurse=False))})
    full = select(model, config.train_in_full, leaves)
    if not linears and not full:
        raise ValueError("targets and train_in_full are both empty: nothing would be trained")
    if any(isinstance(model.get_submodule(path), nn.Embedding) for path in full):
        raise ValueError(
            "train_in_full names an embedding: embed_tokens is also the output head, and is never trained apart"
        )
    if packed := [path for path in full if isinstance(model.get_submodule(path), NF4Linear)]:
        raise ValueError(f"train_in_full names {packed[0]}, which is kept in NF4: packed weights cannot be trained")
    if both := set(linears) & set(full):
        raise ValueError(f"named by targets and by train_in_full: {', '.join(sorted(both))}; choose one")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        select(model, [pattern], (nn.Linear,))
        if not any(matches(pattern, path) for path in linears):
            raise ValueError(f"pattern {pattern!r} names linears that no target adapts")
    model.requires_grad_(False)
    for path in linears:
        rank = [config.rank, *(rank for pattern, rank in config.rank_pattern.items() if matches(pattern, path))][-1]
        alpha = [config.alpha, *(alpha for pattern, alpha in config.alpha_pattern.items() if matches(pattern, path))][
            -1
        ]
        put_adapter(model, path, rank, alpha, config.rslora, config.dropout, seed)
    for path in full:
        model.set_submodule(path, TrainedInFull(model.get_submodule(path)))
    return linears + full


def put_adapter(
    model: nn.Module, path: str, rank: int, alpha: float, rslora: bool = False, dropout: float = 0.0, seed: int = 0
) -> LoRALinear:
    """Replace the linear at `path` by a LoRALinear on the same weight."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is a {type(linear).__name__}"
    adapter = LoRALinear(linear, rank, alpha, rslora, dropout, zlib.crc32(path.encode()), seed)
    model.set_submodule(path, adapter.train(linear.training))
    return adapter


def eject_lora(model: nn.Module) -> list[str]:
    """Put the plain modules back, weights untouched by the adapters; returns the paths. All stays frozen."""
    paths = []
    for path, adapter in list(adapters(model)):
        adapter.linear.weight, adapter.linear.bias = adapter.weight, adapter.bias  # moved or cast since, perhaps
        model.set_submodule(path, adapter.linear.train(adapter.training))
        paths.append(path)
    for path, module in list(trained_in_full(model)):
        model.set_submodule(path, module.base)
        paths.append(path)
    return paths


def adapter_table(model: nn.Module) -> list[tuple[str, str, int, int, int]]:
    """What is trained, per tower: rows of (scope, module name, modules, rank or 0 in full, parameters)."""
    rows: dict[tuple[str, str, int], tuple[int, int]] = {}
    for path, module in (*adapters(model), *trained_in_full(model)):
        scope = next(scope for scope, prefix in SCOPES.items() if path.startswith(prefix))
        rank = module.rank if isinstance(module, LoRALinear) else 0
        size = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        count, total = rows.get(key := (scope, path.rsplit(".", 1)[-1], rank), (0, 0))
        rows[key] = (count + 1, total + size)
    return [(scope, name, count, rank, total) for (scope, name, rank), (count, total) in rows.items()]
