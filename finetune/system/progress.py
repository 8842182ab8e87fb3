"""Progress bars, on stderr: nothing is shown where that is not a terminal, or of what is done within a second.

Of several processes the first one shows its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from finetune.system import distributed
from model.progress import Progress


def progress_bar(
    doing: str, unit: str, items: Iterable[Any] | None = None, total: int | None = None, **options: Any
) -> tqdm[Any]:
    """A bar as wide as the terminal, gone once all is done: to iterate over `items`, or to `update` by hand.

    options: of tqdm.
    """
    hidden = None if distributed.is_main() else True  # None: hidden where there is no terminal
    settings = {"leave": False, "delay": 1, "dynamic_ncols": True, "disable": hidden, **options}
    return tqdm(items, desc=doing, unit=unit, total=total, **settings)


def progress(doing: str, unit: str = "batch") -> Progress:
    """A bar over what is done next."""
    return lambda items, total: progress_bar(doing, unit, items, total)
