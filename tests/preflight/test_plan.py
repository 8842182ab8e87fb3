"""The plan: what it counts without memory is what the network keeps, and what it chooses fits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from finetune import LoRAConfig, inject_lora
from finetune.config.load import load_config
from finetune.preflight.count import TERA, flop_counter, saved_bytes
from finetune.preflight.plan import GIB, Planner
from finetune.preflight.run_plan import assumed_lengths, plan_run, require_fit, spill_warning
from finetune.system import distributed
from finetune.system.allocator import VARIABLES, expandable_segments, reserved_bytes, use_expandable_segments
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from model.ops import bf16_on_cpu
from model.ops.bf16_on_cpu import CPU, native_products
from tests import tiny

NARROW = PaliGemmaConfig(
    VisionConfig(48, 96, 2, 4, image_size=56), TextConfig(64, 256, 4, 4, 1, 32, vocab_size=512), image_token_id=500
)
MIDDLE = PaliGemmaConfig(
    VisionConfig(48, 96, 2, 4, image_size=112), TextConfig(256, 1024, 4, 4, 1, 64, vocab_size=8192), image_token_id=8000
)
LONG_ROWS = PaliGemmaConfig(
    VisionConfig(48, 96, 2, 4, image_size=224), TextConfig(128, 1024, 4, 4, 1, 32, vocab_size=8192), image_token_id=8000
)
TARGETS = {
    "language": LoRAConfig(rank=4),
    "attention": LoRAConfig(rank=4, targets=("language.q_proj", "language.v_proj")),
    "upper layers": LoRAConfig(rank=4, targets=("language.2.*", "language.3.*")),
    "both towers": LoRAConfig(rank=4, targets=("language.*", "vision.*"), dropout=0.1),
    "in full": LoRAConfig(rank=4, targets=("language.down_proj",), modules_to_save=("connector.linear",)),
}
EXECUTION_PLANS = [ExecutionPlan(1), ExecutionPlan(1, recompute_layers=1), ExecutionPlan(1, recompute_layers=4)]


def planner(lora: LoRAConfig | None, tokens: int = 40, supervised: int = 3, device: str = "cuda") -> Planner:
    return Planner(NARROW, lora, torch.bfloat16, tokens, supervised, 8, torch.device(device))


@cache
def planner_of(targets: str, tokens: int, supervised: int) -> Planner:
    """`planner`, made once for all execution plans that it is asked about."""
    return planner(TARGETS.get(targets), tokens, supervised)


@pytest.mark.parametrize("execution", EXECUTION_PLANS, ids=str)
@pytest.mark.parametrize("shape", [(1, 40, 3), (4, 64, 8), (3, 129, 1)])
@pytest.mark.parametrize("targets", TARGETS)
def test_planned_activations_are_what_saved_tensor_hooks_count(
    targets: str, shape: tuple[int, int, int], execution: ExecutionPlan
) -> None:
    rows, tokens, supervised = shape
    model = PaliGemma(NARROW).to(torch.bfloat16)
    inject_lora(model, TARGETS[targets])
    model.train()
    model.language_model.model.set_recompute(execution.recompute_layers)
    model.language_model.model.fold_heads = False  # as on the card that is planned for
    made = planner_of(targets, tokens, supervised)
    with native_products():  # as there, too
        counted = sum(saved_bytes(model, tokens, supervised, made.vision_trains, rows))
    planned = made.activations(dataclasses.replace(execution, micro_batch=rows))
    assert planned == pytest.approx(counted, rel=0.03)


def test_a_real_step_saves_what_was_planned() -> None:
    """Through `forward`, padding and labels, in a network of the published proportions of gate and up."""
    model = PaliGemma(NARROW).to(torch.bfloat16)
    model.language_model.model.fold_heads = False  # as on the card that is planned for
    inject_lora(model, TARGETS["language"])
    model.train()
    hf = NARROW.to_hf(torch.bfloat16)
    batch = tiny.batch(hf, [16, 20, 17], [3, 3, 3])
    features = model.encode_images(batch.pop("pixel_values")).detach()
    saved, known, alive = 0, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        if tensor.untyped_storage().data_ptr() not in known:
            known.add(tensor.untyped_storage().data_ptr())
            alive.append(tensor)
            saved += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, image_features=features)
    planned = planner(TARGETS["language"], tokens=16 + 23, supervised=3)
    logits = 9 * 512 * 4  # log-softmax in fp32
    assert planned.activations(ExecutionPlan(3)) == pytest.approx(saved - logits, rel=0.03)


def measured_peak(step: Callable[[], object]) -> int:
    """Bytes that the allocator had given out at most during a step, beyond what it had before."""
    with profile(use_kineto=True, profile_memory=True) as profiled:
        step()
    assert profiled.kineto_results is not None
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@cache
def planner_in_fp32(config: PaliGemmaConfig, tokens: int, answer: int) -> Planner:
    """On the CPU, for steps of up to four rows in one micro-batch."""
    return Planner(config, TARGETS["language"], torch.float32, tokens, answer, 4, torch.device("cpu"))


@pytest.mark.parametrize("layers", [0, 2, 4])
@pytest.mark.parametrize(("rows", "text", "answer"), [(4, 24, 3), (4, 140, 127), (1, 140, 127), (4, 140, 40)])
@pytest.mark.parametrize("config", [MIDDLE, LONG_ROWS], ids=["short rows", "long rows"])
def test_the_planned_peak_is_what_the_allocator_gives(
    config: PaliGemmaConfig, rows: int, text: int, answer: int, layers: int
) -> None:
    """Within 10%, for short and for long answers, of what comes and goes in a step; in fp32 on the CPU."""
    execution = ExecutionPlan(rows, recompute_layers=layers)
    model = PaliGemma(config)
    inject_lora(model, TARGETS["language"])
    model.train().language_model.model.set_recompute(layers)
    batch = tiny.batch(config.to_hf(torch.float32), [1 + text - answer] * rows, [answer] * rows)
    features = model.encode_images(batch.pop("pixel_values")).detach()

    def step() -> None:
        loss = model(**batch, image_features=features).loss
        assert loss is not None
        loss.backward()

    step()  # makes the gradients
    made = planner_in_fp32(config, config.vision.num_patches + 1 + text, answer)
    planned = made.plan(execution, 10**12).components
    names = ("activations", "logits", "buffers of a layer's backward (estimate)")
    assert sum(planned[name] for name in names) == pytest.approx(measured_peak(step), rel=0.1)


@pytest.mark.parametrize("execution", EXECUTION_PLANS, ids=str)
@pytest.mark.parametrize(("prompt", "answer"), [(17, 3), (4, 127)])
@pytest.mark.parametrize("targets", [*TARGETS, "no adapters"])
def test_planned_flops_are_those_of_a_real_step(
    targets: str, prompt: int, answer: int, execution: ExecutionPlan
) -> None:
    """Of a padless row with values, image included; what is recomputed to two per cent, the rest exactly."""
    lora = TARGETS.get(targets)
    model = PaliGemma(NARROW)
    if lora:
        inject_lora(model, lora)
    model.train().language_model.model.set_recompute(execution.recompute_layers)
    made = planner_of(targets, 16 + prompt + answer, answer)
    batch = tiny.batch(NARROW.to_hf(torch.bfloat16), [prompt], [answer])
    # The products of the math kernel are seen by the counter, those of other kernels are not.
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        with torch.set_grad_enabled(made.vision_trains):
            features = model.encode_images(batch.pop("pixel_values"))
        loss = model(**batch, image_features=features).loss
        assert loss is not None
        loss.backward()
    exact = execution.recompute_layers == 0
    counted = counter.get_total_flops() / TERA
    assert made.tflop(execution) == pytest.approx(counted, rel=1e-9 if exact else 0.02)


def test_the_chosen_plan_fits_and_less_memory_means_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "finetune.preflight.plan.reserved_bytes", lambda sizes, _: sum(sizes)
    )  # one segment holds it all
    made = planner(TARGETS["language"])
    free = made.plan(ExecutionPlan(8), 10**12)
    assert made.choose(10**12).execution == ExecutionPlan(8)
    least = made.choose(0)
    assert not least.fits
    assert least.total == min(made.plan(execution, 0).total for execution in made.candidates(None, None))
    assert (least.execution.micro_batch, least.execution.offload_vision) == (1, True)
    assert least.execution.recompute_layers > 0
    costs = []
    for budget in torch.linspace(least.total, free.total, 12, dtype=torch.float64).ceil().long().tolist():
        plan = made.choose(budget)
        assert plan.fits
        costs.append(made.cost(plan.execution))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_what_is_given_is_taken() -> None:
    made = planner(TARGETS["language"])
    assert made.choose(10**12, micro_batch=3, recompute=2).execution == ExecutionPlan(3, 2)
    assert made.choose(10**12, recompute=0).execution == ExecutionPlan(8)


def test_the_vision_encoder_stays_where_it_is_trained_or_has_nowhere_to_go() -> None:
    assert not planner(TARGETS["both towers"]).choose(0).execution.offload_vision
    assert not planner(TARGETS["language"], device="cpu").choose(0).execution.offload_vision
    everything = planner(None).plan(ExecutionPlan(1), 0)
    assert everything.components["base weights"] == 0
    assert everything.components["optimizer state"] == 2 * everything.components["gradients"] > 0


def test_the_published_3b_is_counted_from_its_dimensions() -> None:
    made = Planner(PaliGemmaConfig(), LoRAConfig(rank=8), torch.bfloat16, 272, 3, 64, torch.device("cuda"))
    plan = made.plan(ExecutionPlan(1), 8 * GIB)
    assert plan.components["base weights"] == 2 * 2_923_466_480
    assert plan.components["trained weights"] == 4 * 8 * 1_225_728
    # Of a token in a layer: the inputs of two norms, q, k, v, what attention gives, gate and up.
    a_token = 2 * (2 * 2048 + 2 * 2048 + 2 * 256 + 2 * 16384) + 2 * 4 + 8 * 4
    assert made.saved.layers[5] == 272 * a_token
    assert made.saved.recomputed_layers[5] == 272 * 2 * 2048


@pytest.mark.parametrize("cpu", [CPU(True, False, False), CPU(True, True, True)], ids=["upcasts", "native"])
def test_a_plan_for_a_card_does_not_depend_on_the_cpu_that_makes_it(cpu: CPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16 instructions saves no log-sum-exp of attention, which it recomputes in fp32; a card does."""
    monkeypatch.setattr(bf16_on_cpu, "this_cpu", lambda: cpu)
    on_a_card, here = planner(TARGETS["language"]), planner(TARGETS["language"], device="cpu")
    log_sum_exp = 4 * NARROW.text.num_attention_heads * 40
    assert on_a_card.saved.layers[1] - here.saved.layers[1] == (0 if cpu.bf16_instructions else log_sum_exp)


