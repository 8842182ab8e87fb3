"""A run that is killed, or told to stop, resumes, and its result is that of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train
from data.synthetic import scenes
from finetune import cli, run
from tests import kill_test, preloaded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def trained(argv: Sequence[str]) -> None:
    """train.py as a program."""
    run.plan_run = kill_test.unplanned  # type: ignore[assignment]
    sys.argv = ["train.py", *argv]
    cli.run(train.main)


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    """The short form of tests/kill_test.py, in a process of its own: this one may have threads."""
    done = preloaded.run(kill_test.main, "--runs", "3", "--seed", str(random.randrange(10**6)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 3" in done.stdout
    assert "finished runs: 0" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_the_step_is_finished_and_the_command_to_go_on_printed(tmp_path: Path, number: int) -> None:
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(tmp_path / "data", scenes=8, seed=seed, split=split)
    overrides = [*kill_test.overrides(tmp_path, tmp_path / "run"), "train.save_every=10000", "train.max_steps=10000"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(preloaded.run, trained, "configs/quickstart.yaml", *overrides)
        kill_test.wait_for_steps(lambda: running.done() and f"ended: {running.result()}", tmp_path / "run")
        os.kill(json.loads((tmp_path / "run/run.lock.json").read_text())["pid"], number)
        done = running.result()
    said = done.stderr
    assert done.returncode == 75
    assert f"{signal.Signals(number).name}: finishing this step" in said
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1
    assert f"stopped after step {int(saved[0][5:])}; to resume: " in said
    assert "train.py configs/quickstart.yaml 'model=" in said
