"""Two processes do not write into one directory, and a process that died does not keep others out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

import evaluate
import merge_lora
import train
from finetune.system import lock
from finetune.system.lock import locked
from tests.kill_test import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from finetune.system.lock import locked
with locked(Path(sys.argv[1]), Path(sys.argv[1]).parent, "training"):
    ready, tell = os.pipe()
    child = os.fork() if sys.argv[2:] else 1  # as workers are forked
    if child == 0:
        os.write(tell, b"x")  # what a fork does in the child is done
    elif child > 1:
        os.read(ready, 1)
    if child:
        print(child, flush=True)
    time.sleep(300)
"""


@contextlib.contextmanager
def holder(lock_file: Path, *forks: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds a lock, and a child of it, if it forks."""
    command = [sys.executable, "-c", HOLD, str(lock_file), *forks]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        if child > 1:
            os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    lock_file = tmp_path / "run/run.lock"
    with holder(lock_file) as (process, _):
        who = rf"run is in use: process {process.pid} on {re.escape(platform.node())} has been training there since 2"
        with pytest.raises(ValueError, match=who), locked(lock_file, tmp_path / "run", "training"):
            raise AssertionError("it was let in")
        assert lock_file.exists()
    with locked(lock_file, tmp_path / "run", "training"):
        assert json.loads((tmp_path / "run/run.lock.json").read_text())["pid"] == os.getpid()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_its_death_releases_it_although_its_workers_live(tmp_path: Path) -> None:
    lock_file = tmp_path / "run.lock"
    with holder(lock_file, "and fork") as (process, child):
        process.kill()
        process.wait()
        with locked(lock_file, tmp_path, "training"):
            os.kill(child, 0)  # it is still there


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "made", "written"):
        with locked(tmp_path / name / "run.lock", tmp_path / name, "training"):
            if name == "written":
                (tmp_path / name / "config.yaml").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.yaml", "there", "written"]


def test_what_cannot_be_locked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="file cannot be written: "),
        locked(tmp_path / "file/l", tmp_path / "file", "x"),
    ):
        raise AssertionError("it was let in")

    def without_locks(self: FileLock) -> None:
        raise OSError(lock.WITHOUT_LOCKS[0], "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", without_locks)
    with locked(tmp_path / "run.lock", tmp_path, "training"):
        assert "is on a file system without locks" in capsys.readouterr().err


def test_a_run_that_is_being_trained_is_not_touched(tmp_path: Path) -> None:
    """Neither read nor written, by another configuration either; and what only looks is not kept out."""
    run = tmp_path / "run"
    run.mkdir()
    source = tmp_path / "train.jsonl"
    source.write_text('{"image": "a.png", "prefix": "caption en", "suffix": "a cat"}\n')
    changes = [f"data={{train: {{jsonl: {source}}}, workers: 0}}", "train={max_steps: 1, batch_size: 1}"]
    changes += ["lora={rank: 2}", f"output={run}", f"model={{path: {ROOT}/assets/tiny-base, device: cpu}}"]
    quickstart = [str(ROOT / "configs/quickstart.yaml"), *changes]
    with locked(run / "run.lock", run, "training"):
        before = sorted(path.name for path in run.iterdir())
        for more in ([], ["lora.rank=3", "--accept-changes"], ["--resume", "none"]):
            with pytest.raises(ValueError, match="run is in use: process"):
                train.main([*quickstart, *more])
        assert sorted(path.name for path in run.iterdir()) == before
        train.main([*quickstart, "--dry-run"])


def test_evaluating_and_merging_twice_at_once_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    source = tmp_path / "validation.jsonl"
    source.write_text('{"image": "a.png", "prefix": "caption en", "suffix": "a cat"}\n')
    changes = [f"data={{train: {{jsonl: {source}}}, validation: {{jsonl: {source}}}, workers: 0}}", f"output={run}"]
    changes += [f"model={{path: {ROOT}/assets/tiny-base, device: cpu}}", "lora={rank: 2}"]
    with (
        locked(run / "eval/eval.lock", run / "eval", "evaluating"),
        pytest.raises(ValueError, match=r"eval is in use: process .* evaluating there since"),
    ):
        evaluate.main([str(ROOT / "configs/quickstart.yaml"), *changes])
    merge = [str(run / "adapter"), "--base", str(ROOT / "assets/tiny-base"), "--output", str(run / "merged")]
    with (
        locked(run / ".merged.lock", run / "merged", "merging"),
        pytest.raises(ValueError, match=r"merged is in use: process .* merging there since"),
    ):
        merge_lora.main(merge)
    assert not (run / "merged").exists()
