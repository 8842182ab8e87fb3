"""What a worker process of tests/lora/test_protocol.py computes; in a file of its own, which imports little."""

from __future__ import annotations

from torch import Tensor

from finetune.lora.linear import LoRALinear


def both_outputs(adapter: LoRALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the adapter and of its base."""
    return adapter(x).detach(), adapter.base_module()(x).detach()
