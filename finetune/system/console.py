"""Lines and tables by rich, of texts that are not ours.

Nothing is parsed (markup, highlighting and emoji codes are off), control characters are shown as escapes
(finetune/system/terminal.py), and what is too long is wrapped, not cut.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from tqdm import tqdm

from finetune.system import distributed
from finetune.system.terminal import visible


class PlainConsole(Console):
    """rich's Console for texts that are not ours: nothing in a string means anything but itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)  # strings come by here, those in tables too


def show(*objects: str | Table) -> None:
    """Print lines, which the terminal wraps, and tables; of several processes the first one does."""
    if not distributed.is_main():
        return
    console = PlainConsole()
    with tqdm.external_write_mode():  # above any progress bar
        for item in objects:
            console.print(item, soft_wrap=isinstance(item, str))


def new_table(*headers: str, title: str | None = None) -> Table:
    """A table to fill and `show`; long words in a cell are wrapped, not cut."""
    return Table(*(Column(header, overflow="fold") for header in headers), title=title)
