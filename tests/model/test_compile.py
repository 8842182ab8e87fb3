"""`torch.compile` of a decoder layer: one graph, and the same gradients bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.lora.linear import put_adapter
from finetune.lora.protocol import AdapterSettings, trained_parameters
from model import TextConfig
from model.gemma import GemmaLayer
from model.layers import rotary_embedding
from model.ops.attention import attention_bias
from model.ops.recompute import recompute_cheap_outputs

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
CONFIG = TextConfig(32, 64, 1, 4, 1, 8)


@pytest.mark.parametrize("query_positions", [None, torch.tensor([[6, 7], [3, 4]])], ids=["all", "some"])
@pytest.mark.parametrize("group", [4, 1], ids=["folded", "unfolded"])
def test_a_compiled_layer_has_the_gradients_of_eager(query_positions: Tensor | None, group: int) -> None:
    """In fp32, through adapters in every linear, within the context that recomputes cheap outputs and outside of it."""
    torch.manual_seed(0)
    layer = GemmaLayer(CONFIG, 0).requires_grad_(False)
    for path in LINEARS:
        nn.init.normal_(put_adapter(layer, path, AdapterSettings(4, 4.0)).adapter_parameters()["lora_B"])
    x = torch.randn(2, 9, 32).requires_grad_()
    rotary = rotary_embedding(torch.arange(9).expand(2, -1), CONFIG.head_dim, CONFIG.rope_theta, torch.float32)
    mask = torch.ones(2, 1, 9 if query_positions is None else 2, 9, dtype=torch.bool)
    inputs = (x, rotary, attention_bias(mask, torch.float32, group), None, query_positions)

    def output_and_gradients(run: Callable[..., Any]) -> list[Tensor]:
        output = run(*inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        return [output, *torch.autograd.grad((output * weights).sum(), [x, *trained_parameters(layer).values()])]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with recompute_cheap_outputs():
        eager = output_and_gradients(layer)
        within = output_and_gradients(compiled)
    outside = output_and_gradients(compiled)
    assert len(eager) == 2 + 2 * len(LINEARS)
    for found in (within, outside):
        assert all(torch.equal(one, other) for one, other in zip(found, eager, strict=True))
