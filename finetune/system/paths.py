"""Paths as a person writes them: `~`, `~name`, `$NAME` and `${NAME}` stand for what they do in a shell.

`$$` is a dollar sign. Relative paths stay relative: to the directory that a script is started in.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path

VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([^{}]*)\})")


def expand(text: str) -> str:
    """The path that a text stands for.

    Raises:
        ValueError: a variable that is not set, or a person without a home directory; names it.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if name is None:
            return "$"
        if name not in os.environ:
            raise ValueError(f"{text!r} names the environment variable {name!r}, which is not set; set it, or write $$")
        return os.environ[name]

    path = os.path.expanduser(VARIABLE.sub(value, text))
    if path.startswith("~"):
        owner = path.split("/")[0]
        raise ValueError(f"{text!r} begins with {owner}, and no such home directory is known; write ./{owner}")
    if text and not path:
        raise ValueError(f"{text!r} stands for an empty path: its variables are set to nothing")
    return path


def did_you_mean(path: str | Path) -> str:
    """`; did you mean X?` where something of nearly that name is there, else nothing: for messages."""
    wanted = Path(path)
    for above in (wanted, *wanted.parents):
        if above.parent.is_dir() and not above.exists():
            close = difflib.get_close_matches(above.name, os.listdir(above.parent), 1)
            return f"; did you mean {above.with_name(close[0])}?" if close else ""
    return ""


def written(path: str) -> str:
    """The text that `expand` takes for this path, whatever is in the environment."""
    return path.replace("$", "$$")


def argument(text: str) -> str:
    """An argument that is a path, for `argparse`; or a name on the Hub, in which nothing is to expand."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_argument(text: str) -> Path:
    return Path(argument(text))
