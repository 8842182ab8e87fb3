"""A run with stages, from the command line to its merged checkpoint: what each leaves, resumes, and what is noticed."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import evaluate
import merge_lora
import predict
import train
from finetune import cli, pipeline
from finetune.adapters.locate import find_adapter
from finetune.config.load import load_config
from finetune.config.stages import runs_of
from finetune.lora.config import SCOPES
from finetune.lora.protocol import trained_parameters
from finetune.system.atomic import MANIFEST
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.optimizer import make_optimizer
from finetune.training.result import Result
from finetune.training.setup import adapt, open_model
from model import PaliGemma
from tests import kill_test
from tests.test_scripts import ROOT, base, digest, overrides  # noqa: F401 (base is a fixture)

CONNECTOR = SCOPES["connector"]
WEIGHTS = "adapter/adapter_model.safetensors"
CHANGES = [
    "model.connector=resampler",
    "connector={learning_rate: 1e-3, latents: 3, depth: 1}",
    "image={tiles: 4, aspect: pad}",
    "lora={rank: 4, dropout: 0.1, targets: [language.*]}",
    "train.save_every=1",
    "stages=[{name: align, max_steps: 3, learning_rate: 3e-3}]",
]

Act = Callable[[], None]


@pytest.fixture(autouse=True)
def _unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning takes longer than a run."""
    monkeypatch.setattr("finetune.run.plan_run", kill_test.unplanned)


def arguments(base: Path, output: Path, *more: str) -> list[str]:  # noqa: F811
    return [str(ROOT / "configs/quickstart.yaml"), *overrides(base, output, *CHANGES), *more]


@dataclasses.dataclass
class Seen:
    """What a run had: connector values before its first step, by output directory, and learning rates by step."""

    starts: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    rates: list[tuple[float, ...]] = dataclasses.field(default_factory=list)


