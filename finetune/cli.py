"""What the scripts share: a person's mistake becomes one message and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

MISTAKE, INTERRUPTED = 2, 130


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's `main` with the command line, and exit: 0, 2 on a ValueError, 130 on Ctrl-C."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def progress(batches: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar over batches, on stderr."""
    return tqdm(batches, total=total, desc="answering", unit="batch", leave=False, file=sys.stderr)