def test_the_flops_of_the_published_3b_by_hand() -> None:
    """One row of 272 tokens, 3 of them supervised, rank 16: 2.33 TFLOP."""
    made = Planner(PaliGemmaConfig(), LoRAConfig(rank=16), torch.bfloat16, 272, 3, 1, torch.device("cuda"))
    mlp, query_and_output, key_and_value = 3 * 2048 * 16384, 2 * 2048 * 2048, 2 * 2048 * 256
    vision = 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 588 * 1152 + 1152 * 2048
    image = 2 * 256 * vision + 27 * 4 * 256**2 * 1152
    attended = 2 * (17 * 272 + 3) * 272 * 2048  # multiplications of scores and of their use, all heads
    frozen = 17 * 272 * (mlp + query_and_output + key_and_value) + 3 * (mlp + query_and_output) + 272 * key_and_value
    low_rank = 17 * 272 * 16 * 68_096  # of a layer, in and out of all seven linears together
    by_hand = image + 2 * 2 * (frozen + 3 * 2048 * 257216) + 2 * 3 * attended + 2 * 3.5 * low_rank
    assert made.tflop(ExecutionPlan(1)) == pytest.approx(by_hand / TERA, rel=2e-3)
    assert made.tflop(ExecutionPlan(1)) == pytest.approx(2.33, abs=0.005)
    assert made.tflop(ExecutionPlan(1), images=0) == pytest.approx(
        made.tflop(ExecutionPlan(1)) - image / TERA, rel=1e-9
    )
    again = 2 * 272 * (2 * 2048 * 16384 + query_and_output + key_and_value) / TERA  # all of a layer but down
    assert made.tflop(ExecutionPlan(1, 5)) - made.tflop(ExecutionPlan(1)) == pytest.approx(5 * again, rel=0.03)


