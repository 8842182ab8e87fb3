"""Runs with train.objective=dpo: what they say, keep and refuse, and that a kill changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import train
from data.lengths import Longest
from data.synthetic import scenes
from finetune import run
from finetune.adapters.metadata import training_facts
from finetune.config.load import load_config
from finetune.preflight.run_plan import plan_run
from finetune.training import preferences
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.preferences import Preferences
from model import PaliGemmaConfig
from tests import kill_test

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/tiny-base"
SPLITS = {"train": "train", "validation": "val"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, train.jsonl and val.jsonl: of each question a sentence, preferred to the bare answer."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, split, seed in (("train", "train2014", 1), ("val", "val2014", 2)):
        scenes.write(folder, scenes=6, seed=seed, split=split)
        asked = json.loads((folder / f"v2_OpenEnded_mscoco_{split}_questions.json").read_text())["questions"]
        given = json.loads((folder / f"v2_mscoco_{split}_annotations.json").read_text())["annotations"]
        rows = [
            {
                "id": str(question["question_id"]),
                "image": f"COCO_{split}_{question['image_id']:012d}.jpg",
                "question": question["question"],
                "suffix": f"the answer is {answer['multiple_choice_answer']}",
                "rejected": answer["multiple_choice_answer"],
            }
            for question, answer in zip(asked, given, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "plan_run", kill_test.unplanned)


def words(pairs: Path, output: Path, *changes: str) -> list[str]:
    sources = {name: f"{{jsonl: {pairs}/{file}.jsonl, images: {pairs}/images}}" for name, file in SPLITS.items()}
    return [
        str(ROOT / "configs/quickstart.yaml"),
        f"model={{path: {BASE}, dtype: float32, device: cpu}}",
        f"data={{train: {sources['train']}, validation: {sources['validation']}, workers: 0}}",
        "lora={rank: 4, dropout: 0.1, targets: [language.*, vision.*, connector.*]}",
        "train={objective: dpo, max_steps: 5, batch_size: 6, learning_rate: 1e-2, log_every: 1, save_every: 1, "
        "eval_every: 2}",
        "evaluation={count: 4, batch_size: 4, max_new_tokens: 3}",
        f"output={output}",
        *changes,
    ]


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "plan_run", kill_test.unplanned)
        output = tmp_path_factory.mktemp("straight") / "run"
        train.main(words(pairs, output))
    return output


def test_a_run_learns_what_is_preferred_and_logs_how(straight: Path) -> None:
    """The first step is the reference itself; steps are compared by the answers, beside whose metric stand the figures
    of pairs: those are all told apart long before an answer is right.
    """
    lines = logged(straight)
    first, *_, last = [line for line in lines if "margin" in line]
    assert (first["margin"], first["reward_chosen"]) == (0, 0)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["margin"] > 1
    assert last["pair_accuracy"] == 100
    assert last["margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], rel=1e-4)
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4, 5]
    for line in evaluated:
        assert {"eval_accuracy", "eval_pair_accuracy", "eval_margin", "eval_kl"} <= line.keys()
    assert evaluated[-1]["eval_kl"] > 0.01
    kept = json.loads((straight / "result.json").read_text())
    assert (kept["metric"], kept["validation_loss"]) == ("accuracy", evaluated[-1]["eval_loss"])
    assert training_facts(straight / "adapter").metric == "accuracy"
    assert "preference pairs (DPO) of `train.jsonl`" in (straight / "adapter/README.md").read_text()
    assert "preference pairs of" in (straight / "report.html").read_text()


@pytest.mark.parametrize("at", ["a step", "the reference"])
def test_a_run_that_was_killed_comes_to_the_same_adapter(
    pairs: Path, straight: Path, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: in a step, or while the reference's log-probabilities are computed, which go on where they were."""
    output, calls = tmp_path / "run", 0
    place, name = (GradientAccumulation, "accumulate") if at == "a step" else (Preferences, "reference_log_probs")
    whole = getattr(place, name)
    monkeypatch.setattr(preferences, "SAVED_EVERY", 1)

    def dies(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("killed")
        return whole(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, dies)
        with pytest.raises(RuntimeError, match="killed"):
            train.main(words(pairs, output))
    done = len(list(output.glob("checkpoints/step-*")))
    assert done == (2 if at == "a step" else 0)
    assert (output / "reference.safetensors").is_file()
    with monkeypatch.context() as patched:
        calls = 3
        patched.setattr(Preferences, "reference_log_probs", counting := Counting(Preferences.reference_log_probs))
        train.main(words(pairs, output))
    assert counting.calls == (0 if at == "a step" else 3)
    assert kill_test.adapter(output) == kill_test.adapter(straight)


def test_skipped_pairs_are_computed_once(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that takes a skipped one's place counts for it: a run that goes on computes nothing again."""
    images = tmp_path / "images"
    shutil.copytree(pairs / "images", images)
    broken = sorted(images.glob("COCO_train*"))[0]
    broken.write_bytes(broken.read_bytes()[:-60])
    asked = words(pairs, tmp_path / "run", f"data.train.images={images}", "data.on_error=skip", "data.skip_at_most=0.5")
    whole, steps = GradientAccumulation.accumulate, 0

    def dies(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("killed")
        return whole(*given)

    with monkeypatch.context() as patched:
        patched.setattr(GradientAccumulation, "accumulate", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train.main(asked)
    assert (tmp_path / "run/skipped_train.jsonl").is_file()
    monkeypatch.setattr(Preferences, "reference_log_probs", counting := Counting(Preferences.reference_log_probs))
    train.main(asked)
    assert counting.calls == 0


def test_a_run_does_not_go_on_against_another_reference(pairs: Path, straight: Path, tmp_path: Path) -> None:
    """Without log-probabilities that were kept, too: the adapter that it began with is not what it was."""
    shutil.copytree(straight / "adapter", tmp_path / "start")
    asked = words(pairs, tmp_path / "run", f"lora={{start_from: {tmp_path}/start, dropout: 0.0}}")
    train.main([*asked, "preference.precompute=false", "train.max_steps=1"])
    file = tmp_path / "start/adapter_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "start/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"lora\.start_from: the content of the file"):
        train.main([*asked, "preference.precompute=false", "train.max_steps=2"])


class Counting:
    """A method that counts its calls."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.calls = whole, 0

    def __get__(self, instance: Any, owner: type) -> Any:
        def call(*given: Any) -> Any:
            self.calls += 1
            return self.whole(instance, *given)

        return call


def test_another_reference_is_refused_and_nothing_is_lost(
    pairs: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference of a run is what it began with; from an adapter, that adapter."""
    again = tmp_path / "again"
    start = [f"lora={{start_from: {straight}, dropout: 0.0}}"]  # dropout would be a difference, too
    train.main(words(pairs, again, *start, "train.max_steps=1"))
    first = next(line for line in logged(again) if "margin" in line)
    assert first["margin"] == 0, "the first step is that of the adapter which it starts from"
    train.main([*words(pairs, again, *start, "train.max_steps=2"), "--accept-changes"])
    assert [line["step"] for line in logged(again) if "margin" in line] == [1, 2], "resumed, with the same reference"
    before = (again / "reference.safetensors").read_bytes()
    for made in ("checkpoints", "adapter"):
        (again / made).rename(tmp_path / made)
    with pytest.raises(ValueError, match=r"not the same in: the reference's adapter; restore that"):
        train.main(words(pairs, again, *start, "train.reference=base", "train.max_steps=1"))
    assert (again / "reference.safetensors").read_bytes() == before
    named = tmp_path / "named"
    train.main(words(pairs, named, f"train.reference={straight}", "train.max_steps=1", "preference.precompute=false"))
    assert not (named / "reference.safetensors").exists()
    assert next(line for line in logged(named) if "margin" in line)["margin"] < 0, "the base prefers less than it"
    with pytest.raises(ValueError, match=r"which train\.reference names: say what it has, or name another one\n.*rank"):
        train.main(words(pairs, tmp_path / "no", f"train.reference={straight}", "lora.rank=8"))


def test_a_reference_of_another_base_is_refused(pairs: Path, straight: Path, tmp_path: Path) -> None:
    asked = words(pairs, tmp_path / "run", f"train.reference={straight}", "model.weights=random")
    with pytest.raises(ValueError, match="was trained on another base than this, whose weights have other values"):
        train.main(asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lora=null"], "train.objective: dpo compares the network with what it was"),
        (["data.answers=all"], "data.answers: got all; with train.objective=dpo it has no meaning"),
        (["train.objective=supervised", "preference.beta=1"], "preference.beta: got 1.0, and train.objective is sup"),
        (["train.objective=supervised", "train.reference=base"], "train.reference: got base; nothing is compared"),
        (["preference.loss=ipo", "preference.label_smoothing=0.1"], "only the loss sigmoid is smoothed"),
        (["preference.label_smoothing=0.5"], "preference.label_smoothing"),
        (["data.train={questions: q.json, annotations: a.json, images: i}"], "VQA's files have no rejected answers"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes: Sequence[str], message: str, tmp_path: Path) -> None:
    config, *overrides = words(tmp_path, tmp_path / "run", *changes)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (its text is compared below)
        load_config(config, overrides)
    assert message in " ".join(str(raised.value).split())


def test_rows_that_are_no_pairs_end_a_run_by_name(pairs: Path, tmp_path: Path) -> None:
    """Those without a rejected answer; of validation they are answered, but not measured as pairs."""
    lines = (pairs / "train.jsonl").read_text().splitlines(keepends=True)
    alone = {name: value for name, value in json.loads(lines[1]).items() if name != "rejected"}
    same = json.loads(lines[2]) | {"rejected": " " + json.loads(lines[2])["suffix"]}
    for bad, reason in ((alone, "has no rejected answer"), (same, "rejected")):
        (pairs / "bad.jsonl").write_text("".join([lines[0], json.dumps(bad) + "\n", *lines[3:]]))
        with pytest.raises(ValueError, match=rf"(?s)1 of .* cannot be used.*{reason}"):
            train.main(words(pairs, tmp_path / "run", f"data.train.jsonl={pairs}/bad.jsonl"))
    assert not (tmp_path / "run").exists()


def test_that_there_are_no_validation_pairs_is_said(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (pairs / "val.jsonl").read_text().splitlines()]
    plain = [json.dumps({name: row[name] for name in row if name != "rejected"}) + "\n" for row in rows]
    (pairs / "plain.jsonl").write_text("".join(plain))
    train.main(words(pairs, tmp_path / "run", f"data.validation.jsonl={pairs}/plain.jsonl", "train.max_steps=1"))
    assert "data.validation has no pairs, so that only the answers to it are measured" in capsys.readouterr().out
    evaluated = [line for line in logged(tmp_path / "run") if "eval_loss" in line]
    assert all("eval_kl" not in line for line in evaluated)


def test_the_configuration_for_8_gb_tunes_a_trained_adapter(pairs: Path, straight: Path, tmp_path: Path) -> None:
    """As it stands, but for the checkpoint, the paths and the size of a step; a tenth of the images is held out."""
    here = [f"model.path={BASE}", "model.dtype=float32", "model.device=cpu", f"output={tmp_path}/run"]
    data = [f"data.train.jsonl={pairs}/train.jsonl", f"data.train.images={pairs}/images", "data.workers=0"]
    config = str(ROOT / "configs/preferences_8gb.yaml")
    train.main([config, *here, *data, f"lora.start_from={straight}", "train.batch_size=12"])
    (evaluated,) = [line for line in logged(tmp_path / "run") if "eval_loss" in line]
    assert evaluated["eval_kl"] > 0
    assert json.loads((tmp_path / "run/result.json").read_text())["finished"]


def test_inspecting_says_which_answer_is_preferred(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*words(pairs, tmp_path / "run"), "--inspect"])
    said = " ".join(capsys.readouterr().out.split())
    assert "learns to prefer |" in said
    assert "learns to prefer | to" in (tmp_path / "run/inspect.html").read_text()
    assert "no answer leaks into what comes before it" in said


def test_the_plan_counts_the_reference_where_it_has_values(pairs: Path, straight: Path, tmp_path: Path) -> None:
    """A new adapter starts as the base, and takes nothing more."""
    components = []
    for start in ("null", str(straight)):
        config, *overrides = words(pairs, tmp_path / "run", f"lora.start_from={start}")
        planned = plan_run(load_config(config, overrides), PaliGemmaConfig.from_directory(BASE), Longest(20, 12, 8))
        components.append(planned.plan.components)
    assert "reference's adapter" not in components[0]
    assert components[1]["reference's adapter"] == components[1]["trained weights"] > 0
