"""The whole pipeline at a tiny size: download, checks, training, evaluation, and a report without secrets."""

from __future__ import annotations

import contextlib
import io
import json
import re
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.download import remote_zip, vqav2
from data.records import load_records
from data.synthetic import scenes
from finetune import pipeline
from finetune.config.load import load_config
from finetune.evaluation.answer import texts_alone
from finetune.evaluation.score import Score
from finetune.evaluation.tasks import TASKS
from finetune.system import distributed
from model import PaliGemma
from tests.data.range_server import Server, serving, zipped

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
STAGES = ["device", "checkpoint", "data", "plan", "inspect", "overfit", "train", "evaluate"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Generated scenes, as the archives of VQAv2."""
    directory, files = tmp_path_factory.mktemp("published"), {}
    for seed, (split, name) in enumerate(vqav2.SPLITS.items()):
        scenes.write(directory, scenes=20, seed=seed, split=split)
        for kind, file in (("Questions", "OpenEnded_mscoco_{}_questions"), ("Annotations", "mscoco_{}_annotations")):
            text = f"v2_{file.format(split)}.json"
            files[f"/vqa/v2_{kind}_{name}_mscoco.zip"] = zipped({text: directory / text}, zipfile.ZIP_DEFLATED)
        images = sorted((directory / "images").glob(f"COCO_{split}_*"))
        files[f"/zips/{split}.zip"] = zipped({f"{split}/{p.name}": p for p in images}, zipfile.ZIP_STORED)
    return files


@pytest.fixture
def server(archives: dict[str, bytes]) -> Iterator[Server]:
    with serving(archives) as server:
        yield server


def overrides(directory: Path) -> list[str]:
    """A run of six small steps, with its data and its output in `directory`."""
    sources = {}
    for name, split, size in (("train", "train2014", {"fraction": 0.5}), ("validation", "val2014", {"count": 30})):
        sources[name] = {
            "questions": f"{directory}/vqav2/v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": f"{directory}/vqav2/v2_mscoco_{split}_annotations.json",
            "images": f"{directory}/vqav2/{split}",
            **size,
        }
    return [
        f"model={{path: {ROOT}/assets/tiny-base, dtype: float32, device: cpu}}",
        f"data={json.dumps({**sources, 'answers': 'majority', 'workers': 0})}",
        "train={max_steps: 6, batch_size: 8, micro_batch: 4, learning_rate: 3e-3, log_every: 1, eval_every: 2}",
        "evaluation={count: 5, batch_size: 10, max_new_tokens: 4}",
        f"output={directory}/run",
    ]


def arguments(directory: Path, server: Server, *more: str) -> list[str]:
    addresses = ["--annotations-url", f"{server.url}/vqa", "--images-url", f"{server.url}/zips"]
    return [QUICKSTART, *overrides(directory), *addresses, "--on-cpu", *more]


class Finished(SimpleNamespace):
    directory: Path
    out: str
    home: Path


@pytest.fixture(scope="module")
def finished(archives: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A finished pipeline of a user with a home directory and a token. Each model is freed before the next is made."""
    home = tmp_path_factory.mktemp("disk") / "home" / "erika.musterfrau"
    home.mkdir(parents=True)
    loaded: list[weakref.ref[PaliGemma]] = []
    empty = PaliGemma.empty

    def counted(*given: Any) -> PaliGemma:
        assert not any(reference() for reference in loaded), "a model is still in memory when the next one is made"
        loaded.append(weakref.ref(model := empty(*given)))
        return model

    with pytest.MonkeyPatch.context() as patch, serving(archives) as server:
        patch.setattr(remote_zip, "DELAY", 0.001)
        patch.setattr(PaliGemma, "empty", counted)
        for name, value in {"HOME": str(home), "USER": "erika", "LOGNAME": "erika", "HF_TOKEN": "hf_secret"}.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            pipeline.main(arguments(home / "projects", server))
        assert len(loaded) == 5  # inspect, overfit, train, and evaluate twice
        yield Finished(directory=home / "projects", out=out.getvalue(), home=home)


def test_every_stage_is_shown_in_its_order(finished: Finished) -> None:
    assert re.findall(r"^(\d) of 9: ([\w ]+?) ─", finished.out, re.MULTILINE) == [
        (str(number), name) for number, name in enumerate([*STAGES, "report"], start=1)
    ]
    for line in ("it fits", "pass: leak: no answer leaks", "it learns: 8 of 8", "saved"):
        assert line in finished.out
    assert "already completed" not in finished.out


def test_only_the_selected_images_are_downloaded(finished: Finished) -> None:
    config = load_config(finished.directory / "run/config.yaml")
    for source, split in ((config.data.only("train"), "train2014"), (config.data.only("validation"), "val2014")):
        records = load_records(questions=source.questions, fraction=source.fraction, count=source.count)
        selected = {image["path"] for image in records["image"]}
        assert {path.name for path in (finished.directory / "vqav2" / split).iterdir()} == selected
        assert len(selected) < 20


def test_the_report_has_the_measured_values(finished: Finished) -> None:
    run = finished.directory / "run"
    report = json.loads((run / "report.json").read_text())
    assert list(report["scores"]) == ["base", "adapter"]
    for arm, scores in report["scores"].items():
        metrics = json.loads((run / f"eval/{arm}/metrics.json").read_text())
        assert (scores["score"], scores["interval"]) == (metrics["overall"], metrics["interval"])
        assert scores["questions"] == 30
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in logged if "eval_accuracy" in line]
    best = max(evaluations, key=lambda line: (line["eval_accuracy"], -line["eval_loss"], line["step"]))
    assert report["training"]["kept_step"] == best["step"]
    assert report["training"]["score_at_kept_step"] == best["eval_accuracy"]
    assert report["training"]["steps"] == 6
    assert report["data"]["validation"]["questions"] == 30
    assert report["data"]["train"]["images"] == 10
    assert report["environment"]["torch"] == torch.__version__
    assert report["configuration"]["train"]["learning_rate"] == 3e-3
    page = (run / "report.md").read_text()
    assert page in finished.out
    low, high = report["scores"]["adapter"]["interval"]
    assert f"| adapter | {report['scores']['adapter']['score']:.2f} ({low:.2f} to {high:.2f}) |" in page
    assert "learning_rate: 0.003" in page
    assert f"torch: {torch.__version__}" in page


