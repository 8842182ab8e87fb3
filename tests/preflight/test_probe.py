"""Before a long run: the time it is said to take is the time it takes, and whether it learns at all is found out."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import time
from collections.abc import Iterator
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
from data.synthetic.scenes import write as write_scenes
from finetune import LoRAConfig, inject_lora
from finetune.config.schema import RunConfig
from finetune.preflight import probe
from finetune.preflight.dry_run import three_digits
from finetune.preflight.plan import Planner
from finetune.preflight.probe import MadeUp, Pace, Shape, Trial, learn_by_heart, pictures_of, trial_config
from finetune.training.batch_sampler import BatchSampler
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.trainer import LoRATrainer
from model import PaliGemma
from model.random_init import from_random

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/tiny-base"
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
EVERYWHERE = ("language.*", "vision.*", "connector.*")
PACE = Pace(pictures=0.5, rows=2.0, update=0.25, move=0.125, pictures_work=3.0, rows_work=10.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    write_scenes(directory, scenes=40, seed=1, split="train2014")
    return directory


def arguments(scenes: Path, output: Path, *more: str) -> list[str]:
    """The quickstart on a few scenes."""
    files = {
        "questions": f"{scenes}/v2_OpenEnded_mscoco_train2014_questions.json",
        "annotations": f"{scenes}/v2_mscoco_train2014_annotations.json",
        "images": f"{scenes}/images",
    }
    data = f"data={{train: {json.dumps(files)}, answers: majority, workers: 0}}"
    changes = [f"model.path={BASE}", "model.device=cpu", data, "train.eval_every=null", f"output={output}"]
    return [QUICKSTART, *changes, *more]


def run_config(targets: tuple[str, ...], batch_size: int, output: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(BASE), "dtype": "float32", "device": "cpu"},
            "data": {"train": {"jsonl": "unused.jsonl"}, "workers": 0},
            "lora": {"targets": list(targets)},
            "train": {"max_steps": 4, "batch_size": batch_size, "micro_batch": batch_size},
            "output": str(output),
        }
    )


def network(run: RunConfig) -> PaliGemma:
    model = from_random(BASE, 0)
    assert run.lora is not None
    inject_lora(model, run.lora)
    return model


class Clock(TrainerCallback):
    """When each step of a training ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def step_of_the_trainer(run: RunConfig, mode: ExecutionPlan, shape: Shape) -> float:
    """Seconds of a real step, loading and all that the Trainer does included: the median after the first."""
    assert run.train.max_steps is not None
    model, watch = network(run), Clock()
    rows = MadeUp(model.config, shape, shape.examples)

    class Pairs(MadeUp):
        def __getitem__(self, pair: Any) -> Any:
            return rows[pair[0]]

    pairs = Pairs(model.config, shape, shape.examples)
    steps = BatchSampler(len(pairs), shape.examples, 0, run.train.max_steps)
    collated = partial(collate, pad_id=0)
    LoRATrainer(run, model, pairs, steps, mode, collated, save_result=lambda _: None, callbacks=[watch]).train()
    return statistics.median(after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False))


