"""What the scripts share: a person's mistake becomes one message and an exit code, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from finetune.adapters.metadata import trained_on
from finetune.system import distributed, terminal
from finetune.system.allocator import use_expandable_segments
from finetune.system.terminal import visible

MISTAKE, NOT_FINITE, STOPPED, INTERRUPTED = 2, 4, 75, 130
NEW_TOKENS_HELP = "longest answer, in tokens (default: that of the longest trained answer, stored with the adapter)"
QUANTIZE_HELP = "keep the base in four bits; auto: as it was while the adapter was trained"


class StoppedError(Exception):
    """A run was told to stop, and what it had done is kept; says how to go on."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's `main` with the command line, and exit: 0; 2 on a mistake or a full disk, 4 on values
    that are not finite, 75 when told to stop (what was done is kept), 130 when stopped at once.

    A launcher of several processes ends them all once one has failed, with an exit code of its own.
    """
    terminal.keep_all_output()
    use_expandable_segments()
    try:
        with terminal.plain_warnings():
            main(sys.argv[1:])
    except (ValueError, OSError, distributed.ElsewhereError) as error:
        tqdm.write(visible(f"error: {error}"), file=sys.stderr)  # on a line of its own, below any bar
        sys.exit(MISTAKE)
    except (FloatingPointError, StoppedError) as error:  # of all processes of a run alike
        mistake = isinstance(error, FloatingPointError)
        if distributed.is_main():
            tqdm.write(visible(f"error: {error}" if mistake else str(error)), file=sys.stderr)
        with contextlib.suppress(distributed.ElsewhereError):  # one was killed meanwhile
            distributed.gather("said")  # before one is gone, and the launcher ends the others
        sys.exit(NOT_FINITE if mistake else STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    distributed.destroy()


def positive(text: str) -> int:
    """An argument that is a whole number from 1, for `argparse`."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number from 1")
    return int(text)


def command(script: str, *words: str) -> str:
    """A command line to show: a script under the interpreter that runs this one, quoted for a shell."""
    python, here = Path(sys.executable), Path.cwd()
    shown = python.relative_to(here) if python.is_relative_to(here) else python
    return shlex.join([str(shown), script, *words])


def quantization(asked: str, adapter: str | Path | None) -> str | None:
    """How to keep the base: as asked, or by default as it was while the adapter was trained."""
    if asked == "auto":
        return trained_on(adapter) if adapter else None
    return None if asked == "none" else asked
