"""What the tests here share."""

from pathlib import Path

import pytest

from tests.config.minimal import MINIMAL


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path
