"""The whole way of a real run at a tiny size: fetched, tried, trained and measured once, and told without secrets."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import evaluate
import train
from data.records import load_records
from data.synthetic import scenes
from finetune.config.load import load_config
from finetune.evaluation.vqa_accuracy import score, write_results
from finetune.training.result import Result
from model import PaliGemma
from recipes import fetch_vqav2, remote_zip, result, vqav2
from tests.test_fetch_vqav2 import Server, zipped

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
STEPS = [
    "card",
    "checkpoint",
    "pictures",
    "plan",
    "first examples",
    "eight examples by heart",
    "training",
    "evaluation",
]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Scenes, as VQAv2 is published."""
    directory, files = tmp_path_factory.mktemp("published"), {}
    for seed, (split, name) in enumerate(fetch_vqav2.SPLITS.items()):
        scenes.write(directory, scenes=20, seed=seed, split=split)
        for kind, file in (("Questions", "OpenEnded_mscoco_{}_questions"), ("Annotations", "mscoco_{}_annotations")):
            text = f"v2_{file.format(split)}.json"
            files[f"/vqa/v2_{kind}_{name}_mscoco.zip"] = zipped({text: directory / text}, zipfile.ZIP_DEFLATED)
        pictures = sorted((directory / "images").glob(f"COCO_{split}_*"))
        files[f"/zips/{split}.zip"] = zipped({f"{split}/{p.name}": p for p in pictures}, zipfile.ZIP_STORED)
    return files


@contextlib.contextmanager
def serving(archives: dict[str, bytes]) -> Iterator[Server]:
    with Server(archives) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(archives: dict[str, bytes]) -> Iterator[Server]:
    with serving(archives) as server:
        yield server


def overrides(place: Path) -> list[str]:
    """A run of six small steps, with its data and its output below `place`."""
    sources = {}
    for name, split, size in (("train", "train2014", {"fraction": 0.5}), ("validation", "val2014", {"count": 30})):
        sources[name] = {
            "questions": f"{place}/vqav2/v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": f"{place}/vqav2/v2_mscoco_{split}_annotations.json",
            "images": f"{place}/vqav2/{split}",
            **size,
        }
    return [
        f"model={{path: {ROOT}/assets/tiny-base, dtype: float32, device: cpu}}",
        f"data={json.dumps({**sources, 'answers': 'majority', 'workers': 0})}",
        "train={max_steps: 6, batch_size: 8, micro_batch: 4, learning_rate: 3e-3, log_every: 1, eval_every: 2}",
        "evaluation={count: 5, batch_size: 10, max_new_tokens: 4}",
        f"output={place}/run",
    ]


def arguments(place: Path, server: Server, *more: str) -> list[str]:
    addresses = ["--annotations-url", f"{server.url}/vqa", "--pictures-url", f"{server.url}/zips"]
    return [QUICKSTART, *overrides(place), *addresses, "--on-cpu", *more]


class Walked(SimpleNamespace):
    place: Path
    out: str
    home: Path


@pytest.fixture(scope="module")
def walked(archives: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walked]:
    """The whole way, walked once by a person with a home directory and a token; what was loaded is gone in time."""
    home = tmp_path_factory.mktemp("disk") / "home" / "erika.musterfrau"
    home.mkdir(parents=True)
    loaded: list[weakref.ref[PaliGemma]] = []
    empty = PaliGemma.empty

    def counted(*given: Any) -> PaliGemma:
        assert not any(reference() for reference in loaded), "a network is still there when the next one is made"
        loaded.append(weakref.ref(model := empty(*given)))
        return model

    with pytest.MonkeyPatch.context() as patch, serving(archives) as server:
        patch.setattr(remote_zip, "DELAY", 0.001)
        patch.setattr(PaliGemma, "empty", counted)
        for name, value in {"HOME": str(home), "USER": "erika", "LOGNAME": "erika", "HF_TOKEN": "hf_secret"}.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            vqav2.main(arguments(home / "projects", server))
        assert len(loaded) == 5  # inspected, learned by heart, trained, and evaluated twice
        yield Walked(place=home / "projects", out=out.getvalue(), home=home)


