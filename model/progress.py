"""How far something is that takes long: whoever wants that shown passes a `Progress`."""

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, how many) -> the same items, shown as they are taken


def silent(items: Iterable[Any], total: int) -> Iterable[Any]:
    """Nothing is shown."""
    return items
