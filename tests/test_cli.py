"""How a script ends: one message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from finetune import cli
from finetune.system.distributed import ElsewhereError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no such file"), cli.MISTAKE, "error: no such file\n"),
        (OSError("disk full"), cli.MISTAKE, "error: disk full\n"),
        (ElsewhereError("another process failed"), cli.MISTAKE, "error: another process failed\n"),
        (FloatingPointError("loss is nan"), cli.NOT_FINITE, "error: loss is nan\n"),
        (cli.StoppedError("stopped after step 3"), cli.STOPPED, "stopped after step 3\n"),
        (KeyboardInterrupt(), cli.INTERRUPTED, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_error_has_its_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(main)


def test_with_debug_a_mistake_has_its_traceback_and_the_script_does_not_see_the_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(argv: Sequence[str]) -> None:
        assert argv == ["a", "b"]
        raise ValueError("no such file")

    monkeypatch.setattr(sys, "argv", ["script.py", "a", "--debug", "b"])
    with pytest.raises(ValueError, match="no such file"):
        cli.run(main)
