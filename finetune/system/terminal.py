"""A person's texts made safe to print, on any terminal and in any encoding.

What a terminal would execute or hide (escape sequences, other control characters, marks that reverse the direction of
reading) is shown as an escape such as \\x1b, and so is what the encoding of the terminal lacks.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

CHECKOUT = Path(__file__).parents[2]
LONGEST_SHOWN = 320  # characters of a text of which a glance is enough

# Control characters but tab and newline, line and paragraph separators, marks of direction, halves of characters.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with an escape in the place of each character that a terminal would execute or hide.

    >>> visible("a\\x1b[31m [b] \\u202e")
    'a\\\\x1b[31m [b] \\\\u202e'
    """
    return UNSAFE.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same for a field of a line: tabs and newlines are escaped too."""
    return visible(text).replace("\t", "\\t").replace("\n", "\\n")


def shortened(text: str, longest: int = LONGEST_SHOWN) -> str:
    """A text of more characters than `longest` without those in its middle, and how many those are."""
    half, hidden = longest // 2, len(text) - longest
    return text if hidden <= 0 else f"{text[:half]} [{hidden:,} characters not shown] {text[half + hidden :]}"


def json_line(value: Any, stream: TextIO) -> str:
    """The value as JSON on one line: characters that `stream` or a terminal cannot show are JSON's own escapes."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def keep_all_output() -> None:
    """From here on what stdout and stderr cannot encode is written as an escape, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within this, warnings of ours are shown as a sentence, without the line of code that they come from. What
    libraries say that a person can do nothing about is not shown.
    """
    before = warnings.showwarning
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels for this CPU, and goes on without

    def show(message: Warning | str, category: type[Warning], filename: str, *place: Any, **more: Any) -> None:
        if category is UserWarning and Path(filename).is_relative_to(CHECKOUT) and ".venv" not in filename:
            tqdm.write(visible(f"warning: {message}"), file=sys.stderr)  # on a line of its own, below any bar
        else:
            before(message, category, filename, *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
