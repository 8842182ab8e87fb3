"""Before a long run: the time it is said to take is the time it takes."""

from __future__ import annotations

import re
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

import train
from data import collate
from finetune.config.schema import RunConfig
from finetune.preflight import probe
from finetune.preflight.dry_run import three_digits
from finetune.preflight.plan import Planner
from finetune.preflight.probe import RandomExamples, StepTime, StepWorkload, images_per_step
from finetune.training.batch_sampler import BatchSampler
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.trainer import LoRATrainer
from model import PaliGemma
from tests.preflight.small_run import BASE, ROOT, arguments, network, run_config

EVERYWHERE = ("language.*", "vision.*", "connector.*")
STEP_TIME = StepTime(encode=0.5, decode=2.0, update=0.25, move=0.125, encode_tflop=3.0, decode_tflop=10.0)


class Clock(TrainerCallback):
    """When each step of a training ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def step_of_the_trainer(run: RunConfig, execution: ExecutionPlan, workload: StepWorkload) -> float:
    """Seconds of a real step, loading and all that the Trainer does included: the median after the first."""
    assert run.train.max_steps is not None
    model, watch = network(run), Clock()
    rows = RandomExamples(model.config, workload, workload.examples)

    class Pairs(RandomExamples):
        def __getitem__(self, pair: Any) -> Any:
            return rows[pair[0]]

    pairs = Pairs(model.config, workload, workload.examples)
    steps = BatchSampler((len(pairs),), workload.examples, 0, run.train.max_steps)
    collated = partial(collate, pad_id=0)
    LoRATrainer(run, model, pairs, steps, execution, collated, save_result=lambda _: None, callbacks=[watch]).train()
    return statistics.median(after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False))


@pytest.mark.parametrize(
    ("targets", "execution"),
    [
        (("language.*",), ExecutionPlan(16)),
        (("language.*",), ExecutionPlan(4, recompute_layers=2)),
        (EVERYWHERE, ExecutionPlan(5)),
    ],
    ids=["at once", "in parts, layers again", "vision too, parts of 5, 5, 5 and 1"],
)
def test_the_probe_takes_a_step_for_what_it_takes_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...], execution: ExecutionPlan
) -> None:
    """Within a factor of two, in this thread's own time: other work on this machine, as much as it is, takes none."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    torch.set_num_threads(1)
    run, workload = run_config(targets, 16, tmp_path / "run"), StepWorkload(16, 16.0, 48, 3)
    ratios = []
    for _ in range(3):
        step_time = probe.time_step(run, network(run), execution, workload, partial(collate, pad_id=0))
        ratios.append(
            step_time.seconds(workload, execution.micro_batch) / step_of_the_trainer(run, execution, workload)
        )
    assert 0.5 < statistics.median(ratios) < 2, ratios


def test_what_is_timed_is_what_was_planned(tmp_path: Path) -> None:
    """By its products: nothing of a step is left out, nothing done twice."""
    run, workload = run_config(("language.*",), 8, tmp_path), StepWorkload(8, 8.0, 48, 3)
    model = network(run)
    for execution in (ExecutionPlan(4), ExecutionPlan(4, recompute_layers=2), ExecutionPlan(4, offload_vision=True)):
        planner = Planner(model.config, run.lora, torch.float32, 48, 3, 8, torch.device("cpu"))
        with sdpa_kernel(SDPBackend.MATH):
            step_time = probe.time_step(run, model, execution, workload, partial(collate, pad_id=0))
        counted = (step_time.decode_tflop + step_time.encode_tflop) / execution.micro_batch
        exact = not execution.recompute_layers
        assert counted == pytest.approx(planner.tflop(execution), rel=1e-6 if exact else 0.05)
        assert step_time.encode_tflop / execution.micro_batch == pytest.approx(planner.flops.image / 1e12, rel=1e-6)


def test_seconds_and_speed_of_a_step_are_sums_of_its_parts() -> None:
    workload = StepWorkload(64, 55.8, 48, 3)  # in micro-batches of 10: 6 of images, 7 of rows
    assert STEP_TIME.seconds(workload, 10) == 0.125 + 6 * 0.5 + 7 * 2.0 + 0.25
    assert STEP_TIME.speed(workload, 10) == (6 * 3.0 + 7 * 10.0) / 17.375