def test_what_the_configuration_says_of_itself_is_what_the_plan_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """GiB and rows with and without a card, TFLOP an example: in the comments of configs/vqav2_8gb.yaml."""
    path = Path(__file__).parents[2] / "configs/vqav2_8gb.yaml"
    said = " ".join(path.read_text().replace("#", "").split())
    monkeypatch.setattr("finetune.preflight.plan.expandable_segments", lambda: True)
    run = load_config(path, ["model.device=cpu", "memory.budget_gib=7.4"])
    planned = plan_run(run, PaliGemmaConfig(), assumed_lengths(run))
    made, without = planned.planner, planned.plan
    on_cuda = load_config(path, ["model.device=cuda", "memory.budget_gib=7.4"])
    planned = plan_run(on_cuda, PaliGemmaConfig(), assumed_lengths(run))
    there, on_a_card = planned.planner, planned.plan
    assert without.execution == ExecutionPlan(2)
    assert on_a_card.execution == ExecutionPlan(4, offload_vision=True)
    asked = run.evaluation.batch_size
    assert there.evaluation_batch(asked, there.supervised, on_a_card.budget) == asked
    monkeypatch.setattr("finetune.preflight.plan.expandable_segments", lambda: False)
    fixed = there.choose(on_a_card.budget)
    assert fixed.execution == ExecutionPlan(3, offload_vision=True)
    assert f"three rows in {fixed.total / GIB:.2f} GiB" in said
    for plan, rows in ((without, "two rows"), (on_a_card, "four rows")):
        base, activations = (plan.components[name] / GIB for name in ("base weights", "activations"))
        for number in (f"{plan.total / GIB:.2f} GiB", f"base weights {base:.2f}", rows, f" {activations:.2f}"):
            assert number in said, number
        assert f"Time: {made.tflop(plan.execution):.2f} TFLOP" in said
    assert run.train.epochs is not None
    examples = run.train.epochs * 44_376
    assert f"{examples:,.0f} examples, {examples * made.tflop(without.execution) / 14 / 3600:.1f} hours" in said
    assert f"{examples / run.train.batch_size + 1:,.0f} steps" in said


