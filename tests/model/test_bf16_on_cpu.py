"""bf16 products on CPUs: which are taken in fp32, and that this loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.lora.linear import LoRALinear, put_adapter
from finetune.lora.protocol import AdapterSettings
from model.ops import attention, bf16_on_cpu, linear
from model.ops.bf16_on_cpu import CPU, Direction, choose
from tests.model.test_memory import saved_bytes

BF16 = torch.bfloat16
ARM = CPU(x86=False, onednn_bf16=False, bf16_instructions=False)
AMX = CPU(x86=True, onednn_bf16=True, bf16_instructions=True)
AVX512 = CPU(x86=True, onednn_bf16=True, bf16_instructions=False)
AVX2 = CPU(x86=True, onednn_bf16=False, bf16_instructions=False)
AMX_SWITCHED_OFF = CPU(x86=True, onednn_bf16=False, bf16_instructions=True)

UP, NARROW, HEAD = (16384, 2048), (16384, 16), (257216, 2048)


class BF16Products(TorchDispatchMode):
    """Counts the products whose operands are bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("aten::").removesuffix("_")
        product = name in ("mm", "addmm", "bmm", "convolution") or ("attention" in name and "backward" in name)
        if product and any(isinstance(arg, Tensor) and arg.dtype == BF16 for arg in args):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[CPU], None]:
    """Let products be chosen for another CPU."""
    return lambda cpu: monkeypatch.setattr(bf16_on_cpu, "this_cpu", lambda: cpu)


@pytest.mark.parametrize(
    ("cpu", "direction", "rows", "weight", "chosen"),
    [
        # Instructions for bf16, or an architecture that is not known: always torch's own choice.
        *((cpu, direction, 272, UP, "native") for cpu in (AMX, ARM) for direction in ("forward", "input_grad")),
        (ARM, "attention_grad", 272, (272, 256), "native"),
        # oneDNN emulates: wide weights from 16 rows on, the output head among them.
        (AVX512, "forward", 15, UP, "native"),
        (AVX512, "forward", 16, UP, "upcast"),
        (AVX512, "input_grad", 16, HEAD, "upcast"),
        (AVX512, "forward", 272, NARROW, "native"),
        (AVX512, "weight_grad", 272, (16384, 16), "native"),
        (AVX512, "attention_grad", 272, (272, 256), "native"),
        (AVX512, "convolution", 1, (1152, 3, 14, 14), "native"),
        # torch's loops: dot products for few rows, and nothing else.
        (AVX2, "forward", 1, HEAD, "native"),
        (AVX2, "forward", 7, UP, "native"),
        (AVX2, "forward", 8, UP, "upcast"),
        (AVX2, "forward", 272, NARROW, "upcast"),
        (AVX2, "input_grad", 1, UP, "upcast"),
        (AVX2, "input_grad", 3, HEAD, "upcast"),
        (AVX2, "input_grad", 272, NARROW, "upcast"),
        (AVX2, "weight_grad", 3, (16384, 16), "upcast"),
        (AVX2, "attention_grad", 24, (272, 256), "upcast"),
        (AVX2, "convolution", 1, (1152, 3, 14, 14), "upcast"),
        (AMX_SWITCHED_OFF, "input_grad", 3, UP, "upcast"),  # what torch calls counts, not what the CPU has
    ],
)
def test_the_choice(cpu: CPU, direction: Direction, rows: int, weight: tuple[int, ...], chosen: str) -> None:
    assert choose(cpu, direction, rows, weight) == chosen


@pytest.mark.parametrize(("limit", "onednn"), [("AVX2", False), (None, None)], ids=["avx2", "no limit"])
def test_this_cpu_is_what_torch_calls(limit: str | None, onednn: bool | None) -> None:
    """Read in a process of its own; ONEDNN_MAX_CPU_ISA counts, as it decides which kernel torch calls."""
    code = "import dataclasses, json\nfrom model.ops.bf16_on_cpu import this_cpu\n"
    code += "print(json.dumps(dataclasses.asdict(this_cpu())))"
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    if limit:
        environment["ONEDNN_MAX_CPU_ISA"] = limit
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = CPU(**json.loads(ran.stdout))
    known = torch.cpu.get_capabilities()
    assert found.x86 == (known["architecture"] == "x86_64")
    if onednn is not None:
        assert found.onednn_bf16 == onednn
    else:
        assert found.onednn_bf16 or not found.x86 or not known.get("avx512_bw")
    assert found.bf16_instructions == bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def distance(found: Tensor, exact: Tensor) -> float:
    """Mean distance from the exact result, in units of what rounding that once to bf16 costs."""
    once = (exact.to(BF16).double() - exact).abs().mean()
    return float((found.double() - exact).abs().mean().detach() / once.detach())


