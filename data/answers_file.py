"""answers.jsonl, as evaluate.py writes it: what a network answered, and how good that is by the metric of its task."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.files import require_file
from data.sources.json_lines import lines_of

FIELDS: dict[str, Callable[[Any], bool]] = {  # what a line must have -> whether a value is one
    "id": lambda value: isinstance(value, str),
    "answer": lambda value: isinstance(value, str),
    "score": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    "finished": lambda value: isinstance(value, bool),
}


@dataclasses.dataclass(frozen=True)
class GivenAnswer:
    """A line of the file.

    Attributes:
        place: file and line, for messages.
        score: in percent.
        finished: it ended by itself, and was not cut off.
        asked, expected: the question and the right answers; None where the line does not say.
    """

    place: str
    text: str
    score: float
    finished: bool
    asked: str | None = None
    expected: list[str] | None = None

    def require_about(self, record: Mapping[str, Any]) -> None:
        """ValueError where it answers another example than the record with its id."""
        about = {"question": (self.asked, record["question"]), "expected": (self.expected, record["answers"])}
        for field, (found, there) in about.items():
            if found is not None and found != there:
                raise ValueError(
                    f"{self.place}: {field} of id {record['id']!r} is {found!r:.200}, and in the source "
                    f"{there!r:.200}; expected answers to the examples of the source, and none with locations of a "
                    "network whose image.aspect is pad"
                )


def read_answers(file: Path) -> dict[str, GivenAnswer]:
    """The answers by id. ValueError where a line is none, or an id occurs twice."""
    require_file(file)
    found: dict[str, GivenAnswer] = {}
    for number, values in lines_of(file, None).rows():
        place = f"{file}, line {number}"
        if isinstance(values, ValueError):
            raise ValueError(f"{place}: {values}")
        given = values if isinstance(values, dict) else {}
        if wrong := [name for name, is_one in FIELDS.items() if not is_one(given.get(name))]:
            raise ValueError(
                f"{place}: expected a line of answers.jsonl as evaluate.py writes it, with {', '.join(FIELDS)}; "
                f"{', '.join(wrong)} cannot be used in {values!r:.200}"
            )
        if given["id"] in found:
            raise ValueError(f"{place}: id {given['id']!r} has an answer in an earlier line; expected one for each id")
        about = given.get("question"), given.get("expected")
        found[given["id"]] = GivenAnswer(place, given["answer"], float(given["score"]), given["finished"], *about)
    return found
