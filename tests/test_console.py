"""`paligemma-lora COMMAND` is the script of that name: the same arguments, help, messages and exit code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune import __main__ as console
from finetune import cli
from finetune.system.device import DTYPES

ROOT = Path(__file__).parent.parent


def run(*words: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_entry_in_pyproject_is_the_console() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, name = scripts[cli.CONSOLE].partition(":")
    assert getattr(importlib.import_module(module), name) is console.main


@pytest.mark.parametrize("command", cli.SCRIPTS)
def test_the_help_of_a_command_is_that_of_its_script(command: str, tmp_path: Path) -> None:
    """But for the name of the program and where its lines break; from any directory."""
    script = cli.SCRIPTS[command]
    ours, scripts = run("-m", "finetune", command, "--help", directory=tmp_path), run(script, "--help")
    assert ours.returncode == scripts.returncode == 0, ours.stderr
    shown = ours.stdout.replace(f"usage: python -m finetune {command}", f"usage: {script}")
    assert shown.split() == scripts.stdout.split()


@pytest.mark.parametrize("command", [*cli.SCRIPTS, "report", "demo", "config"])
@pytest.mark.parametrize("program", ["-m finetune", "script"])
def test_help_imports_no_torch(command: str, program: str) -> None:
    is_script = program == "script" and command in cli.SCRIPTS
    words = [cli.SCRIPTS[command]] if is_script else ["-m", "finetune", command]
    shown = run("-X", "importtime", *words, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "finetune.cli" in shown.stderr
    assert not [line for line in shown.stderr.splitlines() if line.endswith((" torch", " transformers", " datasets"))]


def test_help_without_a_command_lists_them() -> None:
    for words in ([], ["--help"]):
        shown = run("-m", "finetune", *words)
        assert shown.returncode == 0
        assert all(f"\n  {name} " in shown.stdout for name in console.SUMMARIES)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean train?"),
        ("merge_lora", "did you mean merge?"),
        ("evaluate.py", "did you mean evaluate?"),
        ("x", f"expected {', '.join(console.SUMMARIES)}"),
    ],
)
def test_an_unknown_command_is_an_error_with_the_one_that_was_meant(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown command '{name}'; {hint}".replace("?", r"\?")):
        console.dispatch([name])


@pytest.mark.parametrize("code", [0, 2, 4, 75])
def test_exit_codes_pass_through(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {2: ValueError("a mistake"), 4: FloatingPointError("not finite"), 75: cli.StoppedError("stopped")}
    given: list[Sequence[str]] = []

    def main(argv: Sequence[str]) -> None:
        given.append(argv)
        if code:
            raise errors[code]

    monkeypatch.setattr("predict.main", main)
    monkeypatch.setattr(sys, "argv", ["paligemma-lora", "predict", "--seed", "1"])
    if code:
        with pytest.raises(SystemExit) as ended:
            console.main()
        assert ended.value.code == code
    else:
        console.main()
    assert given == [["--seed", "1"]]


def test_a_mistake_is_one_message_and_exit_code_2() -> None:
    ran = run("-m", "finetune", "merge", "/nowhere", "--output", "/nowhere/merged")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr


def test_a_command_is_shown_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/python")
    for called, shown in (
        ("train.py", "/python train.py 'a b.yaml'"),
        ("/usr/bin/paligemma-lora", "paligemma-lora train 'a b.yaml'"),
        (str(ROOT / "finetune/__main__.py"), "/python -m finetune train 'a b.yaml'"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert cli.command("train.py", "a b.yaml") == shown


def test_the_names_of_dtypes_are_those_that_there_are() -> None:
    assert list(cli.DTYPES) == list(DTYPES)


def test_what_the_package_offers_is_there() -> None:
    import finetune

    assert all(getattr(finetune, name).__name__ == name for name in finetune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'merge_lore'"):
        _ = finetune.merge_lore  # type: ignore[attr-defined]
