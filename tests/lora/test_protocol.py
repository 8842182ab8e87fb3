"""One owner of each weight, and one protocol that a method of a few lines is trained, saved, loaded and merged by."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import merge_lora as merge_script
import train
from finetune import LoRAConfig, LoRALinear, inject_lora, load_adapter, remove_lora
from finetune.adapters.fingerprint import fingerprint
from finetune.lora.linear import TrainedInFull, adapter_table
from finetune.lora.nf4 import NF4Linear, dense, quantize, weight_of
from finetune.lora.protocol import (
    METHODS,
    AdapterModule,
    AdapterSettings,
    adapters,
    adapters_disabled,
    set_dropout_seeds,
    trained_parameters,
)
from model import PaliGemma
from tests import rounding, tiny
from tests.lora.both_outputs import both_outputs
from tests.test_scripts import arguments, base  # noqa: F401 (a fixture)

FORMS = ["plain", "nf4"]


def linear_in(form: str) -> nn.Linear:
    """[64 -> 128] with random weights."""
    linear = nn.Linear(64, 128).requires_grad_(False)
    if form == "plain":
        return linear
    pytest.importorskip("bitsandbytes")
    return NF4Linear(linear, torch.device("cpu"))


def adapted(linear: nn.Linear) -> LoRALinear:
    adapter = LoRALinear(linear, AdapterSettings(rank=4, dropout=0.1), key=1, seed=0)
    nn.init.normal_(adapter.lora_B)
    return adapter.eval()


def update(adapter: LoRALinear, x: Tensor) -> Tensor:
    return adapter.scale * F.linear(F.linear(x, adapter.lora_A.to(x.dtype)), adapter.lora_B.to(x.dtype))


def in_fp64(adapter: LoRALinear, linear: nn.Linear, x: Tensor) -> Tensor:
    """What `linear` and the low-rank update give without rounding; from its codes where it is in NF4."""
    bias = None if linear.bias is None else linear.bias.double()
    return F.linear(x.double(), dense(weight_of(linear), x.dtype).double(), bias) + update(adapter, x.double())


def assert_computes(adapter: LoRALinear, linear: nn.Linear, x: Tensor) -> None:
    """`linear` and the low-rank update, at both of `adapter`'s states, and nothing of another weight."""
    expected = linear(x)
    rounding.assert_as_near(adapter(x), expected + update(adapter, x), in_fp64(adapter, linear, x))
    adapter.enabled = False
    assert torch.equal(adapter(x), expected)
    adapter.enabled = True
    assert torch.equal(adapter.base_module()(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_an_assigned_weight_is_the_one_that_is_used(form: str) -> None:
    adapter, other = adapted(linear_in(form)), linear_in(form)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    result = adapter.load_state_dict(state, strict=False, assign=True)
    assert (sorted(result.missing_keys), result.unexpected_keys) == (["lora_A", "lora_B"], [])
    assert_computes(adapter, other, torch.randn(3, 5, 64))
    x = torch.randn(3, 5, 64).requires_grad_()
    found, plain, exact = (
        torch.autograd.grad(output.square().sum(), x)[0]
        for output in (adapter(x), other(x) + update(adapter, x), in_fp64(adapter, other, x))
    )
    rounding.assert_as_near(found, plain, exact)


@pytest.mark.parametrize("form", FORMS)
def test_a_cast_reaches_the_one_weight(form: str) -> None:
    linear = linear_in(form)
    matrix = dense(weight_of(linear), torch.float32).clone()
    adapter = adapted(copy.deepcopy(linear)).to(torch.bfloat16)
    assert_computes(adapter, linear.to(torch.bfloat16), torch.randn(3, 5, 64, dtype=torch.bfloat16))
    assert adapter.weight.dtype == (torch.bfloat16 if form == "plain" else torch.uint8)
    if form == "nf4":  # whose codes and scales a cast does not round
        assert torch.equal(dense(weight_of(adapter), torch.float32), matrix)


@pytest.mark.parametrize("form", FORMS)
def test_a_move_reaches_the_one_weight(form: str) -> None:
    adapter = adapted(linear_in(form)).to("meta").train()
    assert all(tensor.is_meta for tensor in (*adapter.parameters(), *adapter.buffers()))
    x = torch.empty(3, 5, 64, device="meta", requires_grad=True)
    set_dropout_seeds(adapter, torch.empty(3, dtype=torch.int32, device="meta"))
    output = adapter(x)
    output.sum().backward()
    assert output.is_meta
    assert output.shape == (3, 5, 128)
    assert x.grad is not None
    assert x.grad.is_meta


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_owns_a_weight_of_its_own(form: str) -> None:
    linear = linear_in(form)
    adapter = adapted(linear)
    copied, x, before = copy.deepcopy(adapter), torch.randn(3, 5, 64), linear(torch.ones(1, 64))
    with torch.no_grad():
        copied.weight.zero_()
    assert_computes(copied, copied.base_module(), x)  # type: ignore[arg-type]
    assert not torch.equal(copied(x), adapter(x))
    assert torch.equal(linear(torch.ones(1, 64)), before)


def test_a_worker_process_gets_the_one_weight() -> None:
    modules, x = [adapted(linear_in(form)) for form in FORMS], torch.randn(3, 5, 64)
    for module in modules:
        with torch.no_grad():
            module.weight.copy_(module.weight.flip(0))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        found = list(worker.map(both_outputs, modules, [x] * len(modules)))
    for module, (output, plain) in zip(modules, found, strict=True):
        assert torch.equal(output, module(x))
        assert torch.equal(plain, module.base_module()(x))


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_has_one_name_and_the_bases_keys_stay(form: str) -> None:
    linear = linear_in(form)
    before = linear.state_dict()
    adapter = adapted(linear)
    after = adapter.state_dict()
    assert after.keys() - before.keys() == {"lora_A", "lora_B"}
    assert all(after[name] is not None and torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not list(adapter.children())
    hidden = [value for value in vars(adapter).values() if isinstance(value, nn.Module | Tensor | tuple)]
    assert not [value for value in hidden if not isinstance(value, tuple) or any(not isinstance(v, str) for v in value)]


def test_a_module_trained_in_full_owns_its_base_and_its_copy() -> None:
    base, x = nn.LayerNorm(8, dtype=torch.bfloat16).requires_grad_(False), torch.randn(2, 8, dtype=torch.bfloat16)  # noqa: F811
    nn.init.normal_(base.weight)
    trained = TrainedInFull(base)
    with torch.no_grad():
        for parameter in trained.adapter_parameters().values():
            parameter.add_(1)
    after = nn.LayerNorm(8, dtype=torch.bfloat16)
    after.load_state_dict({name: (p.float() + 1).bfloat16() for name, p in base.named_parameters()})
    for module in (trained, copy.deepcopy(trained)):
        assert torch.equal(module(x), after(x))
        module.enabled = False
        assert torch.equal(module(x), base(x))
        assert base.state_dict().keys() <= module.state_dict().keys()
    other = nn.LayerNorm(8, dtype=torch.bfloat16)
    trained.load_state_dict(other.state_dict(), strict=False, assign=True)
    assert torch.equal(trained(x), other(x))
    trained.enabled = True
    assert torch.equal(trained(x), after(x))
    assert all(tensor.is_meta for tensor in trained.to("meta").state_dict().values())


@pytest.fixture
def tiny_model(tmp_path: Path) -> PaliGemma:
    directory = tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path / "tiny")
    return PaliGemma.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_the_logits_are_the_bases_bit_for_bit(tiny_model: PaliGemma, form: str, dtype: torch.dtype) -> None:
    """In training mode, with dropout, modules trained in full and recomputed layers."""
    if form == "nf4":
        pytest.importorskip("bitsandbytes")
        quantize(tiny_model, "cpu")
    batch = tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])
    tiny_model.to(dtype).train()
    before, known = tiny_model(**batch), fingerprint(tiny_model)
    config = LoRAConfig(
        rank=4,
        dropout=0.3,
        targets=("language.*", "vision.*"),
        modules_to_save=("connector.linear", "language.norm", "vision.layer_norm1"),
    )
    inject_lora(tiny_model, config)
    tiny_model.language_model.model.set_recompute(layers=2)
    set_dropout_seeds(tiny_model, torch.arange(3, dtype=torch.int32))
    with torch.no_grad():
        for parameter in trained_parameters(tiny_model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    changed = tiny_model(**batch).logits
    assert not torch.equal(changed, before.logits)
    with adapters_disabled(tiny_model):
        out = tiny_model(**batch)
        assert torch.equal(out.logits, before.logits)
        assert torch.equal(out.loss, before.loss)
        assert fingerprint(tiny_model) == known
    assert torch.equal(tiny_model(**batch).logits, changed)
    remove_lora(tiny_model)
    assert torch.equal(tiny_model(**batch).logits, before.logits)


def test_contexts_leave_each_adapter_as_it_was(tiny_model: PaliGemma) -> None:
    inject_lora(tiny_model, LoRAConfig(rank=2))
    (_, first), (_, second), *_ = adapters(tiny_model)
    first.enabled = False
    with adapters_disabled(tiny_model):
        with adapters_disabled(tiny_model):
            assert not second.enabled
        assert not second.enabled
    assert (first.enabled, second.enabled) == (False, True)
    with pytest.raises(KeyError), adapters_disabled(tiny_model):
        raise KeyError
    assert (first.enabled, second.enabled) == (False, True)


class FullDelta(AdapterModule):
    """W + D: a method as a test writes it."""

    method = "delta"

    def __init__(self, linear: nn.Linear, settings: AdapterSettings, key: int, seed: int) -> None:
        super().__init__(linear, settings)
        self.delta = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            output: Tensor = self.base_module()(x)
            return output
        return F.linear(x, self.weight + self.delta.to(x.dtype), self.bias)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"delta": self.delta}

    def merged_weight(self) -> Tensor:
        return (self.weight.float() + self.delta).to(self.weight.dtype)


