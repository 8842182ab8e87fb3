"""Memory-efficient ops and recomputation: same values, same gradients, fewer bytes saved for the backward pass."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from finetune import LoRAConfig, LoRALinear, inject_lora, remove_lora
from finetune.lora.linear import put_adapter
from finetune.lora.protocol import AdapterSettings, set_dropout_seeds
from model import PaliGemma, TextConfig
from model.gemma import GemmaLayer, GemmaMLP
from model.layers import rotary_embedding
from model.ops.attention import attention_bias
from model.ops.geglu import geglu, plain_geglu
from model.ops.recompute import cheap_to_recompute, recompute_cheap_outputs, recompute_layer
from model.ops.rms_norm import plain_rms_norm, rms_norm
from tests import rounding, tiny


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that the graph of `run` saves for its backward pass, each storage once, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address could be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


class Executed(TorchDispatchMode):
    """The names of the operations that are executed within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


FIRST_CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Of torch's functions, those whose kernel MKL chooses in the first call.
CHOSEN = "acos asin atan cos erf erfc exp expm1 log log10 log1p log2 sin sqrt tan tanh trunc".split()

class FirstCalls(TorchDispatchMode):
    sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0].removesuffix("_")
        if name in CHOSEN:
            self.sizes.setdefault(name, args[0].numel())
        return func(*args, **(kwargs or {}))

with FirstCalls() as first:
    from finetune import LoRAConfig, inject_lora
    from model import PaliGemma, PaliGemmaConfig
    from tests import tiny

    model = PaliGemma(PaliGemmaConfig.from_hf(tiny.CONFIG))
    inject_lora(model, LoRAConfig())
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(**tiny.batch(tiny.CONFIG, [3, 4], [2, 2])).loss.backward()
    optimizer.step()
print(first.sizes)
"""


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def test_gradients_of_the_norm_in_fp64() -> None:
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-6), (double(2, 3, 8), double(8)))


def test_gradients_of_geglu_in_fp64() -> None:
    assert torch.autograd.gradcheck(geglu, (double(2, 3, 8), double(2, 3, 8)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_adapted_linear_in_fp64(bias: bool, dropout: float) -> None:
    settings = AdapterSettings(3, 2.0, dropout=dropout)
    adapter = LoRALinear(nn.Linear(6, 5, bias=bias), settings, key=1, seed=0).double().train()
    set_dropout_seeds(adapter, torch.tensor([4, 7], dtype=torch.int32))

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(adapter, {"lora_A": a, "lora_B": b}, (x,))
        return output

    for parameter in (adapter.weight, adapter.bias):
        if parameter is not None:
            parameter.requires_grad_(False)
    assert torch.autograd.gradcheck(run, (double(2, 4, 6), double(3, 6), double(5, 3)))
    assert torch.autograd.gradcheck(run, (double(2, 4, 6).detach(), double(3, 6), double(5, 3)))


@pytest.mark.parametrize(
    ("efficient", "plain", "shapes"),
    [
        (partial(rms_norm, eps=1e-6), partial(plain_rms_norm, eps=1e-6), [(2, 9, 16), (16,)]),
        (geglu, plain_geglu, [(2, 9, 16), (2, 9, 16)]),
    ],
    ids=["norm", "geglu"],
)
def test_values_and_gradients_are_those_of_plain_autograd_with_fewer_bytes(
    efficient: Any, plain: Any, shapes: Any
) -> None:
    """In fp64; and in fp32 and bf16 as near to it as autograd's."""
    exact = [torch.randn(shape).bfloat16().double() for shape in shapes]
    grad = torch.randn(shapes[0]).bfloat16().double()

    def inputs(dtype: torch.dtype) -> list[Tensor]:
        return [tensor.to(dtype, copy=True).requires_grad_() for tensor in exact]

    def values_and_gradients(run: Any, dtype: torch.dtype) -> list[Tensor]:
        output = run(*(given := inputs(dtype)))
        return [output, *torch.autograd.grad(output, given, grad.to(dtype))]

    wanted = values_and_gradients(plain, torch.float64)
    rounding.assert_exact(values_and_gradients(efficient, torch.float64), wanted)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (values_and_gradients(run, dtype) for run in (efficient, plain))
        assert {tensor.dtype for tensor in ours} == {dtype}
        for mine, other, result in zip(ours, theirs, wanted, strict=True):
            rounding.assert_as_near(mine, other, result)
        given = inputs(dtype)
        saved = [saved_bytes(partial(run, *given), nn.Module()) for run in (efficient, plain)]
        assert saved[0] < saved[1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_adapted_linear_saves_its_input_and_nothing_else(dropout: float) -> None:
    linear = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    adapter = LoRALinear(linear, AdapterSettings(8, 8.0, dropout=dropout), key=1, seed=0).train()
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16).requires_grad_()

    def plain(x: Tensor) -> Tensor:
        update = F.linear(F.linear(F.dropout(x.float(), dropout), adapter.lora_A), adapter.lora_B)
        return (F.linear(x, linear.weight) + adapter.scale * update).to(x.dtype)

    assert saved_bytes(lambda: adapter(x), adapter) == x.nbytes
    assert saved_bytes(lambda: plain(x), adapter) > 2 * x.nbytes
    assert saved_bytes(lambda: torch.cat([adapter(x), adapter(x)]), adapter) == x.nbytes  # shared
    if not dropout:
        exact = copy.deepcopy(adapter).double()
        low_rank = F.linear(F.linear(x.double(), exact.lora_A), exact.lora_B) * exact.scale
        rounding.assert_as_near(adapter(x), plain(x), F.linear(x.double(), exact.weight) + low_rank)