def test_hours_are_steps_times_seconds(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all steps of the run, with the images that its steps have and rows as long as its examples are."""
    asked: list[StepWorkload] = []

    def given(
        run: RunConfig, model: PaliGemma, execution: ExecutionPlan, workload: StepWorkload, collate: Any
    ) -> StepTime:
        asked.append(workload)
        return STEP_TIME

    monkeypatch.setattr("finetune.preflight.dry_run.time_step", given)
    argv = arguments(scenes, tmp_path / "run", "train.max_steps=1000", "train.batch_size=40", "train.micro_batch=20")
    train.main([*argv, "--dry-run", "--probe"])
    out = " ".join(capsys.readouterr().out.split())
    (workload,) = asked
    assert workload.examples == 40
    assert 20 < workload.images < 40  # of 40 images with about 5 questions each
    seconds = 0.125 + 2 * 0.5 + 2 * 2.0 + 0.25
    assert f"a step of 40 examples with {workload.images:.1f} images: {seconds:.2f} s" in out
    assert f"1,000 steps: {1000 * seconds / 3600:.2f} hours" in out
    assert f"{(2 * 3.0 + 2 * 10.0) / seconds:.3g} TFLOP/s" in out
    work = re.search(r"([\d.]+) TFLOP an example in rows of \d+ tokens, answers of \d+, ([\d.,]+) for the run", out)
    assert work is not None, out
    assert float(work[2].replace(",", "")) == pytest.approx(40 * 1000 * float(work[1]), rel=0.01)
    assert 16 + 5 < workload.tokens < 16 + 20
    assert not (tmp_path / "run").exists()


def test_without_data_a_step_is_timed_at_its_longest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((BASE / "config.json").read_text())
    argv = [str(ROOT / "configs/vqav2_8gb.yaml"), f"model.path={tmp_path}", "model.revision=null", "model.device=cpu"]
    more = ["train.batch_size=2", "model.dtype=float32", "data.train.questions=absent.json", "memory.budget_gib=4"]
    train.main([*argv, *more, "--dry-run", "--probe"])
    out = " ".join(capsys.readouterr().out.split())
    assert "in rows of 49 tokens, 8 of them supervised" in out
    assert "a step of 2 examples with 2.0 images" in out
    assert "TFLOP an example in rows of 49 tokens, answers of 8 it fits" in out
    assert "hours" not in out


def test_a_probe_without_a_dry_run_is_a_mistake(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--probe times the steps that --dry-run plans: give both"):
        train.main([*arguments(scenes, tmp_path), "--probe"])


def test_the_device_is_waited_for_before_and_after_each_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first call, which warms up, is not among them."""
    events: list[str] = []
    clock = iter([10.0, 13.0, 20.0, 21.0, 30.0, 38.0])
    monkeypatch.setattr(probe, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    seconds, _ = probe.median_time(lambda: events.append("part"), torch.device("cpu"))
    assert events == ["part"] + ["wait", "part", "wait"] * 3
    assert seconds == 3.0


def test_a_cuda_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    probe.synchronize(torch.device("cpu"))
    assert not waited
    probe.synchronize(torch.device("cuda:0"))
    assert waited == [torch.device("cuda:0")]


def test_too_little_memory_is_said_with_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = run_config(("language.*",), 4, tmp_path)
    monkeypatch.setattr(GradientAccumulation, "micro_step", full)
    with pytest.raises(ValueError, match=r"ran out of memory with micro-batches of 4, .* lower memory\.budget_gib"):
        probe.time_step(run, network(run), ExecutionPlan(4), StepWorkload(4, 4.0, 40, 3), partial(collate, pad_id=0))


def test_images_of_a_step_are_counted_once() -> None:
    assert images_per_step(BatchSampler((8,), 8, 0, 3), ["a", "b"] * 4) == 2
    assert images_per_step(BatchSampler((6,), 2, 0, 300), ["a", "b", "c", "d", "e", "f"]) == 2


def test_a_dry_run_of_a_small_run_shows_its_work_and_a_step_larger_than_the_data(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three digits of it, whatever its size."""
    argv = arguments(scenes, tmp_path / "run", "train.max_steps=2", "data.train.count=8", "--dry-run")
    for size, warned in ((8, False), (9, True)):
        train.main([*argv, f"train.batch_size={size}", "train.micro_batch=2"])
        out = " ".join(capsys.readouterr().out.split())
        work = re.search(r"([\d.]+) TFLOP an example in .*?, ([\d.,]+) for the run", out)
        assert work is not None, out
        assert float(work[2]) == pytest.approx(2 * size * float(work[1]), rel=0.01)
        warning = "warning: a step of train.batch_size=9 is more than the 8 examples of data.train"
        assert (warning in out) == warned


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0000123456, "0.0000123"), (0.5, "0.500"), (2.4649, "2.46"), (99.96, "100.0"), (327487.6, "327,488"), (0, "0")],
)
def test_three_digits_are_shown_without_an_exponent(value: float, shown: str) -> None:
    assert three_digits(value) == shown
