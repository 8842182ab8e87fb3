"""What the documents name exists: a test that has moved or has another name is found here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", ["README.md", "RELIABILITY.md", "CONTRIBUTING.md", "docs/vlm-o.md"])
def test_every_test_that_is_named_exists(document: str) -> None:
    """As `tests/lora/test_linear.py::test_name`; a name may end in `...`."""
    named = re.findall(r"([\w/]*test_\w+\.py)(?:::(test_\w+))?", (ROOT / document).read_text(encoding="utf-8"))
    for file, name in named:
        path = ROOT / file
        assert path.is_file(), f"{document} names {file}"
        assert not name or f"def {name}" in path.read_text(encoding="utf-8"), f"{document} names {file}::{name}"


@pytest.mark.parametrize("document", ["README.md", "RELIABILITY.md", "CONTRIBUTING.md", "docs/vlm-o.md"])
def test_every_source_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])(?:model|data|finetune|benchmarks)/[\w/]+\.py\b", text)
    assert not [file for file in named if not (ROOT / file).is_file()]