@pytest.fixture(scope="module")
def narrow() -> TextConfig:
    return TextConfig(32, 256, 2, 4, 1, 8)


def test_the_mlp_saves_gate_and_up_and_not_their_product(narrow: TextConfig) -> None:
    mlp = GemmaMLP(narrow).requires_grad_(False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        nn.init.normal_(put_adapter(mlp, name, AdapterSettings(4, 4.0)).adapter_parameters()["lora_B"])
    plain = copy.deepcopy(mlp)
    x, grad = torch.randn(2, 9, 32).requires_grad_(), torch.randn(2, 9, 32)

    def textbook(x: Tensor) -> Tensor:
        product: Tensor = plain.down_proj(plain_geglu(plain.gate_proj(x), plain.up_proj(x)))
        return product

    one = 2 * 9 * 256 * 4

    def ours(x: Tensor) -> Tensor:
        with recompute_cheap_outputs():
            product: Tensor = mlp(x)
        return product

    assert saved_bytes(lambda: ours(x), mlp) == x.nbytes + 2 * one
    assert saved_bytes(lambda: textbook(x), plain) >= x.nbytes + 4 * one

    def gradients(module: nn.Module, run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        module.to(dtype)
        given = x.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(
            run(given), [given, *(p for p in module.parameters() if p.requires_grad)], grad.to(dtype)
        )

    rounding.assert_same(
        rounding.computed(lambda dtype: gradients(mlp, ours, dtype)),
        rounding.computed(lambda dtype: gradients(plain, textbook, dtype)),
    )


def test_a_cheap_output_is_recomputed_once_for_all_and_dropped() -> None:
    x, weights = double(5, 8), [double(8, 8) for _ in range(3)]
    recomputed: list[weakref.ref[Tensor]] = []

    def compute(x: Tensor) -> Tensor:
        recomputed.append(weakref.ref(again := x * 2))
        return again

    def run() -> Tensor:
        with recompute_cheap_outputs():
            tensor = cheap_to_recompute(x * 2, compute, x)
            products = [tensor @ weight for weight in weights]
            products.append(tensor.t().contiguous().t() @ weights[0])  # another storage: saved
        alive.append(weakref.ref(tensor))
        return torch.stack(products).sum()

    alive: list[weakref.ref[Tensor]] = []
    plain = torch.stack([x * 2 @ weight for weight in [*weights, weights[0]]]).sum()
    wanted = torch.autograd.grad(plain, [x, *weights])
    for times in (1, 2):
        loss = run()
        assert alive[-1]() is None
        got = torch.autograd.grad(loss, [x, *weights])
        assert len(recomputed) == times
        assert recomputed[-1]() is None
        rounding.assert_exact(got, wanted)


def inputs_of_layers(config: TextConfig, length: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """cos and sin, and the bias of folded heads, for a row that sees all of itself."""
    rotary = rotary_embedding(torch.arange(length)[None], config.head_dim, config.rope_theta, torch.float32)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    return rotary, attention_bias(mask, torch.float32, config.num_attention_heads // config.num_key_value_heads)


def test_a_layer_saves_its_two_inputs_what_attention_reads_and_gate_and_up(narrow: TextConfig) -> None:
    layer = GemmaLayer(narrow, 0).requires_grad_(False)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        put_adapter(layer, f"self_attn.{name}", AdapterSettings(4, 4.0))
    for name in ("gate_proj", "up_proj", "down_proj"):
        put_adapter(layer, f"mlp.{name}", AdapterSettings(4, 4.0))
    (cos, sin), bias = inputs_of_layers(narrow, 9)
    shared = sum(tensor.untyped_storage().nbytes() for tensor in (cos, sin, bias))

    def run() -> Tensor:
        with recompute_cheap_outputs():
            output: Tensor = layer(x, (cos, sin), bias)
        return output

    x = torch.randn(1, 9, 32).requires_grad_()
    heads, rows = narrow.num_attention_heads * narrow.head_dim, 9 * 4
    scales, sums = 2 * rows, rows * narrow.num_attention_heads  # of each norm, and of each head's softmax
    floats = 2 * 32 + 2 * heads + 2 * narrow.head_dim + 2 * narrow.intermediate_size
    assert saved_bytes(run, layer) == floats * rows + scales + sums + shared


@pytest.mark.parametrize("keys", [8, 9, 15, 16])
def test_what_attention_adds_is_aligned(keys: int) -> None:
    """A multiple of 8 elements from row to row; what is between them is no key."""
    mask = torch.rand(2, 1, 5, keys) < 0.5
    for copies in (4, 1):
        bias = attention_bias(mask, torch.float32, copies)
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
        assert torch.equal(bias == 0, mask.repeat_interleave(copies, dim=2))
        assert torch.equal(bias == float("-inf"), ~mask.repeat_interleave(copies, dim=2))


def test_a_recomputed_layer_does_not_compute_its_last_product_again(narrow: TextConfig) -> None:
    layer = GemmaLayer(narrow, 0).requires_grad_(False)
    put_adapter(layer, "mlp.down_proj", AdapterSettings(4, 4.0))
    inputs = inputs_of_layers(narrow, 5)

    def frozen_products_again() -> int:
        output = recompute_layer(layer, torch.randn(1, 5, 32).requires_grad_(), *inputs)
        with Executed() as executed:
            output.sum().backward()
        return executed.names.count("aten::addmm_")

    assert frozen_products_again() == 0
    with set_checkpoint_early_stop(False):
        assert frozen_products_again() == 1


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> PaliGemma:
    directory = tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))
    model = PaliGemma.from_pretrained(directory, dtype=torch.float32)
    inject_lora(model, LoRAConfig(rank=4, dropout=0.2))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def step(model: PaliGemma) -> tuple[Tensor, list[Tensor]]:
    batch = tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])
    set_dropout_seeds(model, torch.tensor([3, 1, 4], dtype=torch.int32))
    loss = model(**batch).loss
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_recomputation_changes_no_bit_and_saves_less(adapted: PaliGemma, layers: int) -> None:
    decoder = adapted.language_model.model
    saved, (loss, gradients) = saved_bytes(lambda: step(adapted)[0], adapted), step(adapted)
    decoder.set_recompute(layers)
    try:
        less, (loss_again, gradients_again) = saved_bytes(lambda: step(adapted)[0], adapted), step(adapted)
    finally:
        decoder.set_recompute()
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert less < saved