@pytest.mark.parametrize("cpu", [AMX, AVX512, AVX2], ids=["amx", "avx512", "avx2"])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_rounded_once(on: Callable[[CPU], None], cpu: CPU, rows: int, bias: bool) -> None:
    """Output and all gradients of a learning linear, wider than one chunk, against fp64."""
    on(cpu)
    torch.manual_seed(rows)
    layer = linear.Linear(2048, 2500, bias=bias, dtype=BF16)
    x, grad = torch.randn(2, rows, 2048, dtype=BF16).requires_grad_(), torch.randn(2, rows, 2500, dtype=BF16)
    y = layer(x)
    inputs = [x, *layer.parameters()]
    found = [y, *torch.autograd.grad(y, inputs, grad)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_y = F.linear(*doubles)
    exact = [exact_y, *torch.autograd.grad(exact_y, doubles, grad.double())]
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == BF16
        assert distance(mine, theirs) < 1.02
    layer.requires_grad_(False)
    (frozen,) = torch.autograd.grad(layer(x), x, grad)
    assert torch.equal(frozen, found[1])
    assert saved_bytes(lambda: layer(x), layer) == 0


@pytest.mark.parametrize("cpu", [AVX512, AVX2], ids=["avx512", "avx2"])
def test_products_in_place_are_rounded_once(on: Callable[[CPU], None], cpu: CPU) -> None:
    """A sum with what is already there, as an adapted linear makes it forward and backward."""
    on(cpu)
    x, weight = torch.randn(40, 2048, dtype=BF16), torch.randn(2500, 2048, dtype=BF16)
    out, grad, onto = (torch.randn(40, width, dtype=BF16) for width in (2500, 2500, 2048))
    before = out.double()
    found = linear.add_linear(out, x, weight)
    assert found is out
    assert distance(out, before + x.double() @ weight.double().t()) < 1.02
    summed = linear.grad_input(grad, weight, onto=onto)
    assert distance(summed, onto.double() + grad.double() @ weight.double()) < 1.02


def test_few_rows_are_bit_for_bit_torchs(on: Callable[[CPU], None]) -> None:
    layer, x = linear.Linear(300, 700, dtype=BF16), torch.randn(3, 300, dtype=BF16)
    for cpu in (AMX, AVX512, AVX2, ARM):
        on(cpu)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("trained", [False, True])
def test_no_bf16_loop_is_left_on_a_cpu_without_bf16_kernels(on: Callable[[CPU], None], trained: bool) -> None:
    """Vision tower, connector, decoder, head and adapters, forward and backward; few rows in the forward pass aside."""
    from finetune import LoRAConfig, inject_lora
    from model import PaliGemma, PaliGemmaConfig
    from tests import tiny

    model = PaliGemma(PaliGemmaConfig.from_hf(tiny.CONFIG)).to(BF16)
    targets = ("language.*", "vision.*")
    inject_lora(model, LoRAConfig(rank=4, targets=targets, modules_to_save=("connector.linear",) if trained else ()))
    batch = tiny.batch(tiny.CONFIG, [9, 9, 9], [4, 4, 4])
    on(AMX)
    with BF16Products() as counted:
        model(**batch).loss.backward()
    assert {"mm", "addmm", "convolution"} <= set(counted.names)
    assert any("attention" in name for name in counted.names)
    on(AVX2)
    with BF16Products() as counted:
        model(**batch).loss.backward()
    assert counted.names == []


def test_attention_recomputed_in_fp32(on: Callable[[CPU], None]) -> None:
    """Gradients no further from fp64 than those of bf16, and nothing saved but the inputs."""
    q, k, v = (torch.randn(2, 1, length, 32, dtype=BF16).requires_grad_() for length in (20, 9, 9))
    bias = torch.zeros(2, 1, 20, 9, dtype=BF16).masked_fill_(torch.rand(2, 1, 20, 9) < 0.3, float("-inf"))
    bias[..., 0] = 0
    grad = torch.randn(2, 1, 20, 32, dtype=BF16)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    exact = torch.autograd.grad(
        F.scaled_dot_product_attention(doubles[0], doubles[1], doubles[2], bias.double()), doubles, grad.double()
    )
    far = {}
    for cpu in (AMX, AVX2):
        on(cpu)
        output = attention.attention(q, k, v, bias)
        assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        found = torch.autograd.grad(output, (q, k, v), grad)
        far[cpu] = [distance(mine, theirs) for mine, theirs in zip(found, exact, strict=True)]
    assert all(upcast <= 1.02 * native for native, upcast in zip(far[AMX], far[AVX2], strict=True))
    assert all(each < 1.02 for each in far[AVX2])
    assert saved_bytes(lambda: attention.attention(q, k, v, bias), nn.Module()) == sum(
        tensor.untyped_storage().nbytes() for tensor in (q, k, v, bias)
    )


def test_a_convolution_is_rounded_once(on: Callable[[CPU], None]) -> None:
    layer, x = linear.Conv2d(3, 64, 14, 14, dtype=BF16), torch.randn(2, 3, 56, 56, dtype=BF16)
    assert layer.bias is not None
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), 14)
    on(AVX2)
    found = layer(x)
    assert found.dtype == BF16
    assert distance(found, exact) < 1.02
    found.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("cpu", [AVX512, AVX2], ids=["avx512", "avx2"])
def test_an_adapted_linear_on_another_cpu(on: Callable[[CPU], None], cpu: CPU) -> None:
    """Output and gradients as near to fp64 as with bf16 kernels: the low-rank products are rounded where those are."""
    module = nn.ModuleDict({"linear": linear.Linear(512, 300, bias=False, dtype=BF16)}).requires_grad_(False)
    adapter = put_adapter(module, "linear", AdapterSettings(8, 8.0))
    assert isinstance(adapter, LoRALinear)
    nn.init.normal_(adapter.lora_B, std=0.05)
    x, grad = torch.randn(2, 20, 512, dtype=BF16).requires_grad_(), torch.randn(2, 20, 300, dtype=BF16)
    inputs = [x, adapter.lora_A, adapter.lora_B]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wide = F.linear(doubles[0], adapter.weight.double()) + F.linear(F.linear(doubles[0], doubles[1]), doubles[2])
    exact = [wide, *torch.autograd.grad(wide, doubles, grad.double())]
    far = {}
    for each in (AMX, cpu):
        on(each)
        y = adapter(x)
        found = [y, *torch.autograd.grad(y, inputs, grad)]
        far[each] = [float((a.double() - b).detach().norm()) for a, b in zip(found, exact, strict=True)]
    assert all(other <= 1.05 * native for native, other in zip(far[AMX], far[cpu], strict=True))
