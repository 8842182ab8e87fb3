"""What the documents name exists: a test that has moved or has another name is found here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "RELIABILITY.md", "CONTRIBUTING.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_exists(document: str) -> None:
    """As `tests/lora/test_linear.py::test_name`; a name may end in `...`."""
    named = re.findall(r"([\w/]*test_\w+\.py)(?:::(test_\w+))?", (ROOT / document).read_text(encoding="utf-8"))
    for file, name in named:
        path = ROOT / file
        assert path.is_file(), f"{document} names {file}"
        assert not name or f"def {name}" in path.read_text(encoding="utf-8"), f"{document} names {file}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_source_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])(?:model|data|finetune|benchmarks)/[\w/]+\.py\b", text)
    assert not [file for file in named if not (ROOT / file).is_file()]


def make_commands() -> dict[str, list[str]]:
    """The commands of the Makefile by target, variables in place of their names."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+) :?\??= *(.*)$", text, re.MULTILINE)) | {"RUN_ARGS": "", "PYTHON": "python"}
    commands: dict[str, list[str]] = {}
    for line in text.splitlines():
        if target := re.match(r"([\w./-]+):(?!=)", line):
            commands[target[1]] = current = []
        elif line.startswith("\t"):
            current.append(re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], line).strip())
    return commands


def windows_commands() -> dict[str, list[str]]:
    """The commands of the README's section for Windows by its comments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^### Without make \(Windows\)$.*?^```powershell\n(.*?)^```$", text, re.M | re.S)
    commands: dict[str, list[str]] = {}
    for line in filter(None, block.splitlines()):
        if line.startswith("#"):
            commands[line.removeprefix("# ")] = current = []
        else:
            current.append(line)
    return commands


def test_what_windows_users_run_is_what_make_runs() -> None:
    shown, made = windows_commands(), make_commands()
    environment, *targets = shown.items()
    pairs = [(commands, made[name.removeprefix("make ")]) for name, commands in targets]
    installing = [line for name in (".venv/.installed", ".venv/.installed-dev") for line in made[name]]
    pairs.append((environment[1], [line for line in installing if not line.startswith("touch")]))
    assert {name for name, _ in targets} == {f"make {name}" for name in ("quickstart", "test", "vqav2", "vqav2-data")}
    for windows, unix in pairs:
        called = [re.sub(r"^\.venv/bin/(?!python )(\w+)", r".venv/bin/python -m \1", line) for line in unix]
        assert windows == [line.replace(".venv/bin/", ".venv\\Scripts\\", 1) for line in called]


def test_windows_commands_are_powershells() -> None:
    """No joined commands, no variable before a command, no line that goes on."""
    for line in (line for lines in windows_commands().values() for line in lines):
        assert re.match(r"(python|\.venv\\Scripts\\python) ", line)
        assert not re.search(r"&&|\|\||\\$|`|\$", line)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_linked_exists(document: str) -> None:
    path = ROOT / document
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [file for file in linked if not (path.parent / file).exists()]


def test_messages_that_are_explained_are_those_that_are_shown() -> None:
    """What stands in backticks in the first column of docs/troubleshooting.md, with ... for what differs."""
    sources = [path for folder in ("model", "data", "finetune") for path in (ROOT / folder).rglob("*.py")]
    # Texts of several lines of source as one.
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in sources))
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")]
    quoted = [message for cell in cells for message in re.findall(r"`([^`]* [^`]*)`", cell)]
    assert len(quoted) > 10
    for message in quoted:
        for part in filter(None, (part.strip() for part in message.split("..."))):
            assert part in source, f"no message says {part!r}"