def test_each_of_several_processes_plans_its_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 3)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=9 * GIB))
    run = load_config(Path(__file__).parents[2] / "configs/vqav2_8gb.yaml", ["model.device=cpu"])
    planned = plan_run(run, NARROW, assumed_lengths(run))
    made, plan = planned.planner, planned.plan
    assert (run.train.batch_size, made.batch_size, plan.budget) == (64, 22, 3 * GIB)


def test_dry_run_says_what_fits_from_config_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    config = str(Path(__file__).parents[2] / "configs/vqav2_8gb.yaml")
    argv = [config, f"model.path={tmp_path}", "model.revision=null", "model.device=cpu", "--dry-run"]
    train.main([*argv, "memory.budget_gib=4"])
    out = capsys.readouterr().out
    assert "optimizer" in out
    missing = "its data cannot be read: data.train.questions: downloads/vqav2/"
    assert f"it fits where no text is longer than assumed; but a run cannot start, for {missing}" in out
    assert not out.rstrip().endswith("it fits")
    assert "steps and lengths are not known, for the data cannot be read" in " ".join(out.split())
    assert "rows of 37 tokens, answers of 8 (assumed: the data cannot be read)" in " ".join(out.split())
    with pytest.raises(ValueError, match=r"this does not fit: 0\.\d+ GiB are needed at least, the budget is 0\.10"):
        train.main([*argv, "memory.budget_gib=0.1"])


