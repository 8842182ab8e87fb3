"""Texts that are not ours in Markdown, where nothing in them means anything but itself."""

from __future__ import annotations

import re
from typing import Any

from finetune.system.terminal import one_line


def plain(text: Any) -> str:
    """A text that Markdown takes for itself, on one line."""
    return re.sub(r"([\\`*_\[\]<>&|#~$])", r"\\\1", one_line(str(text)))


def code(text: str) -> str:
    """A code span, which nothing in the text ends."""
    text = one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def code_word(text: str) -> str:
    """An argument of a command line, in double quotes that hold whatever it is, for sh."""
    return '"' + re.sub(r'([\\"$`])', r"\\\1", one_line(text)) + '"'


def fenced(language: str, text: str) -> str:
    """A block of code, which nothing in the text ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
