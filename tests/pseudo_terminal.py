"""A command run as a person runs it: with a terminal of some width as its stdin, stdout and stderr."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of colours and of moving about


def run_in_terminal(command: Sequence[str], columns: int) -> tuple[int, list[str]]:
    """The exit code, and all that was written, by screen lines: a bar drawn again and again is a line each time."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment | {"TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            new = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not new:
            break
        written += new
    os.close(ours)
    lines = re.split(r"[\r\n]+", CODES.sub("", written.decode()))
    return process.wait(), [line.rstrip() for line in lines if line.strip()]