def watched(patch: pytest.MonkeyPatch) -> Seen:
    """Note values before the first step of every run, and the learning rates of every step."""
    seen = Seen()
    accumulate, step = GradientAccumulation.accumulate, torch.optim.AdamW.step

    def noted(self: GradientAccumulation, examples: Any, tokens: int, number: int) -> Tensor:
        if number == 0:
            values = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
            seen.starts[f"run {len(seen.starts)}"] = values
        return accumulate(self, examples, tokens, number)

    def rated(self: torch.optim.AdamW, *given: Any, **more: Any) -> Any:
        seen.rates.append(tuple(group["lr"] for group in self.param_groups))
        return step(self, *given, **more)

    patch.setattr(GradientAccumulation, "accumulate", noted)
    patch.setattr(torch.optim.AdamW, "step", rated)
    return seen


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:  # noqa: F811
    """An uninterrupted run, and what it had."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.run.plan_run", kill_test.unplanned)
        seen = watched(patch)
        train.main(arguments(base, output))
    return output, seen


def trained_in(run: Path) -> dict[str, Tensor]:
    """What an adapter has, by name in our layout."""
    stored = load_file(run / WEIGHTS)
    return {name.removeprefix("base_model.model.model."): tensor for name, tensor in stored.items()}


def test_each_stage_is_a_run_of_its_own(base: Path, finished: tuple[Path, Seen]) -> None:  # noqa: F811
    output, _ = finished
    words = arguments(base, output)
    stage, run = runs_of(load_config(words[0], words[1:]))
    for config, steps in ((stage, 3), (run, 4)):
        directory = Path(config.output)
        assert load_config(directory / "config.yaml") == config
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
        assert any("eval_accuracy" in line for line in lines)
        assert sorted(path.name for path in (directory / "checkpoints").iterdir())[-1] == f"step-{steps:06d}"
        assert (kept := Result.read(directory)) is not None
        assert kept.finished
    assert Path(stage.output) == output / "stages/align"
    aligned, whole = trained_in(output / "stages/align"), trained_in(output)
    assert len(aligned) == 14
    assert all(name.startswith(CONNECTOR) for name in aligned)
    assert aligned.keys() < whole.keys()
    network = [
        json.loads((Path(one.output) / "adapter/adapter_config.json").read_text())["network"] for one in (stage, run)
    ]
    assert network[0] == network[1]
    assert network[0].keys() == {"connector", "tiles", "aspect"}


def test_the_run_starts_with_the_stages_connector(finished: tuple[Path, Seen]) -> None:
    output, seen = finished
    aligned = trained_in(output / "stages/align")
    first, second = seen.starts.values()
    in_connector = {name for name in second if name.startswith(CONNECTOR)}
    assert in_connector == set(aligned) == set(first)
    for name, tensor in aligned.items():
        assert torch.equal(second[name], tensor), name
    assert any(not torch.equal(first[name], tensor) for name, tensor in aligned.items())
    assert all(not tensor.any() for name, tensor in second.items() if name.endswith("lora_B"))


def test_a_second_stage_starts_with_the_firsts_connector(
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = watched(monkeypatch)
    stages = "stages=[{name: one, max_steps: 1}, {name: two, max_steps: 1}]"
    train.main(arguments(base, tmp_path / "run", stages, "train.max_steps=1", "train.eval_every=null"))
    starts = list(seen.starts.values())
    for number, name in ((1, "one"), (2, "two")):
        expected = trained_in(tmp_path / "run/stages" / name)
        assert all(torch.equal(starts[number][key], tensor) for key, tensor in expected.items())
    shown = capsys.readouterr().out
    assert shown.index("stage one: the connector alone") < shown.index("stage two: the connector alone")


def fail_at(monkeypatch: pytest.MonkeyPatch, run: int, step: int, act: Act) -> None:
    """Do something before a step (counted from 0) of the first (0) or a later run of the command."""
    accumulate, begun = GradientAccumulation.accumulate, []

    def faulty(self: GradientAccumulation, examples: Any, tokens: int, number: int) -> Tensor:
        if self not in begun:
            begun.append(self)
        if (len(begun) - 1, number) == (run, step):
            act()
        return accumulate(self, examples, tokens, number)

    monkeypatch.setattr(GradientAccumulation, "accumulate", faulty)


def interrupted() -> None:
    raise KeyboardInterrupt


def told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("run", "step", "act", "error"),
    [
        (0, 1, interrupted, KeyboardInterrupt),
        (0, 0, told_to_stop, cli.StoppedError),
        (0, 2, told_to_stop, cli.StoppedError),  # the stage's last step, after which the run must not begin
        (1, 0, told_to_stop, cli.StoppedError),
        (1, 2, interrupted, KeyboardInterrupt),
    ],
)
def test_stopped_anywhere_the_same_command_resumes_to_the_same_bits(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: int,
    step: int,
    act: Act,
    error: type[BaseException],
) -> None:
    words = arguments(base, tmp_path / "run")
    with monkeypatch.context() as once:
        fail_at(once, run, step, act)
        with pytest.raises(error):
            train.main(words)
    assert (tmp_path / "run/config.yaml").exists() == bool(run)
    train.main(words)
    for part in ("", "stages/align"):
        assert (tmp_path / "run" / part / WEIGHTS).read_bytes() == (finished[0] / part / WEIGHTS).read_bytes()


def test_a_finished_run_says_so_and_does_nothing(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = digest(finished[0])
    monkeypatch.setattr(PaliGemma, "from_pretrained", None)  # nothing is opened
    train.main(arguments(base, finished[0]))
    assert "straight is finished: nothing is left to train; kept step" in " ".join(capsys.readouterr().out.split())
    assert digest(finished[0]) == before


def test_a_finished_stage_is_not_opened_again(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even where its checkpoints were deleted: its result is what the run needs."""
    shutil.copytree(finished[0] / "stages", tmp_path / "run/stages")
    shutil.rmtree(tmp_path / "run/stages/align/checkpoints")
    before = digest(tmp_path / "run/stages")
    opened = counted(monkeypatch)
    train.main(arguments(base, tmp_path / "run"))
    assert len(opened) == 1
    assert "stage align is finished: kept step" in capsys.readouterr().out
    assert digest(tmp_path / "run/stages") == before
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def counted(patch: pytest.MonkeyPatch) -> list[Any]:
    """Every network that is opened; none may be left of those before it."""
    opened: list[weakref.ref[PaliGemma]] = []
    load = PaliGemma.from_pretrained

    def noted(*given: Any, **options: Any) -> PaliGemma:
        assert not any(reference() for reference in opened), "the network of the stage before is still in memory"
        model = load(*given, **options)
        opened.append(weakref.ref(model))
        return model

    patch.setattr(PaliGemma, "from_pretrained", noted)
    return opened


