"""NF4: the same codes, logits and gradients as transformers, PEFT and bitsandbytes, and a way back from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evaluate
import merge_lora as merge_script
import predict
import train
from benchmarks.side_by_side import library_model
from finetune import LoRAConfig, inject_lora, load_adapter, merge_lora, remove_lora, save_adapter
from finetune.adapters.merge import merge_checkpoint
from finetune.adapters.metadata import trained_on
from finetune.adapters.storage import LAYOUTS
from finetune.config.load import ConfigError, load_config
from finetune.lora.nf4 import NESTED, NF4Linear, decoder_linears, dense, dequantize, open_base, packed_bytes, weight_of
from finetune.lora.protocol import adapters, trained_parameters
from finetune.preflight.count import saved_bytes
from finetune.preflight.plan import Planner
from finetune.training import setup
from finetune.training.checkpoints import checkpoints
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma
from tests import rounding, tiny
from tests.test_scripts import arguments, base, files  # noqa: F401 (base is a fixture)

LORA = LoRAConfig(rank=4, alpha=8, targets=("language.*",))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def packed(checkpoint: Path) -> PaliGemma:
    return open_base(checkpoint, torch.float32, "cpu", "nf4")


def library_in_nf4(checkpoint: Path) -> Any:
    """The documented QLoRA way to open a model, the decoder alone quantised, in fp32, without dropout.

    In training mode: outside of it bitsandbytes repacks weights for CPUs with bf16 instructions and rounds them,
    and cannot where a matrix is as narrow as these.
    """
    return library_model(checkpoint, torch.float32, torch.device("cpu"), nf4=True).train()


def noise(model: nn.Module, std: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def test_the_decoders_linears_are_packed_and_nothing_else(checkpoint: Path, packed: PaliGemma) -> None:
    plain = PaliGemma.from_pretrained(checkpoint, torch.float32)
    paths = decoder_linears(packed)
    assert len(paths) == 3 * 7
    for path, module in packed.named_modules():
        assert isinstance(module, NF4Linear) == (path in paths)
    for name, parameter in plain.named_parameters():
        ours = packed.get_parameter(name)
        assert torch.equal(parameter, ours) != (name.removesuffix(".weight") in paths)


def test_codes_and_logits_are_those_of_the_library(checkpoint: Path, packed: PaliGemma) -> None:
    library = library_in_nf4(checkpoint)
    import bitsandbytes.functional as functions

    for path, ours in decoder_linears(packed).items():
        theirs = library.get_submodule(LAYOUTS["transformers 5"](path)).weight
        dense_theirs = functions.dequantize_4bit(theirs.data, theirs.quant_state)
        assert isinstance(ours, NF4Linear)
        assert torch.equal(dense(weight_of(ours), torch.float32), dense_theirs)
    batch = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])
    real = batch["attention_mask"].bool()
    theirs = library(**batch).logits[real]
    del batch["labels"]

    def logits(model: PaliGemma) -> Tensor:
        return model(**batch).logits[real]

    plain = rounding.computed_by(dequantize(open_base(checkpoint, torch.float32, "cpu", "nf4")), logits)
    for packed_logits in (logits(packed), theirs):
        rounding.assert_as_near(packed_logits, plain.rounded, plain.exact)


def test_gradients_are_those_of_peft_on_the_librarys_nf4(checkpoint: Path, packed: PaliGemma, tmp_path: Path) -> None:
    """Both as near to fp64, on the matrices that the codes stand for, as plain fp32 arithmetic on these."""
    inject_lora(packed, LORA)
    noise(packed)
    batch = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])

    def gradients(model: PaliGemma) -> dict[str, Tensor]:
        model(**batch).loss.backward()
        return {name: p.grad for name, p in trained_parameters(model).items() if p.grad is not None}

    dense_base = dequantize(open_base(checkpoint, torch.float32, "cpu", "nf4"))
    inject_lora(dense_base, LORA)
    noise(dense_base)
    plain = rounding.computed_by(dense_base, gradients)
    names = "|".join(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    wanted = LoraConfig(r=4, lora_alpha=8, target_modules=rf".*language_model.*\.({names})")
    theirs: Any = get_peft_model(library_in_nf4(checkpoint), wanted)
    found = {}
    for path, adapter in adapters(packed):
        layer = theirs.base_model.model.get_submodule(LAYOUTS["transformers 5"](path))
        for name in ("lora_A", "lora_B"):
            found[f"{path}.{name}"] = getattr(layer, name)["default"].weight
            with torch.no_grad():
                found[f"{path}.{name}"].copy_(adapter.adapter_parameters()[name])
    theirs(**batch).loss.backward()
    assert all(gradient.abs().max() > 0 for gradient in plain.exact.values())
    for result in (gradients(packed), {name: parameter.grad for name, parameter in found.items()}):
        rounding.assert_as_near(result, plain.rounded, plain.exact)


def test_a_packed_weight_takes_what_is_planned_and_keeps_nothing_more(checkpoint: Path) -> None:
    linear = nn.Linear(512, 1024, bias=False, dtype=torch.bfloat16)
    packed = NF4Linear(linear, torch.device("cpu"))
    stored = packed.weight.nbytes + sum(packed.get_buffer(f"weight_{name}").nbytes for name in ("absmax", "nested"))
    stored -= 4 * NESTED
    assert stored == packed_bytes(512 * 1024)
    networks = [open_base(checkpoint, torch.bfloat16, "cpu", quantize) for quantize in (None, "nf4")]
    for network in networks:
        inject_lora(network, LORA)
        network.train()
    assert saved_bytes(networks[0], 12, 3, False) == saved_bytes(networks[1], 12, 3, False)


def test_the_plan_counts_packed_weights(checkpoint: Path) -> None:
    packed = open_base(checkpoint, torch.bfloat16, "cpu", "nf4")
    config, device = packed.config, torch.device("cpu")
    planners = [Planner(config, LORA, torch.bfloat16, 20, 3, 4, device, quantize) for quantize in (None, "nf4")]
    plain, four_bits = (planner.plan(ExecutionPlan(2), 10**9).components for planner in planners)
    weights = sum(p.nbytes for p in packed.parameters())
    modules = [module for module in packed.modules() if isinstance(module, NF4Linear)]
    scales = sum(module.get_buffer("weight_absmax").nbytes for module in modules)
    # Blocks of scales are of 256: in matrices this small most of the one scale in fp32 is not used.
    assert abs(four_bits["base weights"] - weights - scales) < 4 * len(modules)
    assert four_bits["activations"] == plain["activations"]
    at_work = [planner.backward_peak(ExecutionPlan(2), planner.mlp_backward) for planner in planners]
    assert at_work[1] == at_work[0] + max(dense(weight_of(module), torch.bfloat16).nbytes for module in modules)


def test_ejected_it_is_the_packed_base_again(checkpoint: Path, packed: PaliGemma) -> None:
    batch = tiny.batch(tiny.CONFIG, [5, 9])
    before = packed(**batch).logits
    inject_lora(packed, LORA)
    assert torch.equal(packed(**batch).logits, before)
    noise(packed)
    assert not torch.allclose(packed(**batch).logits, before)
    remove_lora(packed)
    assert torch.equal(packed(**batch).logits, before)
    plain = dequantize(packed)
    assert not any(isinstance(module, NF4Linear) for module in plain.modules())
    assert torch.equal(plain(**batch).logits, before)


def test_what_packed_weights_cannot_do_is_refused(checkpoint: Path, packed: PaliGemma, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"language_model.*q_proj, which is kept in NF4: packed weights cannot"):
        inject_lora(packed, LoRAConfig(targets=("language.k_proj",), modules_to_save=("language.q_proj",)))
    with pytest.raises(ValueError, match="only a plain PaliGemma can be saved"):
        packed.save_pretrained(tmp_path)
    plain = PaliGemma.from_pretrained(checkpoint, torch.float32)
    inject_lora(plain, LoRAConfig(targets=("language.k_proj",), modules_to_save=("language.0.q_proj",)))
    save_adapter(plain, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"in NF4, not to be trained in full \(1\): language_model.*q_proj"):
        load_adapter(packed, tmp_path / "adapter")
    inject_lora(packed, LORA)
    with pytest.raises(ValueError, match="an NF4 base cannot hold merged weights"):
        merge_lora(packed)


def test_without_the_library_one_is_told_what_to_install(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match="pip install 'bitsandbytes"):
        open_base(checkpoint, torch.float32, "cpu", "nf4")


def counted(opening: Callable[..., PaliGemma], opened: list[torch.dtype]) -> Callable[..., PaliGemma]:
    """The same, and what it opens is listed."""

    def open_and_count(*arguments: Any, **options: Any) -> PaliGemma:
        opened.append((model := opening(*arguments, **options)).dtype)
        return model

    return open_and_count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("into", ["full", "dequantized"])
def test_merged_both_ways_with_both_drifts(
    checkpoint: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    into: Literal["full", "dequantized"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = open_base(checkpoint, dtype, "cpu", "nf4")
    inject_lora(model, LORA)
    noise(model, 0.1)
    save_adapter(model, tmp_path / "adapter")
    assert trained_on(tmp_path / "adapter") == "nf4"
    with monkeypatch.context() as counting:
        opened: list[torch.dtype] = []
        counting.setattr(PaliGemma, "from_pretrained", counted(PaliGemma.from_pretrained, opened))
        report = merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "merged", dtype, into=into)
    # In NF4, in fp32, as it was written; for "dequantized" the full base too, and fp32 only where that is another.
    assert len(opened) == (4 if into == "dequantized" and dtype == torch.bfloat16 else 3)
    drifts = report.from_nf4
    assert set(drifts) == {"full", "dequantized"}
    assert drifts["dequantized"] < 0.5 * drifts["full"]
    assert len(re.findall("merged into the (full|dequantized) base", str(report))) == 2
    batch = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])
    adapted = dequantize(open_base(checkpoint, dtype, "cpu", None if into == "full" else "nf4"))
    load_adapter(adapted, tmp_path / "adapter")
    with torch.no_grad():
        rounded = adapted(**batch).logits
        merged = PaliGemma.from_pretrained(tmp_path / "merged", dtype)(**batch).logits
        with rounding.KeepFP64():
            exact = rounding.in_dtype(adapted, torch.float64)(**batch).logits
    rounding.assert_as_near(merged, rounded, exact)


def test_only_what_was_trained_on_nf4_goes_into_the_dequantized_base(checkpoint: Path, tmp_path: Path) -> None:
    model = PaliGemma.from_pretrained(checkpoint, torch.float32)
    inject_lora(model, LORA)
    noise(model)
    save_adapter(model, tmp_path / "adapter")
    assert trained_on(tmp_path / "adapter") is None
    with pytest.raises(ValueError, match="was not trained on NF4"):
        merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "merged", into="dequantized")


def test_trained_resumed_evaluated_merged(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A run on NF4, cut in the middle and gone on with, is the uninterrupted one; then the whole way."""
    outputs = tmp_path / "straight", tmp_path / "cut"
    for output in outputs:
        train.main([*arguments(base, output), "model.quantize=nf4", "train.save_every=2"])
    saved = checkpoints(outputs[1] / "checkpoints")
    assert [path.name for path in saved] == ["step-000002", "step-000004"]
    for path in saved[-1].iterdir():
        path.unlink()
    saved[-1].rmdir()
    train.main([*arguments(base, outputs[1]), "model.quantize=nf4", "train.save_every=2"])
    ours, theirs = ((o / "checkpoints/step-000004/trained.safetensors").read_bytes() for o in outputs)
    assert ours == theirs
    adapter = str(outputs[0] / "adapter")
    merge_script.main([adapter, "--output", str(outputs[0] / "merged"), "--dtype", "float32"])
    assert "merged into the dequantized base" in capsys.readouterr().out
    evaluate.main([*arguments(base, outputs[0]), "model.quantize=nf4"])
    image = str(next((base / "data/images").iterdir()))
    question = ["--image", image, "--prompt", "answer en how many shapes are there?", "--dtype", "float32"]
    answers = []
    for quantize in ("auto", "nf4", "none"):
        capsys.readouterr()
        predict.main(["--model", str(base), "--adapter", adapter, *question, "--quantize", quantize])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_training_the_packed_weights_themselves_is_refused(base: Path, tmp_path: Path) -> None:  # noqa: F811
    config, *overrides = arguments(base, tmp_path)
    with pytest.raises(ConfigError, match=r"lora.*packed ones \(model.quantize\) cannot be"):
        load_config(config, [*overrides, "model.quantize=nf4", "lora=null"])


def test_dense_is_the_weight_itself_where_it_is_plain() -> None:
    linear = nn.Linear(3, 2)
    assert dense(weight_of(linear), torch.float32) is linear.weight


def test_packed_weights_count_as_what_they_stand_for(
    checkpoint: Path, packed: PaliGemma, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for model in (packed, PaliGemma.from_pretrained(checkpoint, torch.float32)):
        setup.show_trained(model)
        said.append(capsys.readouterr().out.split(" of ")[1].split()[0])
    assert said[0] == said[1]