def test_every_step_is_announced_in_its_order(walked: Walked) -> None:
    assert re.findall(r"^(\d) of 9: ([\w ]+?) ─", walked.out, re.MULTILINE) == [
        (str(number), name) for number, name in enumerate([*STEPS, "result"], start=1)
    ]
    for said in ("it fits", "in order: image tokens", "it learns: 8 of 8", "saved"):
        assert said in walked.out
    assert "done before" not in walked.out


def test_only_the_drawn_pictures_are_fetched(walked: Walked) -> None:
    config = load_config(walked.place / "run/config.yaml")
    assert config.data.validation is not None
    for source, split in ((config.data.train, "train2014"), (config.data.validation, "val2014")):
        records = load_records(questions=source.questions, fraction=source.fraction, count=source.count)
        drawn = {image["path"] for image in records["image"]}
        assert {path.name for path in (walked.place / "vqav2" / split).iterdir()} == drawn
        assert len(drawn) < 20


def test_the_result_holds_what_was_measured(walked: Walked) -> None:
    run = walked.place / "run"
    told = json.loads((run / "report.json").read_text())
    assert list(told["scores"]) == ["base", "adapter"]
    for arm, scores in told["scores"].items():
        metrics = json.loads((run / f"eval/{arm}/metrics.json").read_text())
        assert (scores["accuracy"], scores["interval"]) == (metrics["overall"], metrics["interval"])
        assert scores["questions"] == 30
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in logged if "eval_accuracy" in line]
    best = max(evaluations, key=lambda line: (line["eval_accuracy"], -line["eval_loss"], line["step"]))
    assert told["training"]["kept_step"] == best["step"]
    assert told["training"]["accuracy_at_kept_step"] == best["eval_accuracy"]
    assert told["training"]["steps"] == 6
    assert told["data"]["validation"]["questions"] == 30
    assert told["data"]["train"]["pictures"] == 10
    assert told["environment"]["torch"] == torch.__version__
    assert told["configuration"]["train"]["learning_rate"] == 3e-3
    page = (run / "report.md").read_text()
    assert page in walked.out
    low, high = told["scores"]["adapter"]["interval"]
    assert f"| adapter | {told['scores']['adapter']['accuracy']:.2f} ({low:.2f} to {high:.2f}) |" in page
    assert "learning_rate: 0.003" in page
    assert f"torch: {torch.__version__}" in page


def test_scores_have_an_interval_for_each_type_of_answer(walked: Walked, tmp_path: Path) -> None:
    """An arm that knows every other yes/no and nothing else."""
    config = load_config(walked.place / "run/config.yaml", [f"output={tmp_path}"])
    assert config.data.validation is not None
    records = list(load_records(**config.data.validation.model_dump()))
    asked = [record for record in records if record["answer_type"] == "yes/no"]
    known = {record["id"]: record["answer"] for record in asked[::2]}
    answers = {record["id"]: known.get(record["id"], "nothing") for record in records}
    (tmp_path / "eval/adapter").mkdir(parents=True)
    write_results(tmp_path / "eval/adapter/results.json", answers)
    told = result.scores_of(config)["adapter"]
    assert told["accuracy"] == pytest.approx(100 * len(known) / 30, abs=0.01)
    alone = score({record["id"]: answers[record["id"]] for record in asked}, asked)
    found = told["by_answer_type"]["yes/no"]
    assert found["questions"] == len(asked) < 30
    assert found["accuracy"] == pytest.approx(100 * len(known) / len(asked), abs=0.01)
    assert found["interval"] == [round(bound, 2) for bound in alone.interval]
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert told["by_answer_type"]["other"]["accuracy"] == 0


def test_the_result_says_nothing_about_the_person_or_the_machine(walked: Walked) -> None:
    for file in ("report.json", "report.md"):
        text = (walked.place / "run" / file).read_text()
        for secret in ("erika", "musterfrau", "home", "hf_secret", str(ROOT), str(walked.home.parent.parent)):
            assert secret not in text, (file, secret)
        assert not re.search(r"[\"' ]/\w", text), "an absolute path"
    told = json.loads((walked.place / "run/report.json").read_text())["configuration"]
    assert told["output"] == "."
    assert told["model"]["path"] == "assets/tiny-base"
    assert told["data"]["train"]["images"] == "train2014"
    assert "tracking" not in told