def test_a_stages_network_is_gone_before_the_next_is_opened(
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what it took is given back to the device, for the run's plan counts what is free there."""
    opened, given_back = counted(monkeypatch), []

    def noted(device: torch.device) -> None:
        given_back.append((device.type, [reference() for reference in opened]))

    monkeypatch.setattr("finetune.run.free_memory", noted)
    gc.disable()  # not when Python happens to collect it
    try:
        train.main(arguments(base, tmp_path / "run", "train.max_steps=1", "stages.0.max_steps=1"))
    finally:
        gc.enable()
    assert len(opened) == 2
    assert given_back == [("cpu", [None])]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("stages.0.max_steps=4", r"stages\.0\.max_steps: was 3, is 4"),
        ("stages.0.learning_rate=1e-3", r"stages\.0\.learning_rate: was 0\.003, is 0\.001"),
        ("stages.0.name=other", r"stages\.0\.name: was align, is other"),
        ("stages=[]", r"stages\.0\.name: was align, is \(absent\)"),
        ("connector.learning_rate=1e-2", r"connector\.learning_rate: was 0\.001, is 0\.01"),
    ],
)
def test_a_changed_stage_is_noticed_in_a_run(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
    change: str,
    named: str,
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    before = digest(tmp_path / "run")
    with pytest.raises(ValueError, match=r"leads to another result(?s:.*)--accept-changes(?s:.*)" + named):
        train.main(arguments(base, tmp_path / "run", change))
    assert digest(tmp_path / "run") == before


def test_an_accepted_change_of_a_stage_leaves_a_run_that_has_begun_where_it_is(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its connector has been trained on since; what it begins with is of no use to it any more."""
    shutil.copytree(finished[0], tmp_path / "run")
    before = digest(tmp_path / "run/stages")
    with pytest.raises(ValueError, match="run is finished: a change of its configuration would change nothing in it"):
        train.main(arguments(base, tmp_path / "run", "stages.0.max_steps=4", "--accept-changes"))
    assert "changed since, accepted: stages.0.max_steps: was 3, is 4" in capsys.readouterr().out
    assert digest(tmp_path / "run/stages") == before
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_a_changed_stage_is_noticed_before_the_run_begins(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
) -> None:
    """The same stage with another length: refused, and extended where that is accepted."""
    shutil.copytree(finished[0] / "stages", tmp_path / "run/stages")
    before = digest(tmp_path / "run")
    words = arguments(base, tmp_path / "run", "stages.0.max_steps=4")
    with pytest.raises(ValueError, match=r"stages/align holds checkpoints(?s:.*)train\.max_steps: was 3, is 4"):
        train.main(words)
    assert digest(tmp_path / "run") == before
    train.main([*words, "--accept-changes"])
    lines = (tmp_path / "run/stages/align/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() != (finished[0] / WEIGHTS).read_bytes()


def test_every_stage_is_looked_at_before_one_is_trained(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
) -> None:
    shutil.copytree(finished[0] / "stages/align", tmp_path / "run/stages/second")
    words = arguments(base, tmp_path / "run", "stages=[{name: first, max_steps: 1}, {name: second, max_steps: 9}]")
    with pytest.raises(ValueError, match=r"stages/second holds checkpoints"):
        train.main(words)
    assert not (tmp_path / "run/stages/first").exists()


def test_another_connector_than_the_run_began_with_is_noticed(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    file = tmp_path / "run/stages/align" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    (file.parent / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"another result(?s:.*)stages/align/adapter: the content of the file"):
        train.main(arguments(base, tmp_path / "run"))


def test_a_run_directory_may_be_moved(base: Path, finished: tuple[Path, Seen], tmp_path: Path) -> None:  # noqa: F811
    """And its own config.yaml is the same run, stages and all."""
    shutil.copytree(finished[0], tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere/checkpoints/step-000004")
    train.main([str(tmp_path / "elsewhere/config.yaml"), f"output={tmp_path}/elsewhere"])
    assert (tmp_path / "elsewhere" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_nothing_is_resumed_where_that_is_not_wanted(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
) -> None:
    shutil.copytree(finished[0] / "stages", tmp_path / "run/stages")
    with pytest.raises(ValueError, match=r"stages/align holds checkpoints: to start afresh choose another output"):
        train.main([*arguments(base, tmp_path / "run"), "--resume", "none"])


# Learning rates.


def test_the_connector_has_a_group_of_its_own_in_the_optimizer(base: Path, tmp_path: Path) -> None:  # noqa: F811
    words = arguments(base, tmp_path / "run", "train.learning_rate=5e-4")
    config = load_config(words[0], words[1:])
    for run, rates in zip(runs_of(config), ({3e-3: True}, {5e-4: False, 1e-3: True}), strict=True):
        model = open_model(base, run)
        adapt(model, run, anew=True)
        trained = trained_parameters(model)
        named = {id(parameter): name for name, parameter in trained.items()}
        groups = make_optimizer(trained, run).param_groups
        assert {group["lr"] for group in groups} == set(rates)
        for group in groups:
            assert {named[id(p)].startswith(CONNECTOR) for p in group["params"]} == {rates[group["lr"]]}
        assert sum(len(group["params"]) for group in groups) == len(trained)


def test_the_connectors_rate_moves_the_connector_alone(base: Path, tmp_path: Path) -> None:  # noqa: F811
    """In the first step; after it the gradients are others, too."""
    changes = ["train.max_steps=1", "train.eval_every=null", "stages=[]", "train.schedule=constant", "train.warmup=0"]
    for rate in ("1e-3", "2e-3"):
        train.main(arguments(base, tmp_path / rate, *changes, f"connector.learning_rate={rate}"))
    slow, fast = trained_in(tmp_path / "1e-3"), trained_in(tmp_path / "2e-3")
    differing = {name for name in slow if not torch.equal(slow[name], fast[name])}
    assert differing == {name for name in slow if name.startswith(CONNECTOR)}


def test_both_rates_are_what_they_were_where_a_run_resumes(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uninterrupted = finished[1].rates[3:]
    assert len(uninterrupted) == 4
    assert all(connector == pytest.approx(adapter / 10) for adapter, connector in uninterrupted)  # 1e-2 and 1e-3
    assert len({adapter for adapter, _ in uninterrupted}) > 2  # a cosine
    shutil.copytree(finished[0], tmp_path / "run")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}", ignore_errors=True)
    if not (tmp_path / "run/checkpoints/step-000002").exists():
        with monkeypatch.context() as once:
            shutil.rmtree(tmp_path / "run")
            fail_at(once, 1, 2, interrupted)
            with pytest.raises(KeyboardInterrupt):
                train.main(arguments(base, tmp_path / "run"))
    seen = watched(monkeypatch)
    train.main(arguments(base, tmp_path / "run"))
    assert seen.rates == uninterrupted[2:]


# Looks before a run, and what comes after it.


def test_a_dry_run_plans_every_stage(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    train.main([*arguments(base, tmp_path / "run", "stages.0.epochs=1", "stages.0.max_steps=null"), "--dry-run"])
    align, run = capsys.readouterr().out.split("the run itself, in ")
    assert align.startswith("stage align: the connector alone, in ")
    for shown, steps, adapted in ((align, 8, False), (run, 4, True)):
        assert f"62 examples, {steps} steps" in shown
        assert ("language" in shown) == adapted
        assert "latents" in shown
        assert "optimizer state" in shown
        assert shown.rstrip().endswith("it fits")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="this does not fit"):
        train.main([*arguments(base, tmp_path / "run", "memory.budget_gib=0.1"), "--dry-run"])
    assert "the run itself" not in capsys.readouterr().out


def test_a_dry_run_needs_no_stage_to_be_trained_and_a_wrong_start_is_named(base: Path, tmp_path: Path) -> None:  # noqa: F811
    """What the first stage starts from is there; what it makes is not yet."""
    words = arguments(base, tmp_path / "run", f"connector.start_from={tmp_path}/nowhere", "--dry-run")
    with pytest.raises(ValueError, match=r"nowhere holds no adapter_config\.json: expected an adapter directory"):
        train.main(words)


def test_records_examples_and_a_few_of_them_are_looked_at(
    base: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train.main([*arguments(base, tmp_path / "run"), "--check"])
    assert "data.train: 62 records can be used, 0 cannot" in capsys.readouterr().out
    train.main([*arguments(base, tmp_path / "run"), "--inspect"])
    shown = capsys.readouterr().out
    assert "no answer leaks into what comes before it" in shown
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["inspect.html"]


def test_overfitting_starts_with_the_last_stages_connector_where_that_was_trained(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aligned = trained_in(finished[0] / "stages/align")
    before = digest(finished[0])
    for output, starts_aligned in ((tmp_path / "run", False), (finished[0], True)):
        with monkeypatch.context() as once:
            seen = watched(once)
            train.main([*arguments(base, output), "--overfit", "2"])
        (start,) = seen.starts.values()
        assert all(torch.equal(start[name], tensor) for name, tensor in aligned.items()) == starts_aligned
        shown = capsys.readouterr().out
        assert "it learns: 2 of 2" in shown
        assert ("stage align is not trained" in shown) != starts_aligned
    assert digest(finished[0]) == before


def test_answers_of_the_run_and_of_what_it_was_merged_into_are_the_same(
    base: Path,  # noqa: F811
    finished: tuple[Path, Seen],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Evaluated by its configuration and by its directory, asked, merged: with tiles, padding and a connector."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    merge_lora.main([str(run), "--output", str(run / "merged"), "--dtype", "float32"])
    assert "opens in this toolkit alone" in " ".join(capsys.readouterr().out.split())
    evaluate.main(arguments(base, run))
    results = {arm: json.loads((run / f"eval/{arm}/results.json").read_text()) for arm in ("base", "adapter", "merged")}
    assert results["merged"] == results["adapter"] != results["base"]
    evaluate.main([str(run / "config.yaml"), f"output={run}", "--arm", "adapter"])
    image = str(next((base / "data/images").iterdir()))
    capsys.readouterr()
    asked = [
        "--image",
        image,
        "--prompt",
        "answer en how many circles are there?",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    for weights in (
        ["--adapter", str(run)],
        ["--model", str(run / "merged")],
        ["--adapter", str(run / "stages/align")],
    ):
        predict.main([*weights, *asked])
    of_run, of_merged, of_stage = capsys.readouterr().out.splitlines()
    assert of_run == of_merged != of_stage
    assert find_adapter(run) == run / "adapter"


def test_the_pipeline_trains_stages(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    changes = ["model.connector=mlp", "connector={learning_rate: 1e-3}", "image={aspect: pad}", "lora={rank: 8}"]
    words = arguments(base, tmp_path / "run", *changes, "train.learning_rate=3e-3")
    pipeline.main([*words, "--on-cpu"])
    shown = capsys.readouterr().out
    for line in ("stage align: the connector alone", "it learns: 8 of 8", "the run itself"):
        assert line in shown
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["training"]["steps"] == 4
    assert report["training"]["stages"].keys() == {"align"}
    assert report["configuration"]["stages"][0]["name"] == "align"
    assert set(report["scores"]) == {"base", "adapter"}
    pipeline.main([*words, "--on-cpu"])
    assert capsys.readouterr().out.count("already completed") == 8