def test_another_method_is_trained_saved_loaded_and_merged(
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(METHODS, "delta", FullDelta)
    run = tmp_path / "run"
    train.main([*arguments(base, run), "lora.method=delta", "lora.targets=[language.q_proj, vision.fc1]"])
    assert "q_proj" in capsys.readouterr().out
    model = PaliGemma.from_pretrained(base, torch.float32)
    known = fingerprint(model)
    paths = load_adapter(model, run / "adapter")
    found = dict(adapters(model))
    assert sorted(found) == sorted(paths)
    assert all(isinstance(adapter, FullDelta) and adapter.delta.abs().max() > 0 for adapter in found.values())
    assert fingerprint(model) == known
    assert {name for _, name, *_ in adapter_table(model)} == {"q_proj", "fc1"}
    merge_script.main([str(run / "adapter"), "--output", str(tmp_path / "merged"), "--dtype", "float32"])
    merged = PaliGemma.from_pretrained(tmp_path / "merged", torch.float32)
    for path, adapter in found.items():
        assert isinstance(adapter, FullDelta)
        assert torch.equal(merged.get_parameter(f"{path}.weight"), adapter.weight + adapter.delta)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^method: got 'loar'; expected lora"):
        LoRAConfig(method="loar")


def test_the_known_methods_are_known_before_any_is_used() -> None:
    """In a process of its own: nothing has imported the files that register them."""
    code = "from finetune import LoRAConfig; LoRAConfig(method='loar')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr.endswith("SettingError: method: got 'loar'; expected lora\n")


MODULES: list[Callable[[], AdapterModule]] = [
    lambda: adapted(nn.Linear(3, 2)),
    lambda: TrainedInFull(nn.Linear(3, 2)),
]


@pytest.mark.parametrize("make", MODULES, ids=["lora", "in full"])
def test_merged_values_have_the_bases_shapes_and_dtypes(make: Callable[[], AdapterModule]) -> None:
    module = make().to(torch.bfloat16)
    plain = dict(module.base_module().named_parameters())
    merged = module.merged_parameters()
    assert merged.keys() <= plain.keys()
    assert all((value.shape, value.dtype) == (plain[n].shape, plain[n].dtype) for n, value in merged.items())
