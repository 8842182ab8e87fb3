"""Progress bars, on stderr: nothing is shown where that is not a terminal, or of what is done within a second."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    doing: str, unit: str, items: Iterable[Any] | None = None, total: int | None = None, **options: Any
) -> tqdm[Any]:
    """A bar as wide as the terminal, gone once all is done: to iterate over `items`, or to `update` by hand.

    options: of tqdm.
    """
    settings = {"leave": False, "delay": 1, "dynamic_ncols": True, "disable": None, **options}  # None: no terminal
    return tqdm(items, desc=doing, unit=unit, total=total, **settings)
