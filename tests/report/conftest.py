"""Reports are what is tested here: with their charts."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _charts() -> None:
    """They are drawn, as they are not where runs are tested."""
