"""What the scripts share: a person's mistake becomes one message and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.adapter import trained_on

MISTAKE, INTERRUPTED = 2, 130
QUANTIZE_HELP = "keep the base in four bits; auto (default): as it was while the adapter was trained"


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


def quantization(asked: str, adapter: str | Path | None) -> str | None:
    """How to keep the base: as asked, or by default as it was while the adapter was trained."""
    if asked == "auto":
        return trained_on(adapter) if adapter else None
    return None if asked == "none" else asked


def progress(batches: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar over batches, on stderr."""
    return tqdm(batches, total=total, desc="answering", unit="batch", leave=False, file=sys.stderr)
