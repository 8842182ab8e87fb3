"""A run as a person sees it: at a terminal of 80 columns, and in a log file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import train
from finetune import cli
from tests import preloaded
from tests.pseudo_terminal import run_in_terminal
from tests.test_scripts import base_with_scenes, overrides

pytestmark = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo terminals here")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_with_scenes(tmp_path_factory.mktemp("base"))


def test_at_80_columns_a_run_has_one_bar_whose_figures_fit(base: Path, tmp_path: Path) -> None:
    words = [sys.executable, "train.py", "configs/quickstart.yaml", *overrides(base, tmp_path / "run")]
    code, lines = run_in_terminal(words, columns=80)
    assert code == 0, lines
    bars = [line for line in lines if re.search(r"\d+/\d+ ", line)]
    assert max(map(len, bars)) <= 80
    assert bars[-1].startswith("training 4/4 ")
    assert re.search(r"loss [\d.]+, accuracy [\d.]+$", bars[-1])
    # Sentences, which the terminal wraps: what is said, and nothing that a library says.
    said = [line.split()[0] for line in lines if line not in bars]
    assert said == ["warning:", "plan:", "trained:", "16", *["kept"] * said.count("kept"), "saved", "report:"], lines


def trained(_: Sequence[str]) -> None:
    """train.py as a program, which has been imported: what libraries say meanwhile, the terminal above would show."""
    cli.run(train.main)


def test_in_a_log_file_there_are_lines_and_no_bars(base: Path, tmp_path: Path) -> None:
    ran = preloaded.run(trained, "configs/quickstart.yaml", *overrides(base, tmp_path / "run"))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\r" not in ran.stdout
    steps = [line for line in ran.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in steps] == [f"step {step} of 4" for step in (1, 2, 2, 3, 4, 4)]
    assert re.fullmatch(r"step 4 of 4, [\d.]+ minutes: val loss [\d.]+, accuracy [\d.]+", steps[-1])