@pytest.mark.parametrize(
    ("targets", "mode"),
    [
        (("language.*",), ExecutionPlan(16)),
        (("language.*",), ExecutionPlan(4, recompute_layers=2)),
        (EVERYWHERE, ExecutionPlan(5)),
    ],
    ids=["at once", "in parts, layers again", "vision too, parts of 5, 5, 5 and 1"],
)
def test_the_probe_takes_a_step_for_what_it_takes_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...], mode: ExecutionPlan
) -> None:
    """Within a factor of two, in this thread's own time: other work on this machine, as much as it is, takes none."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    torch.set_num_threads(1)
    run, shape = run_config(targets, 16, tmp_path / "run"), Shape(16, 16.0, 48, 3)
    ratios = []
    for _ in range(3):
        pace = probe.probe(run, network(run), mode, shape, partial(collate, pad_id=0))
        ratios.append(pace.seconds(shape, mode.micro_batch) / step_of_the_trainer(run, mode, shape))
    assert 0.5 < statistics.median(ratios) < 2, ratios


def test_what_is_timed_is_what_was_planned(tmp_path: Path) -> None:
    """By its products: nothing of a step is left out, nothing done twice."""
    run, shape = run_config(("language.*",), 8, tmp_path), Shape(8, 8.0, 48, 3)
    model = network(run)
    for mode in (ExecutionPlan(4), ExecutionPlan(4, recompute_layers=2), ExecutionPlan(4, offload_vision=True)):
        planner = Planner(model.config, run.lora, torch.float32, 48, 3, 8, torch.device("cpu"))
        with sdpa_kernel(SDPBackend.MATH):
            pace = probe.probe(run, model, mode, shape, partial(collate, pad_id=0))
        counted = (pace.rows_work + pace.pictures_work) / mode.micro_batch
        exact = not mode.recompute_layers
        assert counted == pytest.approx(planner.work(mode), rel=1e-6 if exact else 0.05)
        assert pace.pictures_work / mode.micro_batch == pytest.approx(planner.counted.picture / 1e12, rel=1e-6)


def test_seconds_and_speed_of_a_step_are_sums_of_its_parts() -> None:
    shape = Shape(64, 55.8, 48, 3)  # in micro-batches of 10: 6 of pictures, 7 of rows
    assert PACE.seconds(shape, 10) == 0.125 + 6 * 0.5 + 7 * 2.0 + 0.25
    assert PACE.speed(shape, 10) == (6 * 3.0 + 7 * 10.0) / 17.375


def test_hours_are_steps_times_seconds(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all steps of the run, with the pictures that its steps have and rows as long as its examples are."""
    asked: list[Shape] = []

    def given(run: RunConfig, model: PaliGemma, mode: ExecutionPlan, shape: Shape, collate: Any) -> Pace:
        asked.append(shape)
        return PACE

    monkeypatch.setattr("finetune.preflight.dry_run.probe", given)
    argv = arguments(scenes, tmp_path / "run", "train.max_steps=1000", "train.batch_size=40", "train.micro_batch=20")
    train.main([*argv, "--dry-run", "--probe"])
    out = " ".join(capsys.readouterr().out.split())
    (shape,) = asked
    assert shape.examples == 40
    assert 20 < shape.pictures < 40  # of 40 pictures with about 5 questions each
    seconds = 0.125 + 2 * 0.5 + 2 * 2.0 + 0.25
    assert f"a step of 40 examples with {shape.pictures:.1f} images: {seconds:.2f} s" in out
    assert f"1,000 steps: {1000 * seconds / 3600:.2f} hours" in out
    assert f"{(2 * 3.0 + 2 * 10.0) / seconds:.3g} TFLOP/s" in out
    work = re.search(r"([\d.]+) TFLOP an example in rows of \d+ tokens, answers of \d+, ([\d.,]+) for the run", out)
    assert work is not None, out
    assert float(work[2].replace(",", "")) == pytest.approx(40 * 1000 * float(work[1]), rel=0.01)
    assert 16 + 5 < shape.tokens < 16 + 20
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
    monkeypatch.setattr(probe, "wait", lambda device: events.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    seconds, _ = probe.timed(lambda: events.append("part"), torch.device("cpu"))
    assert events == ["part"] + ["wait", "part", "wait"] * 3
    assert seconds == 3.0


def test_a_cuda_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    probe.wait(torch.device("cpu"))
    assert not waited
    probe.wait(torch.device("cuda:0"))
    assert waited == [torch.device("cuda:0")]


def test_too_little_memory_is_said_with_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = run_config(("language.*",), 4, tmp_path)
    monkeypatch.setattr(GradientAccumulation, "micro_step", full)
    with pytest.raises(ValueError, match=r"ran out of memory with micro-batches of 4, .* lower memory\.budget_gib"):
        probe.probe(run, network(run), ExecutionPlan(4), Shape(4, 4.0, 40, 3), partial(collate, pad_id=0))


def test_pictures_of_a_step_are_counted_once() -> None:
    assert pictures_of(BatchSampler(8, 8, 0, 3), ["a", "b"] * 4) == 2
    assert pictures_of(BatchSampler(6, 2, 0, 300), ["a", "b", "c", "d", "e", "f"]) == 2


def test_examples_are_learned_by_heart_and_nothing_is_kept(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*arguments(scenes, tmp_path / "run"), "--overfit", "8"])
    out = " ".join(capsys.readouterr().out.split())
    found = re.search(r"it learns: 8 of 8 answered as wanted after (\d+) steps, loss (\S+) -> (\S+)", out)
    assert found is not None, out
    assert int(found[1]) < 100  # it stopped as soon as it could
    assert float(found[3]) < 0.5 * float(found[2])
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_learn_is_said_not_to(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a hundred steps, of which none writes a checkpoint; with question, wanted and given answer."""
    saved: list[Any] = []
    monkeypatch.setattr(LoRATrainer, "_save_checkpoint", lambda *given: saved.append(given))
    argv = [*arguments(scenes, tmp_path / "run", "train.learning_rate=1e-9", "train.save_every=10"), "--overfit", "3"]
    with pytest.raises(
        ValueError, match=r"it has not learned them: 0 of 3 .* after 100 steps, .*learning_rate \(1e-09\)"
    ):
        train.main(argv)
    assert saved == []
    assert list(tmp_path.iterdir()) == []
    questions = json.loads((scenes / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]
    out = capsys.readouterr().out
    assert all(question["question"] in out for question in questions[:3])


@pytest.mark.parametrize("count", ["0", "-1", "100000"])
def test_more_examples_than_there_are_cannot_be_learned(scenes: Path, tmp_path: Path, count: str) -> None:
    with pytest.raises(ValueError, match=rf"--overfit {count}: expected 1 to \d\d\d, the examples of data.train"):
        train.main([*arguments(scenes, tmp_path), "--overfit", count])


def test_what_was_known_before_is_not_learned() -> None:
    right, wrong = ("is it red?", "yes", "yes"), ("is it red?", "yes", "no")
    assert Trial([2.0, 0.1], [right, right]).learned
    assert not Trial([2.0, 0.1], [right, wrong]).learned
    assert not Trial([0.1, 0.09], [right, right]).learned


def test_a_trial_differs_from_the_run_in_its_size_and_its_course(tmp_path: Path) -> None:
    run = run_config(("language.*",), 16, tmp_path)
    run = run.model_copy(update={"lora": LoRAConfig(rank=4, dropout=0.5)})
    trial = trial_config(run, 6)
    assert trial.lora == LoRAConfig(rank=4)
    assert (trial.train.batch_size, trial.train.micro_batch, trial.train.max_steps) == (6, 6, 100)
    assert (trial.train.schedule, trial.train.warmup, trial.data.answers) == ("constant", 0.05, "majority")
    assert trial_config(run, 32).train.micro_batch == 16
    assert trial.train.learning_rate == run.train.learning_rate
    assert RunConfig.model_validate(trial.model_dump()) == trial  # what is copied is not checked: this is


def tried(tmp_path: Path, mode: ExecutionPlan, ask: Any) -> Trial:
    """A trial to learn four made-up examples."""
    run = trial_config(run_config(("language.*",), 4, tmp_path), 4)
    model = network(run)
    made = MadeUp(model.config, Shape(4, 4.0, 24, 2), 4)

    class Pairs(MadeUp):
        def __getitem__(self, pair: Any) -> Any:
            return made[pair[0]]

    return learn_by_heart(run, model, Pairs(model.config, made.shape, 4), mode, partial(collate, pad_id=0), ask)


def test_the_network_is_asked_every_five_steps_while_all_of_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the vision tower leaves the device; the first right answers with a lower loss end the trial."""
    inside, asked = 0, []
    on_device = GradientAccumulation.vision_on_device

    @contextlib.contextmanager
    def noted(accumulation: GradientAccumulation) -> Iterator[None]:
        nonlocal inside
        with on_device(accumulation):
            inside += 1
            yield
            inside -= 1

    def ask() -> list[tuple[str, str, str]]:
        asked.append(inside)
        return [("?", "yes", "yes" if len(asked) >= 3 else "no")] * 4

    monkeypatch.setattr(GradientAccumulation, "vision_on_device", noted)
    monkeypatch.setattr(Trial, "learned", property(lambda trial: trial.right == 4))
    trial = tried(tmp_path, ExecutionPlan(2, offload_vision=True), ask)
    assert asked == [1, 1, 1]
    assert len(trial.losses) == 15
    assert trial.right == 4


def test_an_infinite_loss_names_the_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise FloatingPointError("step 1: the loss is inf")

    monkeypatch.setattr(LoRATrainer, "training_step", broken)
    with pytest.raises(ValueError, match=r"lower train\.learning_rate \(0\.0001\); step 1: the loss is inf"):
        tried(tmp_path, ExecutionPlan(4), list)


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
