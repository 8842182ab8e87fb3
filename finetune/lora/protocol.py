"""What is trained: the protocol between a method such as LoRA and everything that saves, merges or trains it.

An `AdapterModule` stands where a module of the base stood. It owns that module's parameters under their own names, so
the base's keys never change, and adds its own. Saving, loading, merging, fingerprint, memory plan and Trainer know this
class alone; a method is one subclass, and an entry in METHODS under the name that configurations give it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune.lora.config import SCOPES
from finetune.system.distributed import gather, whole


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """Of one adapted linear, as PEFT counts them; a method uses those that mean something to it."""

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0


class AdapterModule(nn.Module):
    """A base module with something trained on top.

    A subclass has the constructor `(base, settings, key, seed)`, a `forward` that returns `self.base_module()(x)` where
    `enabled` is False, `adapter_parameters`, and `merged_weight` (or `merged_parameters`, where merging changes more
    than `weight`). key: of the module's path. seed: of the run.

    Attributes:
        method: its name in LoRAConfig.method, in upper case PEFT's `peft_type`; "" for what PEFT keeps as
            modules_to_save.
        file_suffix: what the file of an adapter adds to a parameter's name.
        settings: None for a module that is trained in full.
        enabled: False: the base's own output, bit for bit.
        dropout_seeds: i32 [B] or None. When set, what is dropped from a row depends on its entry and this module alone.
    """

    method: ClassVar[str] = ""
    file_suffix: ClassVar[str] = ""
    weight: nn.Parameter  # where the base has them
    bias: nn.Parameter | None

    def __init__(self, base: nn.Module, settings: AdapterSettings | None = None) -> None:
        assert not any(True for _ in base.children()), f"{type(base).__name__} has submodules: adapt those"
        super().__init__()
        self.settings, self.enabled = settings, True
        self.dropout_seeds: Tensor | None = None
        self.base_class = type(base)
        plain = vars(nn.Module()).keys()
        self.base_attributes = {name: value for name, value in vars(base).items() if name not in plain}
        self.base_names = (*base._parameters, *base._buffers)
        for name, parameter in base._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in base._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in base._non_persistent_buffers_set)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by the name that files give it (without `file_suffix`)."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """The base's weight with what was learned, in the base's shape and dtype: summed in fp32 and cast once."""
        raise NotImplementedError

    def merged_parameters(self) -> dict[str, Tensor]:
        """New values of the base's parameters that merging changes, by name."""
        return {"weight": self.merged_weight()}

    def base_module(self) -> nn.Module:
        """The module that stood here, on the same tensors: this module's own."""
        base: nn.Module = self.base_class.__new__(self.base_class)
        nn.Module.__init__(base)
        vars(base).update(self.base_attributes)
        for name in self.base_names:
            if name in self._parameters:
                base.register_parameter(name, self._parameters[name])
            else:
                base.register_buffer(name, self._buffers[name], persistent=name not in self._non_persistent_buffers_set)
        return base.train(self.training)


# How a linear can be adapted: (linear, settings, key, seed) -> what stands in its place, by the name of the method.
METHODS: dict[str, Callable[[nn.Linear, AdapterSettings, int, int], AdapterModule]] = {}


def adapters(module: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Path and module of everything that is trained, in the model's order."""
    return ((path, child) for path, child in module.named_modules() if isinstance(child, AdapterModule))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that adapters train: `<path>.<its name in files>`."""
    return {
        f"{path}.{name}": parameter
        for path, adapter in adapters(model)
        for name, parameter in adapter.adapter_parameters().items()
    }


def set_dropout_seeds(module: nn.Module, seeds: Tensor | None) -> None:
    """Seeds, i32 [B], of the rows to come, for the dropout of every adapter below `module`; None: at random."""
    for _, adapter in adapters(module):
        adapter.dropout_seeds = seeds


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` gives its base's output, bit for bit: the reference of preference training."""
    before = [(adapter, adapter.enabled) for _, adapter in adapters(model)]
    for adapter, _ in before:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in before:
            adapter.enabled = enabled


def check_gradients(model: nn.Module, has_images: bool = True, of_decoder: bool = True) -> bool:
    """Every trained parameter has a gradient, and of every adapter one that is not zero, in one process or another: all
    call this, before they sum gradients.

    Not every parameter's: in a fresh LoRA adapter's first step A's gradient is zero, as B is. An adapter without any is
    one that the loss does not depend on. What is trained of the connector counts as one adapter: a dense one's norms
    have no gradient while the weights behind them are zero.

    Args:
        has_images: whether an example of this process has an image. What is before the decoder can have a gradient only
            where that is so of one process; otherwise it is not looked at.
        of_decoder: whether what is trained of the decoder is looked at.

    Returns:
        Whether what is trained before the decoder was looked at, if anything is.

    Raises:
        RuntimeError: names those without.
    """
    told = gather([has_images, *without_gradient(model)])
    missing = dict.fromkeys(name for _, of_one, _ in told for name in of_one)
    zero = [name for name in told[0][2] if all(name in of_one for _, _, of_one in told)]
    any_image, before_decoder = any(seen for seen, _, _ in told), (SCOPES["vision"], SCOPES["connector"])
    silent = [name for name in (*missing, *zero) if (any_image if name.startswith(before_decoder) else of_decoder)]
    if silent:
        raise RuntimeError(
            f"{len(silent)} trained parameters got no gradient in the first step, so they would never learn: "
            f"{', '.join(silent[:5])}{', ...' if len(silent) > 5 else ''}"
        )
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return any_image or not any(name.startswith(before_decoder) for name in trained)


def without_gradient(model: nn.Module) -> tuple[list[str], list[str]]:
    """The trained parameters without a gradient, and those of adapters whose gradients are all zero."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    gradients: dict[str, dict[str, Tensor]] = {}
    for name, parameter in trained_parameters(model).items():
        in_connector = name.startswith(SCOPES["connector"])
        adapter = SCOPES["connector"] if in_connector else name.rpartition(".")[0]
        if parameter.grad is not None:
            gradients.setdefault(adapter, {})[name] = parameter.grad
    learning: dict[str, Tensor] = {}
    for of_one in gradients.values():
        any_of_them = torch.stack([whole(gradient).any() for gradient in of_one.values()]).any()
        learning |= dict.fromkeys(of_one, any_of_them)
    seen = torch.stack(list(learning.values())).tolist() if learning else []  # the device is asked once
    return missing, [name for name, is_seen in zip(learning, seen, strict=True) if not is_seen]


def merge_into(base: nn.Module, adapter: AdapterModule) -> None:
    """Write an adapter's merged values into the parameters of its base module."""
    with torch.no_grad():
        for name, value in adapter.merged_parameters().items():
            base.get_parameter(name).copy_(value)
