"""What the scripts share: a user's mistake becomes one message and an exit code, never a traceback.

Importing this module loads no torch, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from finetune.system import terminal
from finetune.system.allocator import use_expandable_segments
from finetune.system.terminal import visible

MISTAKE, NOT_FINITE, STOPPED, INTERRUPTED = 2, 4, 75, 130
NEW_TOKENS_HELP = "longest answer, in tokens (default: that of the longest trained answer, stored with the adapter)"
DTYPE_NAMES = ("bfloat16", "float32")  # those of DTYPES in system/device.py, which imports torch
QUANTIZE_HELP = "keep the base in four bits; auto: as it was while the adapter was trained"


class StoppedError(Exception):
    """A run was told to stop, and what it had done is kept; says how to go on."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's `main` with the command line, and exit: 0; 2 after a mistake or on a full disk, 4 after values
    that are not finite, 75 after a request to stop (the state is saved), 130 after an immediate interrupt.

    A launcher of several processes terminates all of them once one has failed, with an exit code of its own.
    """
    terminal.keep_all_output()
    use_expandable_segments()
    try:
        with terminal.plain_warnings():
            main(sys.argv[1:])
    except (ValueError, OSError) as error:
        show_error(f"error: {error}")
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        exit_together(error)
    from finetune.system import distributed

    distributed.destroy()


def exit_together(error: Exception) -> NoReturn:
    """Exit after an error that concerns all processes of a run; any other error is raised."""
    from finetune.system import distributed

    if isinstance(error, distributed.ElsewhereError):
        show_error(f"error: {error}")
        sys.exit(MISTAKE)
    if not isinstance(error, FloatingPointError | StoppedError):
        raise error
    mistake = isinstance(error, FloatingPointError)
    if distributed.is_main():
        show_error(f"error: {error}" if mistake else str(error))
    with contextlib.suppress(distributed.ElsewhereError):  # another process was killed
        distributed.gather("message shown")  # before one exits, and the launcher terminates the others
    sys.exit(NOT_FINITE if mistake else STOPPED)


def show_error(message: str) -> None:
    """Print a message to stderr, on a line of its own, below any progress bar."""
    tqdm.write(visible(message), file=sys.stderr)


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
    """How to quantize the base: as asked, or with "auto" as it was while the adapter was trained."""
    if asked == "auto":
        from finetune.adapters.storage import trained_on

        return trained_on(adapter) if adapter else None
    return None if asked == "none" else asked