def test_a_card_can_be_planned_for_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    config = str(Path(__file__).parents[2] / "configs/vqav2_8gb.yaml")
    argv = [config, f"model.path={tmp_path}", "model.revision=null", "model.device=cuda:7", "--dry-run"]
    train.main([*argv, "memory.budget_gib=4"])
    assert "memory on cuda:7" in capsys.readouterr().out
    with pytest.raises(ValueError, match="device 'cuda:7' is not there"):
        train.main(argv)
    with pytest.raises(ValueError, match="device 'cuda:7' is not there"):
        train.main([*argv, "memory.budget_gib=4", "--probe"])


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ("memory.budget_gib=0.1", "raise memory.budget_gib"),
        ("train.micro_batch=32", "leave train.micro_batch and train.recompute at auto"),
        ("model.dtype=float32", "model.dtype=bfloat16"),
        ("lora=null", "train an adapter"),
        ("lora.rank=4", "model.quantize=nf4"),
    ],
)
def test_what_does_not_fit_is_told_what_helps(change: str, fix: str) -> None:
    path, budget = Path(__file__).parents[2] / "configs/vqav2_8gb.yaml", "memory.budget_gib=0.1"
    run = load_config(path, ["model.device=cpu", budget, change])
    planned = plan_run(run, NARROW, assumed_lengths(run))
    with pytest.raises(ValueError, match=fix):
        require_fit(run, planned)
    plainly = load_config(path, ["model.device=cpu", budget, "model.quantize=nf4"])
    with pytest.raises(ValueError, match="does not fit") as found:
        require_fit(plainly, planned)
    assert fix not in str(found.value) or "budget" in fix


MIB = 2**20


@pytest.mark.parametrize(
    ("sizes", "fixed", "expandable"),
    [
        ([1], 2 * MIB, 2 * MIB),
        ([MIB] * 3, 4 * MIB, 4 * MIB),
        ([MIB + 1], 20 * MIB, 20 * MIB),
        ([8 * MIB] * 4, 40 * MIB, 40 * MIB),  # two in a segment, and 4 MiB of each are left
        ([8 * MIB] * 5, 60 * MIB, 40 * MIB),
        ([8 * MIB, 8 * MIB, 4 * MIB], 20 * MIB, 20 * MIB),
        ([64 * MIB] * 2, 128 * MIB, 140 * MIB),
        ([64 * MIB - 512], 64 * MIB, 80 * MIB),
        ([10 * MIB + 1, 1], 14 * MIB, 22 * MIB),
        ([513] * 2048, 2 * MIB, 2 * MIB),
        ([513] * 2049, 4 * MIB, 4 * MIB),
    ],
)
def test_what_the_allocator_reserves(sizes: list[int], fixed: int, expandable: int) -> None:
    assert reserved_bytes(sizes, expandable=False) == fixed
    assert reserved_bytes(sizes, expandable=True) == expandable


