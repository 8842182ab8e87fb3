"""The scripts as a person runs them: every configuration, the whole way from training to a merged checkpoint,
mistakes.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import merge_lora
import predict
import train
from data.boxes import boxes_in
from data.drawing import draw_boxes
from data.images import open_image
from data.records import load_records
from data.synthetic import scenes
from finetune import cli
from finetune.adapters.metadata import training_facts
from finetune.config.load import load_config
from finetune.evaluation.answer import Answer
from finetune.evaluation.run import labels_of_run
from finetune.system import terminal
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.result import Result
from model import PaliGemma

ROOT = Path(__file__).parent.parent
CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/connectors").glob("*.yaml")])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_with_scenes(tmp_path_factory.mktemp("base"))


def base_with_scenes(directory: Path) -> Path:
    """The tiny base, and scenes to ask about."""
    shutil.copytree(ROOT / "assets/tiny-base", directory, dirs_exist_ok=True)
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(directory / "data", scenes=12, seed=seed, split=split)
    return directory


def files(base: Path, split: str) -> dict[str, str]:
    return {
        "questions": f"{base}/data/v2_OpenEnded_mscoco_{split}_questions.json",
        "annotations": f"{base}/data/v2_mscoco_{split}_annotations.json",
        "images": f"{base}/data/images",
    }


def overrides(base: Path, output: Path, *more: str) -> list[str]:
    """Two small steps on the scenes instead of what a configuration asks for."""
    train_files, validation_files = (json.dumps(files(base, split)) for split in ("train2014", "val2014"))
    return [
        f"model={{path: {base}, dtype: float32, device: cpu}}",
        f"data={{train: {train_files}, validation: {validation_files}, workers: 0}}",
        "train={max_steps: 4, batch_size: 8, micro_batch: 4, learning_rate: 1e-2, log_every: 1, eval_every: 2}",
        "evaluation={count: 5, batch_size: 4, max_new_tokens: 6}",
        f"output={output}",
        *more,
    ]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the quickstart's configuration."""
    output = tmp_path_factory.mktemp("runs") / "quickstart"
    train.main([str(ROOT / "configs/quickstart.yaml"), *overrides(base, output)])
    return output


def digest(directory: Path) -> dict[str, bytes]:
    """Every file below a directory and what it holds."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def arguments(base: Path, output: Path) -> list[str]:
    return [str(ROOT / "configs/quickstart.yaml"), *overrides(base, output)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(base: Path, tmp_path: Path, path: Path) -> None:
    """As it stands but for its files, its size and its length."""
    config = load_config(path)
    changes = [
        f"model.path={base}",
        "model.revision=null",
        "model.dtype=float32",
        "model.quantize=null",
        "model.device=cpu",
        "train.epochs=null",
        "train.max_steps=2",
        "train.batch_size=4",
        "train.micro_batch=2",
        "data.workers=0",
        f"output={tmp_path}/run",
    ]
    if config.stages:
        short = [stage.model_dump() | {"epochs": None, "max_steps": 1} for stage in config.stages]
        changes.append(f"stages={json.dumps(short)}")
    held_out = config.data.validation == "auto"
    for place, source in (config.data.places("train") | ({} if held_out else config.data.places("validation"))).items():
        split = "train2014" if "train" in place else "val2014"
        if source.jsonl and config.learned_answers == "pair":
            captions = map(json.loads, (base / f"data/captions_{split}.jsonl").read_text().splitlines())
            pairs = "".join(json.dumps(caption | {"rejected": "nothing"}) + "\n" for caption in captions)
            (tmp_path / f"{split}.jsonl").write_text(pairs)
            changes += [f"{place}.jsonl={tmp_path}/{split}.jsonl", f"{place}.images={base}/data"]
        elif source.jsonl:
            changes.append(f"{place}.jsonl={base}/data/captions_{split}.jsonl")
        else:
            changes += [f"{place}.{name}={value}" for name, value in files(base, split).items()]
            changes += [f"{place}.fraction=null", f"{place}.count=20"]
    if config.data.validation is not None:
        changes += ["train.eval_every=2", "evaluation.count=4"]
    train.main([str(path), *changes])
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists() or (tmp_path / "run/model").is_dir()
    for stage in config.stages:
        assert (tmp_path / f"run/stages/{stage.name}/adapter/adapter_model.safetensors").exists()


def test_the_end_of_a_run_says_once_what_was_kept(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was the last step or one long before."""
    for best, times in ((4, ["step 2", "step 4"]), (2, ["step 2", "step 2"])):
        figures = iter([0.0 if best == 4 else 100.0, 50.0])

        def measure(*_: Any, figures: Any = figures) -> Any:
            return lambda: {"loss": 1.0, "accuracy": next(figures)}

        monkeypatch.setattr("finetune.run.evaluation_of", measure)
        train.main([*arguments(base, tmp_path / f"run{best}"), "train.save_every=100"])
        shown = capsys.readouterr().out.splitlines()
        kept = [line for line in shown if line.startswith("kept ")]
        assert [line.removeprefix("kept ").split(",")[0] for line in kept] == times
        assert kept[-1] in shown[-4:]


