"""Several processes learn, answer and stop as one does; a fault in one of them ends the run and loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from finetune.system import distributed
from finetune.training.checkpoints import newest_whole
from tests import kill_test, preloaded, rounding, several_processes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs forked processes")

FP32 = torch.finfo(torch.float32).eps  # runs are computed in fp64 (tests/several_processes.py), and stored in fp32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that tests/several_processes.py does."""
    directory = tmp_path_factory.mktemp("processes")
    done = preloaded.run(several_processes.main, str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def codes(runs: Path, name: str) -> list[int]:
    found: list[int] = json.loads((runs / "codes.json").read_text())[name]
    return found


def said(runs: Path, name: str, rank: int) -> str:
    return (runs / f"{name}.{rank}.txt").read_text()


def curve(run: Path) -> list[dict[str, float]]:
    """What was logged at each step, but for time and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    aside = ("second", "runtime", "memory")
    return [{name: value for name, value in line.items() if not any(word in name for word in aside)} for line in lines]


def assert_same_adapter(run: Path, other: Path) -> None:
    """But for a last digit, where what is stored in fp32 was about to be rounded the other way."""
    ours, theirs = (load_file(path / "adapter/adapter_model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        exact = rounding.EXACT * theirs[name].abs().max().item()
        torch.testing.assert_close(tensor, theirs[name], rtol=FP32, atol=exact, msg=name)


def test_two_processes_learn_what_one_does(runs: Path) -> None:
    """Loss, gradient norm, rate, validation loss and accuracy of every step, in shards of four and three examples."""
    assert (codes(runs, "one"), codes(runs, "two")) == ([0], [0, 0])
    one, two = curve(runs / "one"), curve(runs / "two")
    assert len([line for line in one if "loss" in line]) == 4
    assert len([line for line in one if "eval_loss" in line]) == 2
    assert [line.keys() for line in two] == [line.keys() for line in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=4 * FP32)  # micro-batches' losses are added up in fp32
    assert_same_adapter(runs / "two", runs / "one")


def test_two_processes_train_a_connector_and_its_stage_as_one_does(runs: Path) -> None:
    """The stage, and from the same stage on the run."""
    assert (codes(runs, "connector, one"), codes(runs, "connector, two")) == ([0], [0, 0])
    stages = [runs / name / "stages/align" for name in ("connector, two", "connector, one")]
    assert [len([line for line in curve(stage) if "loss" in line]) for stage in stages] == [2, 2]
    assert_same_adapter(*stages)
    assert codes(runs, "connector, after") == [0, 0]
    assert "stage align is finished: kept step" in said(runs, "connector, after", 0)
    for ours, theirs in zip(curve(runs / "connector, after"), curve(runs / "connector, one"), strict=True):
        assert ours == pytest.approx(theirs, rel=4 * FP32)
    assert_same_adapter(runs / "connector, after", runs / "connector, one")
    assert said(runs, "connector, two", 1) == ""


def test_two_processes_learn_from_pairs_as_one_does(runs: Path) -> None:
    """Every figure of training and validation pairs, and the reference's log-probabilities that were kept."""
    assert (codes(runs, "pairs, one"), codes(runs, "pairs, two")) == ([0], [0, 0])
    one, two = curve(runs / "pairs, one"), curve(runs / "pairs, two")
    assert [line["step"] for line in one if "margin" in line] == [1, 2]
    assert [line["step"] for line in one if "eval_kl" in line] == [2]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=8 * FP32, abs=FP32)
    assert_same_adapter(runs / "pairs, two", runs / "pairs, one")
    kept = [load_file(runs / name / "reference.safetensors")["log_probs"] for name in ("pairs, two", "pairs, one")]
    torch.testing.assert_close(*kept, rtol=rounding.EXACT, atol=0, equal_nan=True)


def test_one_process_writes_and_prints(runs: Path) -> None:
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (runs / "one", runs / "two")]
    assert names[0] == names[1]
    assert re.search(r"trained: (?s:.*)saved .*adapter; next: ", said(runs, "two", 0))
    assert said(runs, "two", 1) == ""


def test_answers_and_their_accuracy_are_those_of_one_process(runs: Path) -> None:
    assert (codes(runs, "one, evaluated"), codes(runs, "two, evaluated")) == ([0], [0, 0])
    answers = {}
    for arm in ("base", "adapter"):
        one, two = runs / "one/eval" / arm, runs / "two/eval" / arm
        answers[arm] = (one / "results.json").read_text()
        assert (two / "results.json").read_text() == answers[arm]
        ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (two, one))
        assert {**ours, "adapter": None} == {**theirs, "adapter": None}
    assert answers["adapter"] != answers["base"]
    assert len({row["answer"] for row in json.loads(answers["base"])}) > 9
    assert "VQA accuracy, percent" in said(runs, "two, evaluated", 0)
    assert said(runs, "two, evaluated", 1) == ""


