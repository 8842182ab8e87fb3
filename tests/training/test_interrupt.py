"""A run that is killed, or told to stop, resumes, and its result is that of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from data.synthetic import scenes
from tests import kill_test, preloaded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


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
    command = [sys.executable, "train.py", "configs/quickstart.yaml"]
    overrides = [*kill_test.overrides(tmp_path, tmp_path / "run"), "train.save_every=10000", "train.max_steps=10000"]
    with kill_test.running([*command, *overrides]) as process:
        kill_test.wait_for_steps(process, tmp_path / "run")
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == 75
    assert f"{signal.Signals(number).name}: finishing this step" in said
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1
    assert f"stopped after step {int(saved[0][5:])}; to resume: " in said
    assert "train.py configs/quickstart.yaml 'model=" in said
