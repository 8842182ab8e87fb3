"""LoRA by hand (arXiv 2106.09685): W x + scale * B (A x), with W frozen and shared, A and B in fp32.

A `LoRALinear` stands where the `Linear` stood and owns its weight under the same name, so the base's keys never change;
`remove_lora` puts the plain modules back. What saving, merging and training know of it is in `protocol.py`.
Rank-stabilised scaling is arXiv 2312.03732. DoRA and PiSSA are not here.

Axes: B batch, r rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.lora.config import SCOPES, LoRAConfig
from finetune.lora.dropout import Dropout, feature_keys
from finetune.lora.memory_efficient import memory_efficient_lora_linear
from finetune.lora.nf4 import NF4Linear, dense, weight_of
from finetune.lora.protocol import METHODS, AdapterModule, AdapterSettings, adapters


class LoRALinear(AdapterModule):
    """x [..., in] -> W x + bias + scale * B A dropout(x), [..., out] in the dtype of x.

    Attributes:
        weight, bias: the base's, frozen; in NF4 `weight` is packed, its state in buffers beside it (`NF4Linear`).
        lora_A: fp32 [r, in], uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5). lora_B: fp32 [out, r], zero, so that
            the network starts as the base, bit for bit.
        feature_keys: i32 [2, in], which make the dropout of this module its own; None without dropout.
    """

    method, file_suffix = "lora", ".weight"
    feature_keys: Tensor | None

    def __init__(self, linear: nn.Linear, settings: AdapterSettings, key: int, seed: int) -> None:
        super().__init__(linear, settings)
        self.in_features, self.out_features, self.key = linear.in_features, linear.out_features, key
        rank, device = settings.rank, linear.weight.device
        self.scale = settings.alpha / (rank**0.5 if settings.rslora else rank)
        # Drawn on the CPU: the same start on every device.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
        a = torch.empty(rank, linear.in_features).uniform_(-1, 1, generator=generator) * linear.in_features**-0.5
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        keys = feature_keys(key, linear.in_features).to(device) if settings.dropout else None
        self.register_buffer("feature_keys", keys, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            output: Tensor = self.base_module()(x)
            return output
        # plain_lora_linear: W x + bias + scale * B(A(dropout(x)))
        return memory_efficient_lora_linear(
            x, weight_of(self), self.bias, self.lora_A, self.lora_B, self.scale, self.dropout_of(x)
        )

    def dropout_of(self, x: Tensor) -> Dropout | None:
        """The dropout of the rows of x; None where nothing is dropped.

        Raises:
            ValueError: seeds were set for another number of rows.
        """
        if not self.training or self.feature_keys is None:
            return None
        seeds = self.dropout_seeds
        if seeds is None:
            seeds = torch.randint(-(2**31), 2**31, (len(x),), dtype=torch.int32).to(x.device)
        if len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} dropout seeds were set for a batch of {len(x)}")
        assert self.settings is not None, "LoRALinear is made with settings"
        return Dropout(self.settings.dropout, seeds, self.feature_keys)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def merged_weight(self) -> Tensor:
        """W + scale * B A, summed in fp32 and cast once; [out, in] in the dtype of W, of a packed one in fp32."""
        weight = dense(weight_of(self), torch.float32)
        return (weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())).to(weight.dtype)

    def extra_repr(self) -> str:
        rank = len(self.lora_A)
        return f"{self.in_features} -> {self.out_features}, rank={rank}, scale={self.scale:g}"


METHODS[LoRALinear.method] = LoRALinear


class TrainedInFull(AdapterModule):
    """Trains an fp32 copy of every parameter of its base, which keeps its own.

    In bf16 an update smaller than 1/256 of a weight would round away; the forward pass casts the copy to the base's
    dtype. A copy is named `trained_<name>` here, and `<name>` in files, as PEFT has it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.names = tuple(name for name, _ in module.named_parameters(recurse=False))
        for name in self.names:
            copied = module.get_parameter(name).detach().to(torch.float32, copy=True)
            self.register_parameter(f"trained_{name}", nn.Parameter(copied))

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_module()
        if self.enabled:
            x = x.to(self.get_parameter(self.names[0]).dtype)
            output: Tensor = torch.func.functional_call(base, self.merged_parameters(), (x,))
        else:
            output = base(x)
        return output

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(f"trained_{name}") for name in self.names}

    def merged_parameters(self) -> dict[str, Tensor]:
        return {name: copy.to(self.get_parameter(name).dtype) for name, copy in self.adapter_parameters().items()}


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
    """Freeze `model`, put a LoRALinear in place of each target and a TrainedInFull in place of `modules_to_save`.

    Returns:
        The paths of what was adapted, `modules_to_save` included.

    Raises:
        ValueError: a target or pattern that names nothing, a module named twice, the tied embedding, or adapters
            already in place. The model is untouched then.
    """
    if any(adapters(model)):
        raise ValueError("the model has adapters already: remove_lora(model) first")
    linears = select(model, config.targets, (nn.Linear,))
    leaves = tuple({type(module) for module in model.modules() if any(True for _ in module.parameters(recurse=False))})
    full = select(model, config.modules_to_save, leaves)
    if not linears and not full:
        raise ValueError("targets and modules_to_save are both empty: nothing would be trained")
    if any(isinstance(model.get_submodule(path), nn.Embedding) for path in full):
        raise ValueError(
            "modules_to_save names an embedding: embed_tokens is also the output head, and is never trained apart"
        )
    if packed := [path for path in full if isinstance(model.get_submodule(path), NF4Linear)]:
        raise ValueError(f"modules_to_save names {packed[0]}, which is kept in NF4: packed weights cannot be trained")
    if both := set(linears) & set(full):
        raise ValueError(f"named by targets and by modules_to_save: {', '.join(sorted(both))}; choose one")
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
        put_adapter(model, path, AdapterSettings(rank, alpha, config.rslora, config.dropout), config.method, seed)
    for path in full:
        put_in_full(model, path)
    return linears + full


def put_adapter(
    model: nn.Module, path: str, settings: AdapterSettings, method: str = "lora", seed: int = 0
) -> AdapterModule:
    """Replace the linear at `path` by an adapter on the same weight."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is a {type(linear).__name__}"
    adapter = METHODS[method](linear, settings, zlib.crc32(path.encode()), seed)
    model.set_submodule(path, adapter.train(linear.training))
    return adapter


def put_in_full(model: nn.Module, path: str) -> None:
    """Train the module at `path` in full."""
    module = model.get_submodule(path)
    model.set_submodule(path, TrainedInFull(module).train(module.training))


def remove_lora(model: nn.Module) -> list[str]:
    """Put the plain modules back, weights untouched by the adapters; returns the paths. All stays frozen."""
    found = list(adapters(model))
    for path, adapter in found:
        model.set_submodule(path, adapter.base_module())
    return [path for path, _ in found]


def adapter_table(model: nn.Module) -> list[tuple[str, str, int, int, int]]:
    """What is trained, per tower: rows of (scope, module name, modules, rank or 0 in full, parameters)."""
    rows: dict[tuple[str, str, int], tuple[int, int]] = {}
    for path, adapter in adapters(model):
        scope = next(scope for scope, prefix in SCOPES.items() if path.startswith(prefix))
        rank = adapter.settings.rank if adapter.settings else 0
        size = sum(parameter.numel() for parameter in adapter.adapter_parameters().values())
        count, total = rows.get(key := (scope, path.rsplit(".", 1)[-1], rank), (0, 0))
        rows[key] = (count + 1, total + size)
    return [(scope, name, count, rank, total) for (scope, name, rank), (count, total) in rows.items()]
