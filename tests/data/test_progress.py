"""Progress bars are for a person who looks on: at a terminal, and where something takes its time."""

from __future__ import annotations

import io

import pytest

from data.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_shown_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), "counting", delay=0, mininterval=0)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_a_bar_says_what_is_done_and_is_gone_in_the_end() -> None:
    terminal = Terminal()
    assert list(progress_bar(range(3), "counting", delay=0, mininterval=0, file=terminal)) == [0, 1, 2]
    drawn = terminal.getvalue().split("\r")
    assert any("counting" in line and "2/3" in line for line in drawn)
    assert not drawn[-1].strip()


def test_what_is_done_within_a_second_leaves_no_trace() -> None:
    terminal = Terminal()
    assert list(progress_bar(range(3), "counting", mininterval=0, file=terminal)) == [0, 1, 2]
    assert "counting" not in terminal.getvalue()
