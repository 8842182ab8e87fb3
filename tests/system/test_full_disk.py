"""A disk that is full, for real: a small file system in memory, filled up so far that a run meets its end elsewhere.

The file system is mounted without privileges in a namespace of its own, where the runs are, too: this file, started
there as a program, prints what happened for each room that was left. Skipped where the kernel does not allow it.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from data.synthetic import scenes
from finetune import cli
from finetune.config.load import load_config
from finetune.system.atomic import damage
from finetune.training import checkpoints
from tests import kill_test
from tests.undrawn import undrawn_charts

PAGE = 4096  # bytes: what the file system gives out at once
DISK = 2**26
MOUNT = 'mkdir "$1" && mount -t tmpfs -o size=$2 tmpfs "$1" && shift 2 && exec "$@"'


def in_namespace(disk: Path, *command: str) -> list[str]:
    return ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(disk), str(DISK), *command]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("full")
    try:
        subprocess.run(in_namespace(directory / "tried", "true"), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted without privileges here: {getattr(error, 'stderr', error)}")
    ran = subprocess.run(
        in_namespace(directory / "disk", sys.executable, "-m", "tests.system.test_full_disk", str(directory)),
        cwd=kill_test.ROOT,
        env=os.environ | {"HF_DATASETS_CACHE": str(directory / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    result: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return result


def test_the_disk_fills_at_every_point_of_a_run(runs: list[dict[str, Any]]) -> None:
    """What the other tests say holds for each of these."""
    messages = "\n".join(run["message"] for run in runs)
    assert "disk/run cannot be written: " in messages
    assert "metrics.jsonl: lines are missing from step 1 on: " in messages
    for step in (1, 2, 3):
        assert f"no checkpoint of step {step} could be written" in messages
    assert "the result of step 2 could not be written" in messages
    assert "are free on its disk" in messages  # seen before it was written
    assert "[Errno 28] No space left on device" in messages


def test_a_run_stops_with_a_message_or_goes_on_as_it_was_told(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert run["code_without_room"] == cli.MISTAKE, run
        if run["code"] == 0:
            assert run["policy"] == "go_on" or "no checkpoint" not in run["message"], run
            continue
        assert run["code"] == cli.MISTAKE, run
        assert "and start the same command again" in run["message"], run
        error = next(line for line in run["message"].splitlines() if line.startswith("error: "))
        assert run["policy"] == "stop" or "no checkpoint" not in error, run
    assert any(run["code"] == 0 and "no checkpoint of step" in run["message"] for run in runs)


def test_all_that_is_in_place_is_whole(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert run["broken"] == [], run


def test_with_room_again_the_same_command_ends_with_the_undisturbed_adapter(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert run["code_with_room"] == 0, run
        assert run["same_adapter"], run


def main(directory: Path) -> list[dict[str, Any]]:
    """Run with ever more room on `directory/disk`."""
    torch.set_num_threads(1)  # no threads in this process: it forks
    kill_test.plan_once()
    gc.freeze()  # a collection in a process to come need not go through all that was imported
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(directory / "data", scenes=8, seed=seed, split=split)
    straight = directory / "straight"
    code, message = run(directory, straight, "stop")
    assert code == 0, message
    checkpoint, adapter = (on_disk((straight / name).iterdir()) for name in ("checkpoints/step-000004", "adapter"))
    result = adapter + on_disk([straight / "result.json"])
    begun = on_disk([straight / "config.yaml", straight / "data.json"]) + 2 * PAGE  # and metrics.jsonl, run.lock.json
    rooms = [
        ("stop", 0),
        ("stop", begun + checkpoint // 2),
        ("stop", begun + 3 * checkpoint // 2),
        ("stop", begun + 5 * checkpoint // 2 + result),
        ("go_on", begun - PAGE),
        ("go_on", begun + result // 2),
        ("go_on", begun + result - PAGE),
        ("go_on", begun + checkpoint + 2 * result),
    ]
    return [fill_and_run(directory, straight, policy, room) for policy, room in rooms]


def fill_and_run(directory: Path, straight: Path, policy: str, room: int) -> dict[str, Any]:
    """A run with so many bytes of room, the same one with none at all, and with room enough."""
    output, filler = directory / "disk/run", directory / "disk/filler"
    fill_up(filler, room)
    code, message = run(directory, output, policy)
    broken = list(broken_in(output))
    fill_up(filler, 0)
    code_without_room, _ = run(directory, output, policy)
    broken += broken_in(output)
    filler.unlink()
    code_with_room, _ = run(directory, output, policy)
    same = code_with_room == 0 and kill_test.adapter(output) == kill_test.adapter(straight)
    shutil.rmtree(output)
    return {
        "policy": policy,
        "room": room,
        "code": code,
        "message": message,
        "broken": broken,
        "code_without_room": code_without_room,
        "code_with_room": code_with_room,
        "same_adapter": same,
    }


def fill_up(filler: Path, room: int) -> None:
    """Let a file take all of its disk but so many bytes."""
    with filler.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + shutil.disk_usage(filler.parent).free - room)


def run(directory: Path, output: Path, policy: str) -> tuple[int, str]:
    """Train in a process of its own, from wherever the run stands: its exit code and what it said on stderr."""
    said = directory / "said"
    if child := os.fork():
        return kill_test.wait(child), said.read_text()
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 0
    checkpoints.SLACK = -DISK  # nothing is foreseen: writing meets the end itself
    overrides = [*kill_test.overrides(directory, output), f"train.on_full_disk={policy}"]
    overrides += ["train.max_steps=4", "train.eval_every=2", "train.batch_size=2", "train.micro_batch=2"]
    overrides += ["evaluation.count=1", "evaluation.max_new_tokens=1"]
    sys.argv = ["train.py", str(kill_test.ROOT / "configs/quickstart.yaml"), *overrides]
    try:
        cli.run(train.main)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def on_disk(files: Iterable[Path]) -> int:
    """Bytes of whole pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def broken_in(output: Path) -> Iterable[str]:
    """What should not be there like this, once a run has ended."""
    directories = [output / "adapter", *(output / "checkpoints").glob("*")]
    yield from (f"{path}: {reason}" for path in directories if path.exists() and (reason := damage(path)))
    yield from (f"{path} was left behind" for path in output.rglob(".*"))
    for name, read in (("config.yaml", load_config), ("metrics.jsonl", read_lines)):
        try:
            if (output / name).exists():
                read(output / name)
        except ValueError as error:
            yield f"{name}: {error}"


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    with undrawn_charts():
        print(json.dumps(main(Path(sys.argv[1]))))
