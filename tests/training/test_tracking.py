"""What watches a run: nothing that goes wrong there ends it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image
from torch import Tensor

from finetune.config.load import load_config
from finetune.training.batch_sampler import BatchSampler
from finetune.training.metrics_file import MetricsFile
from finetune.training.tracking import Samples, TensorBoard, Tracker, Wandb, callbacks_for

ROOT = Path(__file__).parents[2]


class Recorder:
    """A backend that notes what it gets; `failing` is the name of the method that raises."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.calls = failing, []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*given: Any) -> None:
            self.calls.append((name, *given))
            if name == self.failing:
                raise RuntimeError("broken")

        return call

    calls: list[tuple[Any, ...]]


def records(count: int) -> list[dict[str, Any]]:
    """One without a question of its own, as lines of JSON have them; each image has another colour."""
    images = [Image.new("RGB", (600, 300), (250, i, 0)) for i in range(count)]
    return [
        {"id": str(i), "image": image, "question": f"what {i}?" if i else "", "prefix": "caption en", "answer": f"a{i}"}
        for i, image in enumerate(images)
    ]


def kept(count: int) -> Samples:
    samples = Samples()
    samples.keep(records(count), {str(i): f"b{i}" for i in range(count)})
    return samples


def test_a_question_about_no_image_is_shown_on_white() -> None:
    samples = Samples()
    samples.keep([records(1)[0] | {"image": None}], {"0": "b0"})
    (one,) = samples.open()
    assert one.image.getcolors() == [(one.image.width * one.image.height, (255, 255, 255))]
    assert str(one) == "caption en\nexpected: a0\nanswered: b0"


def driven(backend: Any, output: Path, samples: Samples) -> None:
    """A run of one log and one evaluation, as the Trainer calls its callbacks."""
    metrics: Any = MetricsFile(output / "metrics.jsonl", BatchSampler((40,), 10, 0, 9))
    tracker: Any = Tracker("there", backend, metrics, samples)
    state = SimpleNamespace(global_step=2)
    for callback in (metrics, tracker):
        callback.on_train_begin(None, state, None)
    for logs in ({"loss": 1.5, "epoch": 0.3}, {"eval_accuracy": 60.0}):
        for callback in (metrics, tracker):
            callback.on_log(None, state, None, logs)
    tracker.on_evaluate(None, state, None)
    tracker.on_train_end(None, state, None)


def test_a_backend_gets_the_figures_of_metrics_jsonl(tmp_path: Path) -> None:
    backend = Recorder()
    driven(backend, tmp_path, kept(2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [{"step": step} | figures for name, figures, step in backend.calls[1:3] if name == "log"]
    assert logged == lines
    assert {"seconds", "memory_gib", "epoch", "loss"} <= logged[0].keys()
    assert [call[0] for call in backend.calls] == ["begin", "log", "log", "show", "finish"]


def test_the_first_questions_of_an_evaluation_are_shown_with_their_images_and_answers(tmp_path: Path) -> None:
    backend = Recorder()
    driven(backend, tmp_path, kept(20))
    (_, shown, step) = next(call for call in backend.calls if call[0] == "show")
    assert step == 2
    assert [one.answer for one in shown] == [f"b{i}" for i in range(8)]
    assert (shown[1].question, shown[1].expected) == ("what 1?", "a1")
    assert shown[0].question == "caption en"  # a line of one's own has a prefix alone
    assert {one.image.size for one in shown} == {(224, 112)}


@pytest.mark.parametrize("failing", ["begin", "log", "show", "finish"])
def test_what_fails_is_said_once_and_is_the_end_of_it(
    tmp_path: Path, failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Recorder(failing)
    driven(backend, tmp_path, kept(2))
    assert backend.calls[-1][0] == failing
    assert capsys.readouterr().err.count("there: ") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_image_that_is_gone_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = Samples()
    samples.keep([{**records(1)[0], "image": str(tmp_path / "gone.jpg")}], {"0": "b"})
    driven(Recorder(), tmp_path, samples)
    assert "there: showing answers failed (ValueError: " in capsys.readouterr().err


def test_wandb_itself_takes_figures_and_images_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = load_config(ROOT / "configs/quickstart.yaml", ["tracking.wandb=offline", f"output={tmp_path}"])
    driven(Wandb(config), tmp_path, kept(3))
    images = [Image.open(path) for path in tmp_path.glob("wandb/offline-run-*/files/media/images/answers_*")]
    assert [image.size for image in images] == [(224, 112)] * 3


class Writer:
    """A stand-in for torch.utils.tensorboard's SummaryWriter."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, directory: str) -> None:
        self.directory, self.calls, self.closed = directory, [], False
        Writer.made.append(self)

    calls: list[tuple[str, Any, int]]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    add_text = add_scalar

    def add_image(self, name: str, image: Tensor, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.calls.append((name, image, step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_scalars_images_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    driven(TensorBoard(tmp_path), tmp_path, kept(1))
    writer = Writer.made.pop()
    assert writer.closed
    assert Path(writer.directory) == tmp_path / "tensorboard"
    assert ("loss", 1.5, 2) in writer.calls
    assert ("eval_accuracy", 60.0, 2) in writer.calls
    image, text = (value for name, value, _ in writer.calls if name == "answers/0")
    assert image.shape == (112, 224, 3)
    assert image[50, 50].tolist() == [250, 0, 0]
    assert text.splitlines() == ["    caption en", "    expected: a0", "    answered: b0"]


def test_tensorboard_itself_reads_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    driven(TensorBoard(tmp_path), tmp_path, kept(2))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 1.5)]
    assert sorted(events.Tags()["images"]) == ["answers/0", "answers/1"]


def test_without_its_package_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    driven(TensorBoard(tmp_path), tmp_path, kept(1))
    said = capsys.readouterr().err
    assert "there: starting failed (" in said
    assert "tensorboard" in said


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], []),
        (["tracking.tensorboard=true"], ["tensorboard"]),
        (["tracking.wandb=offline", "tracking.tensorboard=true"], ["wandb", "tensorboard"]),
    ],
)
def test_what_tracks_a_run_is_what_its_configuration_says(overrides: list[str], names: list[str]) -> None:
    config = load_config(ROOT / "configs/quickstart.yaml", overrides)
    made = callbacks_for(config, BatchSampler((40,), 10, 0, 9))
    assert [callback.name for callback in made if isinstance(callback, Tracker)] == names