def test_a_killed_process_ends_the_run_and_one_process_resumes_it(runs: Path) -> None:
    assert codes(runs, "killed") == [2, -signal.SIGKILL]
    assert "error: another process of the run has ended" in said(runs, "killed", 0)
    assert "Traceback" not in said(runs, "killed", 0)
    assert codes(runs, "killed, resumed") == [0]
    steps = [line["step"] for line in curve(runs / "killed") if "loss" in line]
    assert steps == [1, 2, 3, 4]  # two before, two after
    assert_same_adapter(runs / "killed", runs / "one")


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_three_resume(runs: Path) -> None:
    assert codes(runs, "told") == [75, 75]
    assert "SIGTERM: finishing this step" in said(runs, "told", 1)
    assert "stopped after step 1; to resume: the same command" in said(runs, "told", 0)
    assert "stopped after" not in said(runs, "told", 1)
    assert codes(runs, "told, resumed") == [0, 0, 0]
    assert [line["step"] for line in curve(runs / "told") if "loss" in line] == [1, 2, 3, 4]
    assert_same_adapter(runs / "told", runs / "one")


def test_a_full_disk_ends_all_processes_and_nobody_waits(runs: Path) -> None:
    assert codes(runs, "full disk") == [2, 2]
    assert "no checkpoint of step 2 could be written, those before it stand" in said(runs, "full disk", 0)
    assert "the first process of the run failed, and says why" in said(runs, "full disk", 1)
    newest, skipped = newest_whole(runs / "full disk/checkpoints")
    assert newest is not None
    assert (newest.name, skipped) == ("step-000001", [])


def test_a_value_that_is_not_finite_is_found_in_the_process_that_has_it(runs: Path) -> None:
    assert codes(runs, "not finite") == [4, 4]
    told = said(runs, "not finite", 0)
    broken = said(runs, "not finite", 1).split("broken: ")[1].split()[0]
    assert re.search(r"error: step 2: .* norm inf; first in the gradient of ", told)
    assert broken in told.split("of the examples ")[1].split(";")[0].split(", ")
    assert "error: step 2" not in said(runs, "not finite", 1)
    newest, _ = newest_whole(runs / "not finite/checkpoints")
    assert newest is not None
    assert newest.name == "step-000001"


def test_out_of_memory_in_one_process_is_its_own_affair(runs: Path) -> None:
    assert codes(runs, "little memory") == [0, 0]
    assert "micro-batches of 1 instead of 3" in said(runs, "little memory", 1)
    assert "out of memory" not in said(runs, "little memory", 0)
    assert_same_adapter(runs / "little memory", runs / "one")


def test_a_worker_that_dies_in_one_process_ends_all(runs: Path) -> None:
    assert codes(runs, "worker killed") == [2, 2]
    assert "error: a worker process that prepares examples has ended" in said(runs, "worker killed", 1)
    assert "error: another process of the run has ended" in said(runs, "worker killed", 0)
    newest, skipped = newest_whole(runs / "worker killed/checkpoints")
    assert newest is not None
    assert (newest.name, skipped) == ("step-000002", [])


def test_a_workers_death_is_not_taken_for_that_of_another_process() -> None:
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"), distributed.others():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(distributed.ElsewhereError, match="another process of the run has ended"), distributed.others():
        raise RuntimeError("Connection closed by peer")


def test_more_processes_than_examples_are_refused(runs: Path) -> None:
    assert codes(runs, "too many") == [2, 2]
    assert "error: train.batch_size=1 for 2 processes" in said(runs, "too many", 0)


def test_what_looks_before_a_run_is_for_one_process(runs: Path) -> None:
    assert codes(runs, "looking") == [2, 2]
    assert "leave out the launcher" in said(runs, "looking", 0)


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ("WORLD_SIZE=2", "WORLD_SIZE=2, but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: left over"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0", "LOCAL_RANK=0, but no MASTER_ADDR, MASTER_PORT: left over"),
        ("RANK=1", "RANK=1, but no WORLD_SIZE, LOCAL_RANK,"),
        ("LOCAL_RANK=0 MASTER_PORT=1", "LOCAL_RANK=0, but no WORLD_SIZE, RANK, MASTER_ADDR: .* unset LOCAL_RANK; in"),
        ("WORLD_SIZE=two", "WORLD_SIZE=two, which are not whole numbers"),
        ("WORLD_SIZE=", "WORLD_SIZE=, which are not whole numbers"),
        ("PMI_SIZE=4", "PMI_SIZE=4, but no WORLD_SIZE,"),
        ("WORLD_SIZE=2 RANK=2 LOCAL_RANK=2 MASTER_ADDR=a MASTER_PORT=1", "and has none of this number: left over"),
    ],
)
def test_an_environment_that_a_launcher_left_behind_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: str, wrong: str
) -> None:
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    with pytest.raises(ValueError, match=wrong):
        distributed.init(torch.device("cpu"))