def test_nothing_is_kept_below_the_lowest_adapter(adapted: PaliGemma) -> None:
    """With adapters in the last layer alone, the layers below cost no more memory than their output."""
    model = copy.deepcopy(adapted)
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear) and ".layers.2." not in path:
            module.requires_grad_(False)
    assert saved_bytes(lambda: step_loss(model), model) < saved_bytes(lambda: step_loss(adapted), adapted) / 2.5


def step_loss(model: PaliGemma) -> Tensor:
    loss: Tensor = model(**tiny.batch(tiny.CONFIG, [9, 9, 9], [3, 3, 3])).loss
    return loss


def products(run: Callable[[], Any]) -> int:
    """FLOP of the matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_last_layer_computes_the_query_positions_alone(adapted: PaliGemma) -> None:
    model, text = copy.deepcopy(adapted).eval(), adapted.config.text
    remove_lora(model)
    batch = tiny.batch(tiny.CONFIG, [9, 9], [3, 3])
    with torch.no_grad():
        labelled = products(lambda: model(**batch))
        del batch["labels"]
        every = products(lambda: model(**batch))
    width, attention = text.hidden_size, text.num_attention_heads * text.head_dim
    one_row = 2 * (2 * width * attention + 3 * width * text.intermediate_size + width * text.vocab_size)
    assert every - labelled >= 2 * (16 - 3) * one_row


def test_what_mkl_chooses_in_a_first_call_is_first_called_with_one_number() -> None:
    """Threads that shared that call could each have a kernel of another precision."""
    ran = subprocess.run([sys.executable, "-c", FIRST_CALLS], stdout=subprocess.PIPE, text=True, check=True)
    assert ran.stdout == "{'cos': 1, 'sin': 1, 'sqrt': 1}\n"
