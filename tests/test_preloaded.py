"""What tests see of a process that is forked is what they would see of one that was started."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

import pytest

from tests import preloaded


def report(argv: Sequence[str]) -> None:
    """What was there at the start, and how to end."""
    print(argv, os.environ.get("TOLD"), os.getcwd(), threading.active_count(), sys.stdin.read())
    print("and errors", file=sys.stderr)
    if argv[0] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif argv[0] == "raises":
        raise KeyError("a bug")
    elif argv[0] == "exits":
        sys.exit(75)


def say_what_is_imported(_: Sequence[str]) -> None:
    print(*{"torch", "transformers.trainer", "peft", "finetune.run"} & set(sys.modules), sep="\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("exits", 75), ("raises", 1), ("killed", -signal.SIGKILL)])
def test_a_process_ends_and_speaks_as_one_that_was_started(how: str, code: int) -> None:
    ran = preloaded.run(report, how, "2", environment=os.environ | {"TOLD": "something"})
    assert ran.returncode == code
    if how != "killed":  # which leaves no time to write
        assert ran.stdout == f"{(how, '2')} something {preloaded.ROOT} 1 \n"
        assert ran.stderr.startswith("and errors\n")
    assert ("KeyError: 'a bug'" in ran.stderr) == (how == "raises")
    assert "TOLD" not in os.environ


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_what_takes_long_is_imported_before_a_process_is_forked() -> None:
    ran = preloaded.run(say_what_is_imported)
    assert set(ran.stdout.split()) == {"torch", "transformers.trainer", "peft", "finetune.run"}
