"""What the scripts share: a person's mistake becomes one message and an exit code, never a traceback."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.adapter import trained_on

MISTAKE, NOT_FINITE, STOPPED, INTERRUPTED = 2, 4, 75, 130
QUANTIZE_HELP = "keep the base in four bits; auto (default): as it was while the adapter was trained"


class StoppedError(Exception):
    """A run was told to stop, and what it had done is kept; says how to go on."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's `main` with the command line, and exit: 0; 2 on a mistake or a full disk, 4 on values
    that are not finite, 75 when told to stop (what was done is kept), 130 when stopped at once.
    """
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, below any bar
        sys.exit(MISTAKE)
    except FloatingPointError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        sys.exit(NOT_FINITE)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


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


def progress(batches: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar over batches, on stderr."""
    return tqdm(batches, total=total, desc="answering", unit="batch", leave=False, file=sys.stderr)
