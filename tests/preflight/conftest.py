"""Scenes for the tests before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.synthetic.scenes import write as write_scenes


@pytest.fixture(scope="module", autouse=True)
def _plans() -> None:
    """Every network is counted, as it is not where runs are tested."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    write_scenes(directory, scenes=40, seed=1, split="train2014")
    return directory