def test_a_run_directory_describes_itself(base: Path, run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "adapter", "checkpoints", "metrics.jsonl"}
    assert load_config(run / "config.yaml") == load_config(*split_arguments(arguments(base, run)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "eval_loss", "eval_accuracy", "eval_accuracy_yes/no"} <= set().union(*lines)
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    kept = json.loads((run / "result.json").read_text())
    evaluations = [line for line in lines if "eval_accuracy" in line]
    best = max(evaluations, key=lambda line: (line["eval_accuracy"], -line["eval_loss"], line["step"]))
    assert (kept["step"], kept["metric"], kept["metric_value"]) == (best["step"], "accuracy", best["eval_accuracy"])
    facts = training_facts(run / "adapter")
    assert facts.validation_loss == kept["validation_loss"] == best["eval_loss"]
    assert (facts.step, facts.metric, facts.metric_value) == (kept["step"], "accuracy", kept["metric_value"])


def test_a_run_is_extended_but_not_shortened(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    longer = [*arguments(base, tmp_path / "run"), "train.max_steps=6"]
    with pytest.raises(ValueError, match=r"train\.max_steps: was 4, is 6"):
        train.main(longer)
    train.main([*longer, "--accept-changes"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert f"kept {Result.read(tmp_path / 'run')}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="step-000006 is beyond the 4 steps of this configuration: make"):
        train.main([*arguments(base, tmp_path / "run"), "--accept-changes"])


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(
    base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although an evaluation has kept an adapter by then; that of a run that ended gives way to nothing."""
    argv = [*arguments(base, tmp_path / "run"), "train.save_every=100"]
    accumulate = GradientAccumulation.accumulate

    def stopped(self: GradientAccumulation, examples: Any, tokens: int, step: int) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return accumulate(self, examples, tokens, step)

    monkeypatch.setattr(GradientAccumulation, "accumulate", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv)
    monkeypatch.setattr(GradientAccumulation, "accumulate", accumulate)
    assert (tmp_path / "run/adapter").is_dir()
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    with pytest.raises(ValueError, match="adapter exists, without checkpoints to go on from"):
        train.main([*argv, "lora.rank=5"])
    train.main(argv)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match="adapter exists, without checkpoints to go on from"):
        train.main(argv)


def split_arguments(argv: list[str]) -> tuple[str, list[str]]:
    return argv[0], argv[1:]


def test_merged_answers_as_the_adapter_and_results_are_official(
    base: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge_lora.main([str(run / "adapter"), "--output", str(run / "merged"), "--dtype", "float32"])
    assert "verified" in capsys.readouterr().out
    evaluate.main(arguments(base, run))
    shown = capsys.readouterr().out
    assert all(arm in shown for arm in ("base", "adapter", "merged"))
    results = {arm: json.loads((run / f"eval/{arm}/results.json").read_text()) for arm in ("base", "adapter", "merged")}
    assert results["merged"] == results["adapter"] != results["base"]
    asked = json.loads((base / "data/v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    assert [set(answer) for answer in results["adapter"]] == [{"question_id", "answer"}] * len(asked)
    assert {answer["question_id"] for answer in results["adapter"]} == {question["question_id"] for question in asked}
    # Scoring the written file gives the score that was written beside it.
    official = files(base, "val2014")
    capsys.readouterr()
    written = str(run / "eval/adapter/results.json")
    evaluate.main(
        ["--results", written, "--questions", official["questions"], "--annotations", official["annotations"]]
    )
    overall = json.loads((run / "eval/adapter/metrics.json").read_text())["overall"]
    assert f"{overall:.2f}" in capsys.readouterr().out
    # A glance leaves the result as it is, and what a configuration settles is not taken from elsewhere.
    before = digest(run / "eval")
    evaluate.main([*arguments(base, run), "--limit", "3"])
    assert digest(run / "eval") == before
    with pytest.raises(ValueError, match=r"with CONFIG\.yaml takes no --adapter, --batch-size; override its keys"):
        evaluate.main([*arguments(base, run), "--adapter", "elsewhere", "--batch-size", "3"])


def test_a_run_that_trained_nothing_yet_is_not_evaluated_unless_asked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = [*arguments(base, tmp_path / "never"), "--limit", "2"]
    with pytest.raises(ValueError, match=r"never/adapter does not exist: the run has no result yet\..*--arm base"):
        evaluate.main(never)
    with pytest.raises(ValueError, match=r"--arm adapter: .*never has base; train it first"):
        evaluate.main([*never, "--arm", "base", "--arm", "adapter"])
    evaluate.main([*never, "--arm", "base"])
    assert "base" in capsys.readouterr().out
    assert not (tmp_path / "never").exists()


def test_figures_of_other_questions_are_not_overwritten(base: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "merged"))
    asked = arguments(base, tmp_path / "run")
    evaluate.main(asked)
    before = digest(tmp_path / "run")
    other = f"data.validation={json.dumps(files(base, 'train2014'))}"
    for change, named in ((other, "questions, annotations"), ("data.validation.count=3", "count, sample_by, seed")):
        with pytest.raises(ValueError, match=rf"eval/base holds figures of something else \(.*{named}.* differ\)"):
            evaluate.main([*asked, change])
        assert digest(tmp_path / "run") == before
    evaluate.main([*asked, "--arm", "adapter", other, "--output", str(tmp_path / "elsewhere")])
    assert digest(tmp_path / "run") == before
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"adapter"}
    evaluate.main(asked)  # the same questions again


def test_results_are_scored_to_a_file_and_up_to_a_limit(base: Path, run: Path, tmp_path: Path) -> None:
    official = files(base, "val2014")
    asked = json.loads(Path(official["annotations"]).read_text())["annotations"]
    rows = [{"question_id": row["question_id"], "answer": row["multiple_choice_answer"]} for row in asked]
    for row in rows[5:]:
        row["answer"] = "wrong"
    (tmp_path / "results.json").write_text(json.dumps(rows))
    score = ["--results", str(tmp_path / "results.json"), "--questions", official["questions"]]
    score += ["--annotations", official["annotations"]]
    evaluate.main([*score, "--limit", "5", "--output", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["questions"], metrics["results"]) == (5, str(tmp_path / "results.json"))
    assert metrics["overall"] > 90
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(asked)
    with pytest.raises(ValueError, match=r"holds figures of something else \(limit differ\)"):
        evaluate.main([*score, "--output", str(tmp_path)])
    (tmp_path / "results.json").write_text(json.dumps([*rows, {"question_id": 1, "answer": "x"}]))
    with pytest.raises(ValueError, match=r"1 predicted but not asked \('1'\)"):
        evaluate.main([*score, "--limit", "5"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--results", "F", "--prompt", "x", "--batch-size", "16"], "with --results takes no --prompt, --batch-size$"),
        (
            ["--results", "F", "--images", "x", "--arm", "base"],
            "with --results takes no --images, --arm|--arm, --images",
        ),
        (["--model", "M", "--arm", "base"], r"with --model \(or --adapter\) takes no --arm$"),
        (["run.yaml", "--dtype", "bfloat16"], "takes no --dtype; override its keys"),
        (["run.yaml", "--results", "F"], "takes no --results; override"),
        (["--model", "M", "--questions", "F"], r"needs --annotations and --images"),
        (["--results", "F", "--annotations", "F"], "--results needs --questions"),
        (["--model", "M"], r"needs --questions and --annotations and --images, or --jsonl, or --source$"),
        (["--model", "M", "--source", "csv=F", "--images", "D"], r"--source takes no --images: give it their keys"),
        (["--model", "M", "--source", "csv"], r"--source: override 'csv': expected section.key=value"),
        (["--model", "M", "--source", "cvs=F"], r"cvs: .*did you mean csv\?"),
        (
            ["--model", "M", "--source", "csv=F", "tsv=F"],
            r"--source tsv=F: data.validation.tsv: expected either questions",
        ),
        (["run.yaml", "--source", "csv=F"], r"takes no --source"),
        (
            ["--model", "M", "--jsonl", "F", "--questions", "F", "--prompt", "x"],
            r"--jsonl takes no --questions, --prompt: its lines say what is asked",
        ),
        (["run.yaml", "--jsonl", "F"], r"takes no --jsonl"),
        (["--results", "F", "--jsonl", "F"], r"takes no --jsonl"),
    ],
)
def test_options_that_mean_nothing_in_a_form_are_refused(argv: list[str], message: str) -> None:
    """Also those that were given their default."""
    with pytest.raises(ValueError, match=message):
        evaluate.main(argv)


@pytest.mark.parametrize(
    "name", ["evaluate", "predict", "merge_lora", "train", "finetune.pipeline", "data.download.vqav2"]
)
def test_every_option_has_a_line_of_help(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = []

    class Found(Exception):  # noqa: N818
        pass

    def found(parser: argparse.ArgumentParser, *_: Any) -> None:
        parsers.append(parser)
        raise Found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", found)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", found)
    with pytest.raises(Found):
        importlib.import_module(name).main([])
    assert not [action.dest for action in parsers[0]._actions if not action.help]
    assert parsers[0].format_help()


def test_a_run_that_does_not_fit_does_not_start(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this does not fit: .*raise memory\.budget_gib"):
        train.main([*arguments(base, tmp_path / "run"), "memory.budget_gib=0.1"])
    assert not (tmp_path / "run").exists()


def test_more_recomputed_layers_than_there_are_is_refused(base: Path, tmp_path: Path) -> None:
    layers = json.loads((base / "config.json").read_text())["text_config"]["num_hidden_layers"]
    asked = [*arguments(base, tmp_path / "run"), "--dry-run"]
    train.main([*asked, f"train.recompute={layers}"])
    with pytest.raises(ValueError, match=f"recompute is {layers + 1}; this network has {layers} decoder layers"):
        train.main([*asked, f"train.recompute={layers + 1}"])


def test_a_quantised_base_is_refused_by_a_dry_run(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("data"))
    asked = [*arguments(base, tmp_path / "run"), f"model.path={tmp_path}/base", "--dry-run"]
    train.main(asked)
    tensors = load_file(tmp_path / "base/model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, tmp_path / "base/model.safetensors")
    with pytest.raises(ValueError, match=r"is of a quantised checkpoint .* stored in I8"):
        train.main(asked)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"this checkpoint is quantised \(bitsandbytes, 4 bits, fp4\)"):
        train.main(asked)


def test_a_wrong_name_of_the_base_is_said_before_anything_else(base: Path, run: Path) -> None:
    """Not as a configuration that leads to another result."""
    with pytest.raises(ValueError, match=r"/nowhere is neither a directory nor a Hub id"):
        train.main([*arguments(base, run), "model.path=/nowhere"])


def test_a_network_is_gone_before_the_next_one_is_loaded(
    base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them would not fit on a small card."""
    loaded: list[weakref.ref[PaliGemma]] = []
    load = PaliGemma.from_pretrained

    def counted(*arguments: Any, **options: Any) -> PaliGemma:
        assert not any(reference() for reference in loaded)
        model = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(PaliGemma, "from_pretrained", counted)
    evaluate.main([*arguments(base, run), "--limit", "3"])
    assert len(loaded) >= 2


def test_a_checkpoint_is_evaluated_without_a_config(base: Path, run: Path, tmp_path: Path) -> None:
    named = [word for name, value in files(base, "val2014").items() for word in (f"--{name}", value)]
    options = ["--limit", "7", "--dtype", "float32", "--device", "cpu", "--output", str(tmp_path)]
    evaluate.main(["--model", str(base), "--adapter", str(run / "adapter"), *named, *options])
    assert len(json.loads((tmp_path / "results.json").read_text())) == 7
    assert json.loads((tmp_path / "metrics.json").read_text())["prompt"] == "answer en {question}"


def test_lines_of_ones_own_are_scored_with_any_adapter(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer counts that equals the suffix, or one of several; images are beside the lines, or in --images."""
    shutil.copytree(run / "adapter", tmp_path / "mine")
    images = sorted((base / "data/images").iterdir())[:2]
    lines = [{"id": f"q{k}", "image": path.name, "prefix": "caption en"} for k, path in enumerate(images)]
    common = ["--adapter", str(tmp_path / "mine"), "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "4"]
    capsys.readouterr()
    predict.main([*common, "--image", str(images[0]), "--prompt", "caption en"])
    suffixes: list[Any] = [["never this", capsys.readouterr().out.strip()], "never this"]
    rows = [json.dumps(line | {"suffix": suffix}) for line, suffix in zip(lines, suffixes, strict=True)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    mine = [*common, "--jsonl", str(tmp_path / "mine.jsonl")]
    evaluate.main([*mine, "--images", str(base / "data/images"), "--output", str(tmp_path / "found")])
    metrics = json.loads((tmp_path / "found/metrics.json").read_text())
    assert (metrics["overall"], metrics["questions"], metrics["adapter"]) == (50.0, 2, str(tmp_path / "mine"))
    answers = json.loads((tmp_path / "found/results.json").read_text())
    assert [answer["question_id"] for answer in answers] == ["q0", "q1"]
    with (tmp_path / "mine.csv").open("w", newline="") as table:
        row = ("a", images[0].name, "caption en", suffixes[0][1])
        csv.writer(table).writerows([("id", "image", "asked", "suffix"), row])
    named = ["--source", f"csv={tmp_path}/mine.csv", f"images={base}/data/images", "columns.prefix=asked", "task=chart"]
    evaluate.main([*common, *named, "--output", str(tmp_path / "table")])
    metrics = json.loads((tmp_path / "table/metrics.json").read_text())
    assert (metrics["overall"], metrics["questions"], metrics["metric"]) == (100.0, 1, "relaxed accuracy")
    with pytest.raises(ValueError, match=r"holds figures of something else \(task differ\)"):
        evaluate.main([*common, *named, "--task", "document", "--output", str(tmp_path / "table")])
    for path in images:
        shutil.copy(path, tmp_path)
    evaluate.main([*mine, "--model", str(base), "--limit", "1"])
    assert "100.00" in capsys.readouterr().out
    (tmp_path / "mine.jsonl").write_text(rows[0])
    with pytest.raises(ValueError, match=r"holds figures of something else \(jsonl differ\)"):
        evaluate.main([*mine, "--output", str(tmp_path / "found")])


def test_answers_are_chosen_among_those_of_a_file(
    base: Path, run: Path, tmp_path: Path, image_paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run, of a checkpoint, and by predict.py; figures of other candidates, or of none, are not overwritten."""
    allowed, other = tmp_path / "allowed.txt", tmp_path / "other.txt"
    allowed.write_text("no\nyes\na red circle\n")
    other.write_text("no\nyes\n")
    adapter = [*arguments(base, run), "--arm", "adapter", "--limit", "6", "--output", str(tmp_path / "run")]
    evaluate.main([*adapter, "--candidates", str(allowed)])
    named = [word for name, value in files(base, "val2014").items() for word in (f"--{name}", value)]
    network = ["--adapter", str(run / "adapter"), "--dtype", "float32", "--device", "cpu"]
    asked = [*network, *named, "--limit", "6", "--output", str(tmp_path / "model"), "--candidates", str(allowed)]
    evaluate.main(asked)
    assert "ECE" in capsys.readouterr().out
    metrics, answers = (tmp_path / "run/adapter/metrics.json", tmp_path / "run/adapter/answers.jsonl")
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {line["answer"] for line in lines} <= {"no", "yes", "a red circle"}
    assert [len(line["candidates"]) for line in lines] == [3] * 6
    assert answers.read_text() == (tmp_path / "model/answers.jsonl").read_text()
    assert json.loads(metrics.read_text())["candidates"] == ["no", "yes", "a red circle"]
    for more in ([], ["--candidates", str(other)]):
        with pytest.raises(ValueError, match=r"holds figures of something else \(candidates differ\)"):
            evaluate.main([*adapter, *more])
    with pytest.raises(ValueError, match="--candidates takes no --max-new-tokens"):
        evaluate.main([*asked, "--max-new-tokens", "3"])
    predicting = [*network, "--image", *image_paths, "--prompt", "caption en", "--candidates", str(allowed)]
    capsys.readouterr()
    predict.main([*predicting, "--format", "jsonl"])
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert [line["answer"], line["confidence"]] == list(line["candidates"][0].values())
    with pytest.raises(ValueError, match="--candidates takes no --temperature, --seed: answers are chosen"):
        predict.main([*predicting, "--temperature", "1", "--seed", "3"])


def test_labels_of_a_run_are_the_right_answers_of_its_training_data(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the source of the same name, where there is one, and only where the task is classify. Where they cannot be
    read, the evaluation does without.
    """
    train_files: dict[str, Any] = dict(files(base, "train2014"))
    validation = files(base, "val2014")
    captions = {"jsonl": f"{base}/data/captions_train2014.jsonl", "name": "captions"}

    def labels(train: Any, validation: Any) -> dict[str, list[str]]:
        data = f"data={json.dumps({'train': train, 'validation': validation})}"
        return labels_of_run(load_config(ROOT / "configs/quickstart.yaml", [*overrides(base, tmp_path), data]))

    answers = {record["answer"] for record in load_records(**train_files)}
    classify = validation | {"task": "classify"}
    assert labels(train_files, validation) == {}
    found = labels(train_files, classify)
    assert (list(found), set(found[""])) == ([""], answers)
    two = [train_files | {"name": "questions"}, captions]
    of_two = labels(two, [classify | {"name": "questions"}, captions])
    assert (list(of_two), set(of_two["questions"])) == (["questions"], answers)
    gone = train_files | {"questions": f"{base}/gone.json"}
    assert labels(gone, classify) == {}
    assert "accuracy among labels is left out, labels are the right answers of data.train" in capsys.readouterr().out


def test_another_adapter_is_evaluated_on_the_questions_of_a_run(base: Path, run: Path, tmp_path: Path) -> None:
    """As the refusal of --adapter says."""
    other = tmp_path / "other"
    shutil.copytree(run / "adapter", other / "adapter")
    with pytest.raises(
        ValueError, match=r"takes no --adapter; .*with output=DIR --arm adapter.* --adapter DIR --jsonl"
    ):
        evaluate.main([*arguments(base, run), "--adapter", str(other)])
    figures = str(tmp_path / "figures")
    evaluate.main([*arguments(base, run), f"output={other}", "--arm", "adapter", "--output", figures])
    assert json.loads((tmp_path / "figures/adapter/metrics.json").read_text())["adapter"] == str(other / "adapter")


def test_results_are_shown_with_whole_paths(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, to be copied, however narrow the terminal is; the figures stand under a short name."""
    monkeypatch.setenv("COLUMNS", "60")
    long = tmp_path / "a-directory-with-a-long-name" / ("of-many-words-" * 6 + "and-more")
    shutil.copytree(run / "adapter", long)
    official = files(base, "val2014")
    named = [word for name, value in official.items() for word in (f"--{name}", value)]
    evaluate.main(["--adapter", str(long), *named, "--limit", "3", "--device", "cpu", "--output", str(long.parent)])
    shown = capsys.readouterr().out
    assert f"adapter: {long}\n" in shown
    assert shown.count("of-many-words") == 6
    assert "│ adapter │" in shown
    score = ["--results", str(long.parent / "results.json"), "--limit", "3", "--questions", official["questions"]]
    evaluate.main([*score, "--annotations", official["annotations"]])
    shown = capsys.readouterr().out
    assert f"results: {long.parent}/results.json\n" in shown
    assert "│ results │" in shown


def test_a_finished_run_is_not_trained_again(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command changes no byte of it: neither result nor figures. A lost adapter comes back."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train.main(arguments(base, run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "is finished: nothing is left to train; kept step" in capsys.readouterr().out
    train.main(arguments(base, tmp_path / "run"))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def image_paths(base: Path) -> list[str]:
    return sorted(str(path) for path in (base / "data/images").iterdir())[:3]


def predictions(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    capsys.readouterr()
    predict.main([*argv, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "4"])
    return capsys.readouterr().out.splitlines()


def test_predict_asks_every_prompt_of_every_image(
    base: Path, run: Path, image_paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["answer en is there a circle?", "caption en"]
    common = ["--model", str(base), "--adapter", str(run / "adapter")]
    rows = predictions(capsys, *common, "--image", *image_paths, "--prompt", *prompts, "--format", "jsonl")
    asked = [(row["image"], row["prompt"]) for row in map(json.loads, rows)]
    assert asked == [(image, prompt) for image in image_paths for prompt in prompts]
    for row in map(json.loads, rows[:2]):
        assert predictions(capsys, *common, "--image", row["image"], "--prompt", row["prompt"]) == [row["answer"]]


def test_predict_without_an_image_asks_of_text_alone(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["answer en what is 1 and 1?", "caption en"]
    asked = ["--model", str(base), "--prompt", *prompts]
    rows = [json.loads(row) for row in predictions(capsys, *asked, "--format", "jsonl")]
    assert [(row["prompt"], "image" in row) for row in rows] == [(prompt, False) for prompt in prompts]
    assert predictions(capsys, *asked) == [f"{row['prompt']}\t{row['answer']}" for row in rows]
    assert predictions(capsys, *asked[:-1]) == [rows[0]["answer"]]


def test_a_folder_stands_for_the_images_in_it(
    base: Path,
    image_paths: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By name, beside files in the order given, each once; other files, hidden ones and folders within are left out."""
    photos = tmp_path / "photos"
    (photos / "within").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "c.jpeg", "._a.jpg", "within/d.jpg"):
        with Image.open(image_paths[0]) as image:
            image.save(photos / name, format="PNG")
    (photos / "notes.txt").write_text("no image")
    (photos / "folder.jpg").mkdir()
    monkeypatch.chdir(tmp_path)
    given = [image_paths[1], "photos/c.jpeg", "photos/", image_paths[1], "./photos/a.jpg", image_paths[2]]
    rows = predictions(capsys, "--model", str(base), "--prompt", "caption en", "--format", "jsonl", "--image", *given)
    expected = [image_paths[1], "photos/c.jpeg", "photos/a.jpg", "photos/b.PNG", image_paths[2]]
    assert [json.loads(row)["image"] for row in rows] == expected


def test_a_folder_without_images_is_named_with_what_was_looked_for(
    base: Path, image_paths: list[str], tmp_path: Path
) -> None:
    """Before anything is answered."""
    (tmp_path / "notes.txt").write_text("no image")
    asked = ["--model", str(base), "--prompt", "caption en", "--image", image_paths[0], str(tmp_path)]
    with pytest.raises(ValueError, match=rf"^the folder {tmp_path} has no image: looked for .*\.jpg, .*\.png, "):
        predict.main(asked)


def test_an_adapter_finds_its_base(
    base: Path,
    run: Path,
    image_paths: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the name it has, from wherever it is asked; in the directory of its run, too."""
    asked = ["--image", image_paths[0], "--prompt", "caption en"]
    expected = predictions(capsys, "--model", str(base), "--adapter", str(run / "adapter"), *asked)
    assert predictions(capsys, "--adapter", str(run / "adapter"), *asked) == expected
    assert predictions(capsys, "--adapter", str(run), *asked) == expected
    shutil.copytree(run, tmp_path / "runs/mine", ignore=shutil.ignore_patterns("eval", "merged"))
    shutil.copytree(base, tmp_path / "bases/tiny", ignore=shutil.ignore_patterns("data"))
    config = tmp_path / "runs/mine/adapter/adapter_config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps(written | {"base_model_name_or_path": "bases/tiny"}))
    (config.parent / "manifest.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        assert predictions(capsys, "--adapter", str(tmp_path / "runs/mine"), *asked) == expected
    merge_lora.main([str(tmp_path / "runs/mine"), "--output", str(tmp_path / "merged"), "--dtype", "float32"])
    assert predictions(capsys, "--model", str(tmp_path / "merged"), *asked) == expected
    config.write_text(json.dumps(written | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"adapter_config\.json does not name its base: name it yourself"):
        predictions(capsys, "--adapter", str(tmp_path / "runs/mine"), *asked)
    with pytest.raises(ValueError, match="expected --model, a checkpoint; or --adapter"):
        predictions(capsys, *asked)


@pytest.mark.parametrize("known", [True, False], ids=["with --model", "without"])
@pytest.mark.parametrize("kind", ["empty", "absent", "unfinished run"])
def test_a_directory_without_an_adapter_is_said_to_have_none(
    base: Path, image_paths: list[str], tmp_path: Path, known: bool, kind: str
) -> None:
    """Before a network is opened."""
    given = tmp_path / "given"
    if kind != "absent":
        given.mkdir()
    if kind == "unfinished run":
        (given / "checkpoints").mkdir()
    named = ["--adapter", str(given), *(["--model", str(base)] if known else [])]
    official = [word for name, value in files(base, "val2014").items() for word in (f"--{name}", value)]
    expected = rf"{given}\S* .*: expected the directory of an adapter, or of a run$"
    with pytest.raises(ValueError, match=expected):
        predict.main([*named, "--image", image_paths[0], "--prompt", "caption en"])
    with pytest.raises(ValueError, match=expected):
        evaluate.main([*named, *official])


def test_predict_samples_by_seed(base: Path, image_paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    hot = ["--model", str(base), "--image", *image_paths, "--prompt", "caption en", "--temperature", "2.5"]
    first, again, other = (predictions(capsys, *hot, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_inspect_shows_the_first_examples_and_trains_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*arguments(base, tmp_path / "run"), "--inspect"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "pass: leak: no answer leaks into what comes before it" in shown
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["inspect.html"]
    train.main([*arguments(base, tmp_path / "run"), "--inspect", "--page", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "run/inspect.html").read_text()


def test_inspect_shows_texts_as_they_stand(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are markup to rich, and unbalanced ones an error."""
    image = sorted((base / "data/images").iterdir())[0].name
    line = {"image": image, "prefix": "[INST] x [/INST]", "suffix": "[cat] on [mat]"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    source = f"data={{train: {{jsonl: {tmp_path}/train.jsonl, images: {base}/data/images}}, workers: 0}}"
    settings = [*arguments(base, tmp_path / "run"), source, "train.eval_every=null"]
    train.main([*settings, "--inspect"])
    shown = capsys.readouterr().out
    assert "[INST] x [/INST]" in shown
    assert "[cat] on [mat]" in shown


def test_inspect_shortens_long_texts_in_the_middle(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With how much of them is not shown; what they begin and end with is."""
    image = sorted((base / "data/images").iterdir())[0].name
    prefix, suffix = (f"first {kind} " + "a red circle " * 100 + f"last {kind}" for kind in ("asked", "answered"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": image, "prefix": prefix, "suffix": suffix}))
    source = f"data={{train: {{jsonl: {tmp_path}/train.jsonl, images: {base}/data/images}}, workers: 0}}"
    monkeypatch.setenv("COLUMNS", "1000")
    train.main([*arguments(base, tmp_path / "run"), source, "train.eval_every=null", "--inspect"])
    shown = capsys.readouterr().out
    for text, kind in ((prefix, "asked"), (suffix, "answered")):
        assert f"first {kind} a red" in shown
        assert f"circle last {kind}" in shown
        hidden = len(text) - terminal.LONGEST_SHOWN
        assert f" [{hidden:,} characters not shown] " in shown
    assert shown.count("circle") < 80


def test_another_configuration_does_not_go_on_with_a_run(base: Path, run: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)another result.*lora\.rank: was 32, is 8"):
        train.main([*arguments(base, run), "lora.rank=8", "lora.alpha=64"])
    with pytest.raises(ValueError, match="to start afresh choose another output"):
        train.main([*arguments(base, run), "--resume", "none"])
    with pytest.raises(ValueError, match="expected auto, none or a checkpoint"):
        train.main([*arguments(base, run), "--resume", "/nowhere"])


def test_merging_overwrites_nothing_and_wants_a_base(base: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exists already: .* or overwrite it with --force"):
        merge_lora.main([str(run / "adapter"), "--output", str(base)])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    file = tmp_path / "file"
    file.write_text("years")
    before = digest(run / "adapter")
    for output in (mine, file, run / "adapter", run):
        with pytest.raises(ValueError, match="overwrites a merged checkpoint only"):
            merge_lora.main([str(run / "adapter"), "--output", str(output), "--force", "--dtype", "float32"])
    assert (mine / "thesis.txt").read_text() == file.read_text() == "years"
    assert digest(run / "adapter") == before
    merged = [str(run / "adapter"), "--output", str(tmp_path / "merged"), "--dtype", "float32", "--force"]
    merge_lora.main(merged)
    with pytest.raises(ValueError, match="is the base itself"):
        merge_lora.main([*merged, "--base", str(tmp_path / "merged")])
    merge_lora.main(merged)  # over what it wrote
    (tmp_path / "merged/notes.txt").write_text("years")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which was not written with it"):
        merge_lora.main(merged)
    with pytest.raises(ValueError, match=r"cannot be read .*\(--base\)"):
        merge_lora.main([str(tmp_path), "--output", str(tmp_path / "merged")])


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("train.py", ["no-such.yaml"], "no-such.yaml"),
        ("train.py", ["configs/quickstart.yaml", "trian.seed=1"], "did you mean"),
        ("train.py", ["configs/quickstart.yaml", "lora.r=8"], "lora.r: unknown key; did you mean lora.rank?"),
        ("train.py", ["configs/quickstart.yaml", "lora.rank=0"], "override 'lora.rank=0': lora.rank: got 0; expected"),
        ("train.py", ["configs/quickstart.yaml", "model.dtype=float16"], "overflow in fp16"),
        (
            "train.py",
            ["configs/quickstart.yaml", "model.path=no/such/dir", "output=no/such/run"],
            "neither a directory nor a Hub id",
        ),
        ("train.py", ["configs/quickstart.yaml", "--probe"], "--probe times the steps that --dry-run plans: give both"),
        ("evaluate.py", ["--limit", "3"], "expected a CONFIG.yaml"),
        ("predict.py", ["--model", "assets/tiny-base", "--image", "x.jpg", "--prompt", "y"], "no image is left"),
        (
            "predict.py",
            ["--model", "assets/tiny-base", "--prompt", "y", "--draw", "z"],
            "--draw saves images, and there",
        ),
        ("predict.py", ["--model", "assets/tiny-base", "--prompt", "<image>y"], "has <image>, and there is none"),
        ("merge_lora.py", ["/nowhere", "--output", "/nowhere/merged"], "(--base)"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    script: str, argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as ended:
        cli.run(importlib.import_module(script.removesuffix(".py")).main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_program_ends_as_its_main_does() -> None:
    command = [sys.executable, "merge_lora.py", "/nowhere", "--output", "/nowhere/merged"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr


def test_help_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert "train.learning_rate" in shown
    assert "Peak learning rate" in shown


def test_a_device_that_is_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cuda:7' is not there"):
        train.main([*arguments(base, tmp_path), "model.device=cuda:7"])


def test_a_card_without_bfloat16_is_told_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.system.device import pick_dtype

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    with pytest.raises(ValueError, match=r"RTX 2080 has no bfloat16.*What works on it: float32"):
        pick_dtype("bfloat16", torch.device("cuda"))
    assert pick_dtype("bfloat16", torch.device("cuda:1")) == torch.bfloat16  # of one that is not here nothing is known
    assert pick_dtype("float32", torch.device("cuda")) == torch.float32


def test_images_that_cannot_be_used_are_named_and_the_others_answered(
    base: Path, image_paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    asked = ["--model", str(base), "--prompt", "x", "--device", "cpu", "--max-new-tokens", "2", "--image"]
    with pytest.raises(ValueError, match="1 of 3 images could not be used"):
        predict.main([*asked, image_paths[0], str(broken), image_paths[1]])
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == image_paths[:2]
    assert f"error: image {broken} cannot be used: cannot identify" in said.err
    with pytest.raises(ValueError, match="no image is left to ask about"):
        predict.main([*asked, str(broken), str(tmp_path / "gone.png")])


def test_an_image_that_cannot_be_used_has_its_line_among_the_others(
    base: Path, image_paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the reason in the place of the answer, one for each prompt, also where no image is left."""
    broken, gone = tmp_path / "broken.jpg", tmp_path / "gone.png"
    broken.write_bytes(b"not an image")
    common = ["--model", str(base), "--device", "cpu", "--max-new-tokens", "2", "--format", "jsonl"]
    asked = [*common, "--prompt", "caption en", "y", "--image"]
    images = [image_paths[0], str(broken), image_paths[1], str(gone)]
    for given, message in (
        (images, "2 of 4 images could not be used"),
        (images[1::2], "no image is left to ask about"),
    ):
        with pytest.raises(ValueError, match=message):
            predict.main([*asked, *given])
        said = capsys.readouterr()
        rows = [json.loads(line) for line in said.out.splitlines()]
        assert [(row["image"], row["prompt"]) for row in rows] == [
            (image, prompt) for image in given for prompt in ("caption en", "y")
        ]
        for row in rows:
            assert ("error" in row) != ("answer" in row)
            assert ("error" in row) == (row["image"] in (str(broken), str(gone)))
        errors = {row["image"]: row["error"] for row in rows if "error" in row}
        assert "cannot identify" in errors[str(broken)]
        assert "does not exist" in errors[str(gone)]
        assert all(f"error: {error}\n" in said.err for error in errors.values())


@pytest.fixture
def unusual(base: Path, tmp_path: Path) -> Path:
    """Scenes of which some images are of unusual kinds, two training ones are broken in a way that the header does not
    tell, one by its header, and one for validation.
    """
    shutil.copytree(base / "data", tmp_path / "data")
    seen, asked = (sorted((tmp_path / "data/images").glob(f"COCO_{split}2014*")) for split in ("train", "val"))
    kinds = iter(seen)
    for mode in ("CMYK", "L", "P", "1"):
        Image.new(mode, (40, 30)).save(next(kinds), "TIFF")
    Image.new("I;16", (40, 30)).save(next(kinds), "PNG")
    Image.new("RGBA", (40, 30)).save(next(kinds), "PNG")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.new("RGB", (40, 30)).save(next(kinds), "JPEG", exif=rotated)
    for path in (next(kinds), next(kinds), asked[0]):
        path.write_bytes(path.read_bytes()[:-60])
    next(kinds).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_broken_images_fails_or_skips_as_asked(
    unusual: Path, base: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, within a quota, listed with the reason, and twice the same."""
    asked = overrides(unusual, unusual / "run", f"model.path={base}", f"data.workers={workers}", "train.batch_size=24")
    config = [str(ROOT / "configs/quickstart.yaml"), *asked]
    with pytest.raises(
        ValueError, match=r"(?s)records cannot be used; more than the 1\.0% .*COCO_train2014_.* cannot be used"
    ):
        train.main(config)
    with pytest.raises(ValueError, match=r"more than the 1\.0% that data\.skip_at_most lets be skipped"):
        train.main([*config, "data.on_error=skip"])
    skip = [*config, "data.on_error=skip", "data.skip_at_most=0.4"]
    train.main(skip)
    train.main([*skip, f"output={unusual}/again"])
    first, second = (unusual / name / "adapter/adapter_model.safetensors" for name in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()
    lines = (unusual / "run/skipped_train.jsonl").read_text().splitlines()
    reasons = {fault["id"]: fault["reason"] for fault in map(json.loads, lines)}
    assert len(reasons) == len(lines)
    assert len({reason.split(" cannot be used")[0] for reason in reasons.values()}) == 3
    evaluate.main(skip)
    asked_of = json.loads((unusual / "run/eval/adapter/results.json").read_text())
    left = (unusual / "run/skipped_validation.jsonl").read_text().splitlines()
    questions = json.loads((unusual / "data/v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    assert len(asked_of) + len(left) == len(questions)
    assert len(left) > 0
    before = digest(unusual / "run")
    evaluate.main([*skip, "--limit", "20"])  # a glance leaves the list of all as it is
    assert digest(unusual / "run") == before
    capsys.readouterr()
    train.main([*skip, "--check"])
    assert capsys.readouterr().out.count("that is within data.skip_at_most (40.0%): a run skips them") == 2


def test_an_image_that_breaks_off_ends_a_run_by_name(unusual: Path, base: Path) -> None:
    """Seen in a worker process, which would add a page of traceback."""
    lines = [{"image": path.name, "prefix": "x", "suffix": "y"} for path in sorted((unusual / "data/images").iterdir())]
    (unusual / "examples.jsonl").write_text("\n".join(map(json.dumps, lines[7:8])))
    settings = overrides(unusual, unusual / "run", f"model.path={base}", "data.workers=1", "train.eval_every=null")
    source = f"data.train={{jsonl: {unusual}/examples.jsonl, images: {unusual}/data/images}}"
    with pytest.raises(ValueError, match=r"^1 of 1 records cannot be used; .*\n  1: image .* truncated") as caught:
        train.main([str(ROOT / "configs/quickstart.yaml"), *settings, source])
    assert "Traceback" not in str(caught.value)


def test_check_decodes_every_image_and_lists_what_cannot_be_used(
    unusual: Path, base: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [
        str(ROOT / "configs/quickstart.yaml"),
        *overrides(unusual, unusual / "run", f"model.path={base}"),
        "--check",
    ]
    with pytest.raises(
        ValueError, match=r"\d records of data\.train cannot be used; more than the 1\.0%.*\n.*data\.validation"
    ):
        train.main(config)
    shown = capsys.readouterr().out
    assert shown.count("truncated") + shown.count("cannot identify") == shown.count("\n  ")
    assert len({line.split(" cannot be used")[0].split()[-1] for line in shown.splitlines() if "image" in line}) == 4
    assert not (unusual / "run").exists()
    train.main([*arguments(base, run), "--check"])
    assert "0 cannot" in capsys.readouterr().out


def test_check_lists_all_where_nothing_can_be_used(
    unusual: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = sorted((unusual / "data/images").iterdir())[7].name
    line = json.dumps({"image": broken, "prefix": "x", "suffix": "y"})
    (unusual / "examples.jsonl").write_text(f"{{\n{line}\n")
    settings = overrides(unusual, unusual / "run", f"model.path={base}", "train.eval_every=null")
    source = f"data={{train: {{jsonl: {unusual}/examples.jsonl, images: {unusual}/data/images}}}}"
    with pytest.raises(ValueError, match=r"^2 records of data\.train cannot be used; none is left, fix them$"):
        train.main([str(ROOT / "configs/quickstart.yaml"), *settings, source, "--check"])
    shown = capsys.readouterr().out
    assert "examples.jsonl, line 1: not valid JSON: " in shown
    assert "truncated" in shown


def test_check_counts_broken_lines_among_all_as_a_run_does(base: Path, tmp_path: Path) -> None:
    """One of four is a quarter of them, not a third of the others."""
    image = sorted((base / "data/images").iterdir())[0].name
    line = json.dumps({"image": image, "prefix": "", "suffix": "y"})
    (tmp_path / "examples.jsonl").write_text("\n".join(["{", line, line, line]))
    settings = [*overrides(base, tmp_path / "run"), "train.eval_every=null", "data.on_error=skip"]
    source = f"data={{train: {{jsonl: {tmp_path}/examples.jsonl, images: {base}/data/images}}}}"
    asked = [str(ROOT / "configs/quickstart.yaml"), *settings[:1], source, *settings[2:]]
    train.main([*asked, "data.skip_at_most=0.25", "--check"])
    train.main([*asked, "data.skip_at_most=0.25", "--inspect"])
    with pytest.raises(ValueError, match=r"^1 records of data\.train cannot be used; more than the 24\.0%"):
        train.main([*asked, "data.skip_at_most=0.24", "--check"])
    with pytest.raises(ValueError, match=r"1 of 4 records cannot be used; more than the 24\.0%"):
        train.main([*asked, "data.skip_at_most=0.24", "--inspect"])


def test_check_says_what_is_wrong_with_both_splits(base: Path, tmp_path: Path) -> None:
    """A file that is not there, and one whose prompts are empty."""
    settings = [*arguments(base, tmp_path / "run"), "--check"]
    gone = {"questions": "null", "annotations": "null", "images": "null", "jsonl": f"{tmp_path}/gone.jsonl"}
    both = [f"data.{split}.{key}={value}" for split in ("train", "validation") for key, value in gone.items()]
    with pytest.raises(ValueError, match=r"(?s)data\.train: .*gone\.jsonl does not exist.*\ndata\.validation: .*gone"):
        train.main([*settings, *both])


def test_check_warns_of_an_empty_prompt(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = sorted((base / "data/images").iterdir())[0].name
    lines = [{"image": image, "prefix": prefix, "suffix": "y"} for prefix in ("", "caption en")]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = f"data={{train: {{jsonl: {tmp_path}/examples.jsonl, images: {base}/data/images}}}}"
    train.main([*arguments(base, tmp_path / "run"), source, "train.eval_every=null", "--check"])
    assert "data.train: warning: every prompt says something: 1 of 2 prompts are empty" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", '{"image": "gone.jpg", "prefix": "x", "suffix": "y"}'])
def test_check_lists_the_reason_where_every_line_is_bad(
    unusual: Path, base: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (unusual / "examples.jsonl").write_text(line)
    settings = overrides(unusual, unusual / "run", f"model.path={base}", "train.eval_every=null")
    source = f"data={{train: {{jsonl: {unusual}/examples.jsonl}}, on_error: skip, skip_at_most: 0.5}}"
    with pytest.raises(ValueError, match=r"^1 records of data\.train cannot be used; none is left, fix them$"):
        train.main([str(ROOT / "configs/quickstart.yaml"), *settings, source, "--check"])
    shown = capsys.readouterr().out
    assert "line 1: not valid JSON" in shown or "gone.jpg does not exist" in shown


def test_a_run_does_not_go_on_with_data_edited_meanwhile(unusual: Path, base: Path) -> None:
    skip = ["data.on_error=skip", "data.skip_at_most=0.4"]
    config = [str(ROOT / "configs/quickstart.yaml"), *overrides(unusual, unusual / "run", f"model.path={base}", *skip)]
    train.main(config)
    annotations = Path(files(unusual, "train2014")["annotations"])
    annotations.write_text(annotations.read_text().replace('"answer": "yes"', '"answer": "no"', 1))
    with pytest.raises(ValueError, match=r"(?s)leads to another result.*data\.train\.annotations: the content"):
        train.main(config)
    before = (unusual / "run/config.yaml").read_bytes()
    with pytest.raises(ValueError, match="run is finished: a change of its configuration would change nothing in it"):
        train.main([*config, "train.learning_rate=0.5", "--accept-changes"])
    assert (unusual / "run/config.yaml").read_bytes() == before
    train.main([*config, "train.max_steps=5", "--accept-changes"])


BOXES = ["<loc0256><loc0256><loc0768><loc0768> circle", "nothing", "<loc0000><loc0000><loc1023><loc0512> wall"]


def say(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """The network answers each record with one of these texts, in turn."""

    def answers(model: object, processor: object, records: Any, *_: object, **__: object) -> dict[str, Answer]:
        return {record["id"]: Answer(texts[k % len(texts)], True, -0.5) for k, record in enumerate(records)}

    monkeypatch.setattr("finetune.evaluation.evaluate.generate_answers", answers)


def test_json_lines_say_how_sure_an_answer_is(
    base: Path, image_paths: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The geometric mean of its tokens' probabilities."""
    say(monkeypatch, "a circle")
    (row,) = predictions(
        capsys, "--model", str(base), "--image", image_paths[0], "--prompt", "caption en", "--format", "jsonl"
    )
    assert json.loads(row)["confidence"] == round(math.exp(-0.5), 4)


def test_boxes_are_drawn_on_copies_of_the_images(
    base: Path,
    image_paths: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all prompts on one copy, where boxes_in says; an image without a box is saved too; inputs stay."""
    say(monkeypatch, *BOXES)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    before = [Path(path).read_bytes() for path in image_paths]
    asked = ["--model", str(base), "--device", "cpu", "--draw", str(tmp_path / "new/drawn"), "--image"]
    predict.main([*asked, image_paths[0], "--prompt", "detect a", "detect b", "detect c"])
    (drawn,) = (tmp_path / "new/drawn").iterdir()
    assert drawn.name == Path(image_paths[0]).name
    assert f"images saved in {tmp_path}/new/drawn: 1, with boxes drawn on them: 2" in capsys.readouterr().err
    size = open_image(image_paths[0]).size
    boxes = [box for text in BOXES for box in boxes_in(text, size)]
    draw_boxes(image_paths[0], boxes).save(tmp_path / drawn.name)
    assert drawn.read_bytes() == (tmp_path / drawn.name).read_bytes()
    asked[-2] = str(tmp_path / "others")
    with pytest.raises(ValueError, match="1 of 4 images could not be used"):
        predict.main([*asked, *image_paths, str(broken), "--prompt", "detect a"])
    assert sorted(path.name for path in (tmp_path / "others").iterdir()) == [Path(path).name for path in image_paths]
    draw_boxes(image_paths[1], []).save(tmp_path / "plain.jpg")
    assert (tmp_path / "others" / Path(image_paths[1]).name).read_bytes() == (tmp_path / "plain.jpg").read_bytes()
    assert [Path(path).read_bytes() for path in image_paths] == before


def test_drawing_replaces_no_file(base: Path, image_paths: list[str], tmp_path: Path) -> None:
    """Neither an input, before minutes are spent on a network, nor one of the same name."""
    content = Path(image_paths[0]).read_bytes()
    folder = Path(image_paths[0]).parent
    asked = ["--model", str(tmp_path / "no network"), "--prompt", "detect a", "--image", image_paths[0], "--draw"]
    with pytest.raises(ValueError, match=r"--draw would replace .*: expected a directory without files of these names"):
        predict.main([*asked, str(folder)])
    assert Path(image_paths[0]).read_bytes() == content
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--draw .*file/x cannot be made"):
        predict.main([*asked, str(tmp_path / "file/x")])


def test_copies_of_images_have_names_of_their_own(tmp_path: Path) -> None:
    images = ["a/scene.jpg", "b/scene.jpg", "c/scene.jpg", "a/photo", "a/x.unknown"]
    names = ["scene.jpg", "scene-2.jpg", "scene-3.jpg", "photo.png", "x.unknown.png"]
    assert predict.drawing_paths(images, tmp_path) == dict(
        zip(images, (tmp_path / name for name in names), strict=True)
    )
    assert predict.drawing_paths(images, None) == {}


def test_locations_of_lines_are_those_of_the_square_for_a_checkpoint_that_pads(base: Path, tmp_path: Path) -> None:
    line = {"image": "wide.png", "prefix": "detect cat", "suffix": "<loc0000><loc0000><loc1023><loc1023> cat"}
    Image.new("RGB", (400, 200)).save(tmp_path / "wide.png")
    (tmp_path / "test.jsonl").write_text(json.dumps(line))
    padding = Path(shutil.copytree(ROOT / "assets/tiny-base", tmp_path / "padding"))
    config = json.loads((padding / "config.json").read_text())
    (padding / "config.json").write_text(json.dumps(config | {"aspect": "pad"}))
    expected = {base: line["suffix"], padding: "<loc0256><loc0000><loc0767><loc1023> cat"}
    for number, (model, suffix) in enumerate(expected.items()):
        output = tmp_path / f"eval{number}"
        asked = ["--model", str(model), "--jsonl", str(tmp_path / "test.jsonl"), "--output", str(output)]
        evaluate.main([*asked, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "2"])
        assert json.loads((output / "answers.jsonl").read_text())["expected"] == [suffix]