def test_the_report_names_neither_the_user_nor_the_machine(finished: Finished) -> None:
    for file in ("report.json", "report.md"):
        text = (finished.directory / "run" / file).read_text()
        for secret in ("erika", "musterfrau", "home", "hf_secret", str(ROOT), str(finished.home.parent.parent)):
            assert secret not in text, (file, secret)
        assert not re.search(r"[\"' ]/\w", text), "an absolute path"
    report = json.loads((finished.directory / "run/report.json").read_text())["configuration"]
    assert report["output"] == "run"
    assert report["model"]["path"] == "assets/tiny-base"
    assert report["data"]["train"]["images"] == "train2014"
    assert "tracking" not in report


def test_a_finished_pipeline_only_writes_the_report_again(
    finished: Finished, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dry_run", "inspect", "overfit", "learn", "evaluate_run", "fetch", "fetch_vqav2"):
        monkeypatch.setattr(pipeline, name, None)  # a call would fail
    files = [finished.directory / "run" / name for name in ("report.json", "report.md")]
    before = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    # The addresses differ from the first time; they are not part of the configuration.
    pipeline.main(arguments(finished.directory, server))
    assert [file.read_text() for file in files] == before
    assert capsys.readouterr().out.count("already completed") == len(STAGES)
    assert server.sent == {}


class Calls:
    """Replaces the work of the stages: records the calls, and interrupts the one named by `interrupt_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.interrupt_at: str | None = None
        monkeypatch.setattr(
            pipeline, "dry_run", lambda config, probed: self.record("plan and time" if probed else "plan")
        )
        monkeypatch.setattr(pipeline, "inspect", lambda config: self.record("inspect"))
        monkeypatch.setattr(pipeline, "overfit", lambda config, count: self.record(f"overfit {count}"))
        monkeypatch.setattr(pipeline, "learn", lambda config, words: self.record("train"))
        monkeypatch.setattr(pipeline, "evaluate_run", lambda config, words: self.evaluate())
        monkeypatch.setattr(pipeline, "write_report", lambda config: self.write(Path(config.output)))

    def record(self, call: str) -> None:
        self.made.append(call)
        if call == self.interrupt_at:
            raise KeyboardInterrupt

    def evaluate(self) -> dict[str, Score]:
        self.record("evaluate")
        asked = {"id": "1", "answers": ["yes"], "answer_type": "", "question_type": ""}
        return {"base": TASKS["vqa"].score(texts_alone({"1": "yes"}), [asked])}

    def write(self, output: Path) -> Path:
        self.made.append("report")
        (output / "report.md").write_text("")
        return output


EVERYTHING = ["plan", "inspect", "overfit 8", "train", "evaluate", "report"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(remote_zip, "DELAY", 0.001)
    return Calls(monkeypatch)


@pytest.mark.parametrize("interrupt_at", EVERYTHING[:-1])
def test_an_interrupted_pipeline_resumes_at_the_interrupted_stage(
    finished: Finished, server: Server, tmp_path: Path, calls: Calls, interrupt_at: str
) -> None:
    """Completed stages are not repeated; the interrupted one runs again."""
    argv = [*arguments(finished.directory, server), f"output={tmp_path}"]
    calls.interrupt_at = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        pipeline.main(argv)
    index = EVERYTHING.index(interrupt_at)
    assert calls.made == EVERYTHING[: index + 1]
    calls.interrupt_at, calls.made = None, []
    pipeline.main(argv)
    assert calls.made == EVERYTHING[index:]
    pipeline.main(argv)
    assert calls.made == [*EVERYTHING[index:], "report"]


def test_a_changed_configuration_runs_all_stages_again(
    finished: Finished, server: Server, tmp_path: Path, calls: Calls
) -> None:
    argv = [*arguments(finished.directory, server), f"output={tmp_path}"]
    pipeline.main(argv)
    calls.made.clear()
    pipeline.main([*argv, "train.learning_rate=1e-3"])
    assert calls.made == EVERYTHING


def test_a_cpu_is_refused_before_anything_is_downloaded(server: Server, tmp_path: Path, calls: Calls) -> None:
    with pytest.raises(ValueError, match=r"on a CPU this run would take weeks: .* --on-cpu"):
        pipeline.main([word for word in arguments(tmp_path, server) if word != "--on-cpu"])
    assert server.sent == {}
    assert calls.made == []
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_is_checked_and_a_step_is_timed_on_it(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check refuses a GPU without bfloat16, and several processes."""
    capability = (8, 6)
    monkeypatch.setattr(pipeline, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3070")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = load_config(QUICKSTART, [*overrides(tmp_path), "model.dtype=bfloat16"])
    assert config.data.validation is not None
    given = pipeline.Pipeline(config, [QUICKSTART], pipeline.parse([]))
    pipeline.check_device(given)
    assert "RTX 3070: 7.00 of 8.00 GiB are free" in capsys.readouterr().out
    pipeline.plan(given)
    assert calls.made == ["plan and time"]
    capability = (7, 5)
    with pytest.raises(ValueError, match="RTX 3070 has no bfloat16"):
        pipeline.check_device(given)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(ValueError, match="runs in one process, but the launcher started 2: start it without"):
        pipeline.check_device(given)


def test_access_to_a_gated_checkpoint_is_checked_before_the_download(
    server: Server, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def refused(path: str, revision: str | None, weights: bool = True) -> Path:
        asked.append((path, revision, weights))
        raise ValueError("its licence must be accepted first")

    monkeypatch.setattr(pipeline, "fetch", refused)
    with pytest.raises(ValueError, match="its licence must be accepted first"):
        pipeline.main(arguments(tmp_path, server, "model.path=google/some", "model.revision=bfloat16"))
    assert asked == [("google/some", "bfloat16", False)]
    assert server.sent == {}
    assert calls.made == []


def test_a_run_that_does_not_fit_does_not_start(
    finished: Finished, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PaliGemma, "empty", None)  # no model is made
    with pytest.raises(ValueError, match="this does not fit"):
        pipeline.main([*arguments(finished.directory, server), f"output={tmp_path}/run", "memory.budget_gib=0.1"])
    assert not (tmp_path / "run").exists()


def test_a_missing_image_is_downloaded_again(finished: Finished, server: Server, tmp_path: Path, calls: Calls) -> None:
    """Even if the records were read before."""
    one = sorted((finished.directory / "vqav2/train2014").iterdir())[0]
    content = one.read_bytes()
    one.unlink()
    pipeline.main([*arguments(finished.directory, server), f"output={tmp_path}"])
    assert one.read_bytes() == content
    assert calls.made == EVERYTHING


def test_data_in_another_directory_is_used(server: Server, tmp_path: Path, calls: Calls) -> None:
    """Without the network. If it cannot be read, the paths to which VQAv2 would be downloaded are named."""
    for seed, split in enumerate(("train2014", "val2014")):
        scenes.write(tmp_path / "scenes", scenes=10, seed=seed, split=split)
        for name in ("OpenEnded_mscoco_{}_questions", "mscoco_{}_annotations"):
            name = f"v2_{name.format(split)}.json"
            (tmp_path / "scenes" / name).rename(tmp_path / "scenes" / name.replace("v2", "my"))
    files = {
        name: {
            "questions": f"{tmp_path}/scenes/my_OpenEnded_mscoco_{split}_questions.json",
            "annotations": f"{tmp_path}/scenes/my_mscoco_{split}_annotations.json",
            "images": f"{tmp_path}/scenes/images",
        }
        for name, split in (("train", "train2014"), ("validation", "val2014"))
    }
    argv = [*arguments(tmp_path, server), f"data={json.dumps({**files, 'workers': 0})}"]
    pipeline.main(argv)
    assert calls.made == EVERYTHING
    next((tmp_path / "scenes/images").iterdir()).unlink()
    wanted = re.escape(f"{tmp_path}/scenes/v2_OpenEnded_mscoco_train2014_questions.json")
    with pytest.raises(ValueError, match=f"questions is .*/my_OpenEnded.*, expected {wanted}"):
        pipeline.main([*argv, f"output={tmp_path}/other"])
    assert server.sent == {}


def test_overrides_alone_apply_to_the_default_configuration() -> None:
    assert pipeline.parse([]).config == "configs/vqav2_8gb.yaml"
    given = pipeline.parse(["train.epochs=2", "train.seed=1"])
    assert (given.config, given.overrides) == ("configs/vqav2_8gb.yaml", ["train.epochs=2", "train.seed=1"])
    given = pipeline.parse(["mine.yaml", "train.epochs=2"])
    assert (given.config, given.overrides) == ("mine.yaml", ["train.epochs=2"])


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        pipeline.main(["--help"])
    assert "--on-cpu" in capsys.readouterr().out