@pytest.mark.parametrize("environment", ["", "WORLD_SIZE=1", "WORLD_SIZE=1 RANK=0 LOCAL_RANK=0", "MASTER_PORT=29500"])
def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch, environment: str) -> None:
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    distributed.init(torch.device("cpu"))
    assert distributed.count() == 1


def test_waiting_for_processes_that_do_not_come_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in ["WORLD_SIZE=2", "RANK=0", "LOCAL_RANK=0", "MASTER_ADDR=localhost", "MASTER_PORT=7"]:
        monkeypatch.setenv(*setting.split("="))
    monkeypatch.setattr(distributed, "PATIENCE", 0.01)
    said, end = "", time.monotonic() + 60
    with distributed.saying_who_is_awaited():
        while not said and time.monotonic() < end:
            time.sleep(0.02)
            said = capsys.readouterr().err
    assert "process 0 of 2, counted from 0, has waited for the others at localhost:7" in said


def as_launched(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The environment that a launcher makes for the first of so many processes."""
    told = {"WORLD_SIZE": count, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def test_one_card_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_launched(monkeypatch, 2)
    with pytest.raises(ValueError, match="cuda:1 is one card for 2 processes"):
        distributed.init(torch.device("cuda:1"))


def as_launched_for_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that accelerate makes of configs/accelerate/fsdp.yaml, for one process."""
    config = str(kill_test.ROOT / "configs/accelerate/fsdp.yaml")
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "train.py"]))
    assert arguments.num_processes == 2
    made = prepare_multi_gpu_env(arguments)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.setenv(name, made[name])


def test_fsdp_is_for_train_py_and_for_fsdp2_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    as_launched(monkeypatch, 2)
    as_launched_for_fsdp(monkeypatch)
    with pytest.raises(ValueError, match=r"asks for FSDP, and only train\.py shards a network: .* --multi_gpu"):
        distributed.init(torch.device("cpu"))
    as_launched_for_fsdp(monkeypatch)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match=r"asks for FSDP 1 with torch .*; expected FSDP 2"):
        distributed.init(torch.device("cpu"), can_shard=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"asks for DEEPSPEED, .* configs/accelerate/fsdp\.yaml"):
        distributed.init(torch.device("cpu"), can_shard=True)


def test_fsdp_of_one_process_is_that_process_and_accelerate_does_not_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer and accelerate would take the wish from the environment."""
    as_launched_for_fsdp(monkeypatch)
    distributed.init(torch.device("cpu"), can_shard=True)
    assert not distributed.asks_for_fsdp()
    assert "ACCELERATE_USE_FSDP" not in os.environ


def launch(argv: Sequence[str]) -> None:
    """`accelerate launch`."""
    sys.argv = ["accelerate launch", *argv]
    accelerate_launch.main()


def test_accelerate_starts_two_processes_on_a_cpu_and_tells_them_which_they_are(tmp_path: Path) -> None:
    """By configs/accelerate/two_processes.yaml: what `distributed.init` asks for, and nothing of FSDP."""
    program = tmp_path / "say.py"
    program.write_text(
        "import json, os, pathlib\n"
        "file = pathlib.Path(__file__).with_name(os.environ['RANK'] + '.json')\n"
        "file.write_text(json.dumps(dict(os.environ)))\n"
    )
    done = preloaded.run(launch, "--config_file", "configs/accelerate/two_processes.yaml", str(program))
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    assert [[process[name] for name in names] for process in told] == [["0", "0", "2"], ["1", "1", "2"]]
    assert len({(process["MASTER_ADDR"], process["MASTER_PORT"]) for process in told}) == 1
    assert not [name for name in told[0] if "FSDP" in name]


def test_told_to_stop_the_launcher_passes_it_on_and_the_run_is_kept(runs: Path, tmp_path: Path) -> None:
    """`accelerate launch` as README shows it, with sharded layers and processes that prepare the examples."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate/fsdp.yaml", "train.py", "configs/quickstart.yaml"]
    changes = [*kill_test.overrides(runs, tmp_path / "run"), "train.max_steps=10000", "train.save_every=10000"]
    changes += ["train.eval_every=null", "train.learning_rate=1e-3", "train.schedule=constant", "train.warmup=0"]
    changes += ["data.workers=1"]
    with kill_test.running([*command, *changes]) as launcher:
        kill_test.wait_for_steps(
            lambda: launcher.poll() is not None and f"ended: {launcher.communicate()[1]}", tmp_path / "run"
        )
        launcher.send_signal(signal.SIGTERM)
        told = launcher.communicate()[1]
    assert launcher.returncode != 0
    newest, skipped = newest_whole(tmp_path / "run/checkpoints")
    assert newest is not None, told
    stopped = int(newest.name.removeprefix("step-"))
    assert f"stopped after step {stopped}; to resume: the same command" in told
    assert skipped == []
