"""The longer run of tests/fuzz.py in small, and that it would see a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.system import atomic
from tests.fuzz import OUTCOMES, fuzz


def test_corrupted_files_are_refused_or_load_as_what_they_say(tmp_path: Path) -> None:
    counts, violations = fuzz(tmp_path, files=300, seed=0)
    assert violations == []
    assert counts.total() == 300
    assert {outcome for _, _, outcome in counts} == set(OUTCOMES) - {"violation"}


def test_a_manifest_that_nobody_looks_at_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "damage", lambda directory: None)
    _, violations = fuzz(tmp_path, files=150, seed=0)
    assert any("the manifest does not list it like this" in violation for violation in violations)
