"""JSON lines, one object with named columns a line (rows.py says which): a person's own examples."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.sources.kinds import require_kind
from data.sources.rows import Table


def json_lines(file: Path, folder: Path | None) -> Table:
    """The lines of a file. folder: of their images, by default its own. ValueError if it is of another kind."""
    require_kind(file, "jsonl", "JSON lines: one object a line, in UTF-8")
    return lines_of(file, folder)


def lines_of(file: Path, folder: Path | None) -> Table:
    """The lines of a file, whatever values they hold."""

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        with file.open("rb") as content:
            for number, line in enumerate(content, start=1):
                if line.strip():
                    yield number, parsed(line)

    return Table(str(file), "line", rows, [file], folder or file.parent.absolute())


def parsed(line: bytes) -> Any | ValueError:
    """The value of a line, or what is wrong with it."""
    try:
        return json.loads(line)
    except RecursionError:
        return ValueError("not valid JSON: it is nested too deeply")
    except UnicodeDecodeError as error:
        return ValueError(f"not valid UTF-8: {error.reason} at byte {error.start + 1}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return ValueError(f"not valid JSON: {error.msg} at character {error.pos + 1}; expected one object a line")
    except ValueError as error:  # a number of too many digits
        return ValueError(f"not valid JSON: {error}")