def test_a_second_time_nothing_is_done_but_the_result_written(
    walked: Walked, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((train, "main"), (evaluate, "main"), (vqav2, "fetch"), (vqav2, "fetch_vqav2")):
        monkeypatch.setattr(module, name, None)  # called, it would fail
    files = [walked.place / "run" / name for name in ("report.json", "report.md")]
    before = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    # Other addresses are no other configuration.
    vqav2.main(arguments(walked.place, server))
    assert [file.read_text() for file in files] == before
    assert capsys.readouterr().out.count("done before") == len(STEPS)
    assert server.sent == {}


class Calls:
    """Stands for the scripts: notes what they are asked for, and stops where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.stop_at: str | None = None
        monkeypatch.setattr(train, "main", lambda argv: self.note("train", argv))
        monkeypatch.setattr(evaluate, "main", lambda argv: self.note("evaluate", argv))
        monkeypatch.setattr(vqav2, "write_result", lambda config, steps: self.write(Path(config.output)))

    def note(self, script: str, argv: list[str]) -> None:
        asked = " ".join([script, *(word for word in argv if word != QUICKSTART and "=" not in word)])
        self.made.append(asked)
        if asked == self.stop_at:
            raise KeyboardInterrupt

    def write(self, output: Path) -> Path:
        self.made.append("result")
        (output / "report.md").write_text("")
        return output


EVERYTHING = ["train --dry-run", "train --inspect", "train --overfit 8", "train", "evaluate", "result"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(remote_zip, "DELAY", 0.001)
    return Calls(monkeypatch)


@pytest.mark.parametrize("stop_at", EVERYTHING[:-1])
def test_stopped_anywhere_it_goes_on_there(
    walked: Walked, server: Server, tmp_path: Path, calls: Calls, stop_at: str
) -> None:
    """What was finished is not done again, what was under way is asked for once more."""
    argv = [*arguments(walked.place, server), f"output={tmp_path}"]
    calls.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        vqav2.main(argv)
    place = EVERYTHING.index(stop_at)
    assert calls.made == EVERYTHING[: place + 1]
    calls.stop_at, calls.made = None, []
    vqav2.main(argv)
    assert calls.made == EVERYTHING[place:]
    vqav2.main(argv)
    assert calls.made == [*EVERYTHING[place:], "result"]


def test_another_configuration_begins_anew(walked: Walked, server: Server, tmp_path: Path, calls: Calls) -> None:
    argv = [*arguments(walked.place, server), f"output={tmp_path}"]
    vqav2.main(argv)
    calls.made.clear()
    vqav2.main([*argv, "train.learning_rate=1e-3"])
    assert calls.made == EVERYTHING


def test_a_cpu_is_refused_before_anything_is_fetched(server: Server, tmp_path: Path, calls: Calls) -> None:
    with pytest.raises(ValueError, match=r"on a CPU this run would take weeks: .* --on-cpu"):
        vqav2.main([word for word in arguments(tmp_path, server) if word != "--on-cpu"])
    assert server.sent == {}
    assert calls.made == []
    assert list(tmp_path.iterdir()) == []


def test_a_card_is_looked_at_and_a_step_is_timed_on_it(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that has no bfloat16 is refused there and then."""
    capability = (8, 6)
    monkeypatch.setattr(vqav2, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3070")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = load_config(QUICKSTART, [*overrides(tmp_path), "model.dtype=bfloat16"])
    assert config.data.validation is not None
    walk = vqav2.Walk(config, config.data.validation, [QUICKSTART], vqav2.parse([]))
    vqav2.card(walk)
    assert "RTX 3070: 7.00 of 8.00 GiB are free" in capsys.readouterr().out
    vqav2.plan(walk)
    assert calls.made == ["train --dry-run --probe"]
    capability = (7, 5)
    with pytest.raises(ValueError, match="RTX 3070 has no bfloat16"):
        vqav2.card(walk)


def test_a_gated_checkpoint_is_asked_for_before_the_pictures(
    server: Server, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def refused(path: str, revision: str | None, weights: bool = True) -> Path:
        asked.append((path, revision, weights))
        raise ValueError("its licence must be accepted first")

    monkeypatch.setattr(vqav2, "fetch", refused)
    with pytest.raises(ValueError, match="its licence must be accepted first"):
        vqav2.main(arguments(tmp_path, server, "model.path=google/some", "model.revision=bfloat16"))
    assert asked == [("google/some", "bfloat16", False)]
    assert server.sent == {}
    assert calls.made == []


def test_what_does_not_fit_is_not_tried(
    walked: Walked, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PaliGemma, "empty", None)  # no network is made
    with pytest.raises(ValueError, match="this does not fit"):
        vqav2.main([*arguments(walked.place, server), f"output={tmp_path}/run", "memory.budget_gib=0.1"])
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_missing_is_fetched_again(
    walked: Walked, server: Server, tmp_path: Path, calls: Calls
) -> None:
    """Also where its record is known from before."""
    one = sorted((walked.place / "vqav2/train2014").iterdir())[0]
    content = one.read_bytes()
    one.unlink()
    vqav2.main([*arguments(walked.place, server), f"output={tmp_path}"])
    assert one.read_bytes() == content
    assert calls.made == EVERYTHING


def test_data_that_is_there_in_another_place_is_taken(server: Server, tmp_path: Path, calls: Calls) -> None:
    """Without a look at the network; and where it is not there, the place to fetch it to is named."""
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
    vqav2.main(argv)
    assert calls.made == EVERYTHING
    next((tmp_path / "scenes/images").iterdir()).unlink()
    wanted = re.escape(f"{tmp_path}/scenes/v2_OpenEnded_mscoco_train2014_questions.json")
    with pytest.raises(ValueError, match=f"questions is .*/my_OpenEnded.*, expected {wanted}"):
        vqav2.main([*argv, f"output={tmp_path}/other"])
    assert server.sent == {}


def test_an_override_alone_is_laid_over_the_default_configuration() -> None:
    assert vqav2.parse([]).config == "configs/vqav2_8gb.yaml"
    given = vqav2.parse(["train.epochs=2", "train.seed=1"])
    assert (given.config, given.overrides) == ("configs/vqav2_8gb.yaml", ["train.epochs=2", "train.seed=1"])
    given = vqav2.parse(["mine.yaml", "train.epochs=2"])
    assert (given.config, given.overrides) == ("mine.yaml", ["train.epochs=2"])


def test_hours_are_summed_over_all_the_times_a_run_was_taken_up(tmp_path: Path) -> None:
    """Half an hour until it was killed, then a quarter; the step that was kept is the one that the run says."""
    rows: list[dict[str, float]] = [
        {"step": 10, "seconds": 900.0, "loss": 1.0},
        {"step": 20, "seconds": 1800.0, "eval_accuracy": 61.5},
        {"step": 20, "seconds": 450.0, "eval_accuracy": 61.5},
        {"step": 30, "seconds": 900.0, "eval_accuracy": 60.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Result(20, "best accuracy", "accuracy", 61.5, 0.5).written(tmp_path):
        pass
    assert result.training_of(tmp_path, 30) == {
        "hours": 0.75,
        "steps": 30,
        "kept_step": 20,
        "kept_for": "best accuracy",
        "accuracy_at_kept_step": 61.5,
        "validation_loss_at_kept_step": 0.5,
    }


def test_the_card_and_its_driver_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA GeForce RTX 3070", total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(result, "said", lambda command: {"nvidia-smi": "580.1\n580.1", "git": "abc"}[command[0]])
    told = result.environment_of(torch.device("cuda"))
    assert (told["device"], told["memory_gib"], told["driver"]) == ("NVIDIA GeForce RTX 3070", 8.0, "580.1")
    assert told["commit"] == "abc"


def test_a_program_that_is_not_there_says_nothing() -> None:
    assert result.said(["no-such-program"]) is None
    assert result.said(["false"]) is None
    assert result.said(["echo", "hello"]) == "hello"


def test_the_recipe_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vqav2.main(["--help"])
    assert "--on-cpu" in capsys.readouterr().out