def test_segments_expand_where_they_can_unless_a_person_has_set_the_allocator_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def after(system: str, release: str, **variables: str) -> tuple[str | None, bool]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("platform.system", lambda: system)
            patch.setattr("platform.release", lambda: release)
            for name in VARIABLES:
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            before = expandable_segments()
            use_expandable_segments()
            found = os.environ.get("PYTORCH_ALLOC_CONF")
            os.environ.pop("PYTORCH_ALLOC_CONF", None)
            return found, before

    assert after("Linux", "6.8.0-45-generic") == ("expandable_segments:True", True)
    assert after("Linux", "5.15.90.1-microsoft-standard-WSL2") == (None, False)
    assert after("Windows", "11") == (None, False)
    theirs = "max_split_size_mb:64"
    assert after("Linux", "6.8", PYTORCH_ALLOC_CONF=theirs) == (theirs, False)
    assert after("Linux", "6.8", PYTORCH_CUDA_ALLOC_CONF=theirs) == (None, False)
    assert after("Windows", "11", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True") == (None, True)


@cache
def published_on_a_card() -> Planner:
    return Planner(PaliGemmaConfig(), LoRAConfig(rank=8), torch.bfloat16, 289, 8, 64, torch.device("cuda"))


def test_a_card_that_grows_no_segments_is_planned_for_with_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.preflight.plan.expandable_segments", lambda: True)
    made = published_on_a_card()
    grown = made.plan(ExecutionPlan(2), 0)
    monkeypatch.setattr("finetune.preflight.plan.expandable_segments", lambda: False)
    fixed = made.plan(ExecutionPlan(2), 0)
    rounded = "weights rounded to segments"
    assert grown.components[rounded] < 22 * MIB
    assert 80 * MIB < fixed.components[rounded] < 130 * MIB
    assert fixed.components["fragmentation (estimate)"] > 1.9 * grown.components["fragmentation (estimate)"]
    on_cpu = Planner(NARROW, TARGETS["language"], torch.bfloat16, 40, 3, 8, torch.device("cpu")).plan(
        ExecutionPlan(2), 0
    )
    assert not [name for name in on_cpu.components if "segments" in name or "cuBLAS" in name or "attention" in name]


def test_an_evaluation_is_cut_to_the_budget() -> None:
    made = published_on_a_card()
    takes = [made.evaluation(size, 16) for size in (1, 2, 8, 16)]
    assert takes == sorted(takes)
    assert takes[0] > 2 * 2_923_466_480
    assert made.evaluation_batch(16, 16, takes[-1]) == 16
    assert made.evaluation_batch(16, 16, takes[2]) == 8
    assert made.evaluation_batch(16, 16, takes[0] - 1) == 1


def test_windows_and_wsl_are_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(system: str, release: str, device: str) -> Any:
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("platform.release", lambda: release)
        return spill_warning(torch.device(device))

    assert "Sysmem Fallback" in on("Windows", "11", "cuda")
    assert "Sysmem Fallback" in on("Linux", "5.15.90.1-microsoft-standard-WSL2", "cuda")
    assert on("Linux", "6.8.0-45-generic", "cuda") is None
    assert on("Windows", "11", "cpu") is None


@pytest.mark.parametrize("lora", [TARGETS["language"], None], ids=["language", "in full"])
def test_processes_that_share_the_decoders_layers_hold_a_shard_of_each(lora: LoRAConfig | None) -> None:
    """And two layers whole while they work."""
    alone, shared = (planner(lora, device="cpu") for _ in range(2))  # on a card so small weights are lost in segments
    shared.shard_decoder(8)
    layers = shared.model.language_model.model.layers
    held = sum(parameter.nbytes for parameter in layers.parameters())
    assert alone.frozen + alone.trained - shared.frozen - shared.trained == pytest.approx(held * 7 / 8, abs=300)
    trained = sum(parameter.nbytes for parameter in layers.parameters() if parameter.requires_grad)
    assert alone.trained - shared.trained == pytest.approx(trained * 7 / 8, abs=300)
    gathered = 2 * sum(parameter.nbytes for parameter in layers[0].parameters())
    assert shared.gathered - alone.gathered == gathered
    saved = alone.plan(ExecutionPlan(1), 0).total - shared.plan(ExecutionPlan(1), 0).total
    assert 0 < 0.9 * (held * 7 / 8 - gathered) < saved
