"""Rows with named columns, from whatever file -> records (data/records.py).

    {"image": "scene.jpg", "prefix": "caption en", "suffix": "a red circle"}
    {"image": "scene.jpg", "question": "how many circles are there?", "suffix": 2}

`prefix` is the whole prompt; `question` is put into the prompt of the configuration instead. `suffix` is a text, which
may be empty where the right answer is to say nothing, a whole number, or a list of answers that are equally right. `id`
may name the example, else its place in the file does; an empty one counts as none. `equally_right: false` says that the
answers of `suffix` are what annotators said, as in VQA's files; then `answer`, `answer_type` and `question_type` may
say the most frequent one and of which types they are. `rejected` is an answer that the one of `suffix` is preferred
to; a row without one, or with null, is no preference pair. What else a row has is kept in the column `extra`. Other
names of columns are given as `columns`: {suffix: label}. Where that is allowed (`text_rows`) a row may be text alone:
its image is missing, null or empty. Not here: reading files (one module each, beside this one).
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.invalid import InvalidRecord
from data.processor import single_line
from data.text_rows import own_image_id

ROLES = (
    "image",
    "prefix",
    "question",
    "suffix",
    "rejected",
    "id",
)  # what a column may be, by the name that it has by default
ANNOTATED = ("answer", "answer_type", "question_type")  # of a row whose answers are annotators'
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")  # two letters at least: C:/ is a drive
OR_TEXT = "; or allow rows of text without an image, with text_rows: true"
Choose = Callable[[Sequence[str]], list[int]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a source, which can be read again and again.

    Attributes:
        name: of the file, for messages.
        unit: what a row is in it: a line, a row.
        rows: numbers from 1 with the values of a row by column, or with what is wrong with it.
        files: that the rows depend on.
        folder: of the images, where rows name some by a path.
        about: what the rows depend on beside files, such as the names in a folder.
        columns: of all rows, where that is known beforehand.
    """

    name: str
    unit: str
    rows: Callable[[], Iterator[tuple[int, Any | ValueError]]]
    files: list[Path]
    folder: Path | None = None
    about: str = ""
    columns: Sequence[str] | None = None


def records_of(
    table: Table, columns: Mapping[str, str], prompt: str, choose: Choose | None, text_rows: bool = False
) -> Iterator[dict[str, Any] | InvalidRecord]:
    """Records of the rows at the positions that `choose` takes from all good rows' image ids, in their order, and every
    row that is no example: broken, with an id that occurred before, or with an image that leads out of the folder by
    its path.

    Args:
        columns: a column's role -> its name in the table, where that is another one.
        prompt: with {question} where a question goes.
        choose: None takes all, and reads the rows once instead of twice.
        text_rows: whether a row may have no image; where `columns` names that of the images, the table must have it.

    Raises:
        ValueError: there are no rows; a role is not known.
    """
    names = {role: columns.get(role, role) for role in ROLES}
    if unknown := columns.keys() - set(ROLES):
        raise ValueError(f"columns has {', '.join(sorted(unknown))}; expected {', '.join(ROLES)}")
    may_lack = text_rows and "image" not in columns
    if table.columns is not None and (missing := _missing(table.columns, names, may_lack)):
        raise ValueError(f"{table.name}: {_said_of_missing(missing, table.columns, names, text_rows)}")
    chosen: Container[int] | None = None
    if choose is not None:
        image_ids = [one["image_id"] for one in _examples(table, names, prompt, text_rows) if isinstance(one, dict)]
        chosen = set(choose(image_ids)) if image_ids else set()
    position, found = 0, False
    for one in _examples(table, names, prompt, text_rows):
        found = True
        if isinstance(one, InvalidRecord) or chosen is None or position in chosen:
            yield one
        position += isinstance(one, dict)
    if not found:
        raise ValueError(f"{table.name} holds no examples; expected one a {table.unit}")


def _examples(
    table: Table, names: Mapping[str, str], prompt: str, text_rows: bool
) -> Iterator[dict[str, Any] | InvalidRecord]:
    """Every row as an example, or what is wrong with it."""
    ids = _Ids()
    for number, values in table.rows():
        try:
            if isinstance(values, ValueError):
                raise values
            example = _example(values, names, prompt, number, table.folder, text_rows)
            first = ids.add(example["id"], number)
            if first != number:
                raise ValueError(
                    f"id {example['id']!r} is that of {table.unit} {first} too; give each {table.unit} its own"
                )
        except ValueError as error:
            yield InvalidRecord(f"{table.name}, {table.unit} {number}", str(error))
        else:
            yield example


class _Ids:
    """The ids of the rows so far. Those that are the numbers of their rows take a byte each, not an entry."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._is_own_number = bytearray()

    def add(self, id: str, number: int) -> int:
        """The number of the first row with this id: `number`, where it is the first one."""
        if id in self._rows:
            return self._rows[id]
        if id == str(number):
            self._is_own_number.extend(bytes(max(0, number + 1 - len(self._is_own_number))))
            self._is_own_number[number] = True
            return number
        # The number of an earlier row is given as id: in the digits that str() writes, and no row has twenty of them.
        value = int(id) if id.isdecimal() and len(id) < 20 else 0
        if str(value) == id and value < len(self._is_own_number) and self._is_own_number[value]:
            return value
        self._rows[id] = number
        return number


def _example(
    values: Any, names: Mapping[str, str], prompt: str, number: int, folder: Path | None, text_rows: bool
) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f'expected {{"image": ..., "prefix": ..., "suffix": ...}}, got {shown(values)}')
    asked = _asked(values, names)
    if missing := _missing(values, names, text_rows):
        raise ValueError(_said_of_missing(missing, values, names, text_rows))
    given, text = values[names["suffix"]], values[names[asked]]
    answers = [_text(answer) for answer in (given if isinstance(given, list) else [given])]
    if not answers or not isinstance(text, str) or None in answers:
        raise ValueError(
            f"expected texts or whole numbers, of which prefix and suffix may be empty, got {shown(values)}"
        )
    annotated = values.get("equally_right") is False
    if not annotated and any(answer and not answer.strip() for answer in answers if answer):
        raise ValueError(f'expected a suffix that is a text, or "" for an empty answer, got {shown(values)}')
    if asked == "question" and not text.strip():
        raise ValueError(f"expected a text as question, got {text!r}")
    id = values.get(names["id"])
    id = number if id is None or id == "" else id
    if not isinstance(id, str | int):
        raise ValueError(f"expected a text or a whole number as id, got {id!r}")
    given_image = values.get(names["image"])
    has_none = text_rows and _is_none(given_image)
    if has_none and "<image>" in text:
        raise ValueError(f"its text has <image>, and it has no image: give one, or remove the mark in {text!r:.200}")
    image, image_id = (None, own_image_id(str(id))) if has_none else _image(given_image, folder)
    given_too = _of_annotators(values) if annotated else {}
    extra = {key: value for key, value in values.items() if key not in names.values() and key not in given_too}
    return {
        "id": str(id),
        "image": image,
        "image_id": image_id,
        "question": text,
        "prefix": single_line(text if asked == "prefix" else prompt.replace("{question}", text)),
        "answers": answers,
        "equally_right": True,
        "rejected": _rejected(values, names["rejected"], answers),
        "extra": json.dumps(extra, ensure_ascii=False, default=plain) if extra else "",
        **given_too,
    }


def _rejected(values: Mapping[str, Any], name: str, answers: Sequence[str | None]) -> str:
    """The answer that the one of `answers` is preferred to, "" where the row is no pair.

    Raises:
        ValueError: it is no text, or makes no pair with `answers`.
    """
    if (given := values.get(name)) is None:
        return ""
    rejected, chosen = _text(given), answers[0] or ""
    if rejected is None:
        raise ValueError(f"expected a text or a whole number as {name}, got {given!r:.200}")
    if values.get("equally_right") is False:
        raise ValueError(
            f"its answers are annotators' (equally_right is false), and it has {name}; leave out one of them"
        )
    if len(answers) > 1:
        raise ValueError(
            f"it has {len(answers)} answers beside {name}, and a preference pair has one that is chosen; write a row "
            "for each of them"
        )
    if not chosen.strip() or not rejected.strip():
        raise ValueError(
            f"a preference pair has an empty answer: {chosen!r} is chosen, {rejected!r} is rejected; expected a text "
            f"for each of them, or no {name} where there is no pair"
        )
    if chosen.strip() == rejected.strip():
        raise ValueError(f"the chosen answer and the rejected one are the same, {rejected!r}; expected two that differ")
    return rejected


def _of_annotators(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of annotators' answers. ValueError where it is no text."""
    found = {name: values[name] for name in ANNOTATED if name in values}
    if wrong := [name for name, text in found.items() if not isinstance(text, str)]:
        raise ValueError(f"expected a text as {wrong[0]}, got {found[wrong[0]]!r:.200}")
    return {"equally_right": False} | found


def _asked(columns: Collection[str], names: Mapping[str, str]) -> str:
    """The role that says what is asked."""
    return "prefix" if names["prefix"] in columns else "question"


def _missing(columns: Collection[str], names: Mapping[str, str], text_rows: bool) -> list[str]:
    """The columns that a row needs and has not."""
    needed = (*(() if text_rows else ("image",)), _asked(columns, names), "suffix")
    return [names[role] for role in needed if names[role] not in columns]


def _said_of_missing(
    missing: Sequence[str], columns: Collection[str], names: Mapping[str, str], text_rows: bool
) -> str:
    """What a person should do about columns that a row has not."""
    others = [str(name) for name in columns if name not in names.values()]
    got = ", ".join(others) or "nothing else"
    said = f"it has no {', '.join(missing)}; expected image, prefix (or question) and suffix, got {got}"
    roles = {name: role for role, name in names.items()}
    meant = {roles[name]: difflib.get_close_matches(name, others, 1) for name in missing}
    guesses = ", ".join(f"{role}: {found[0] if found else '...'}" for role, found in meant.items())
    said = f"{said}; name them with columns: {{{guesses}}}" if others else said
    return f"{said}{OR_TEXT}" if missing == [names["image"]] and not text_rows else said


def shown(values: Any) -> str:
    """The begin of what a row holds, for messages."""
    if isinstance(values, dict):
        return repr({key: _image_shown(value) for key, value in values.items()})[:200]
    return repr(values)[:200]


def _image_shown(value: Any) -> Any:
    content = value.get("bytes") if isinstance(value, dict) else value
    return plain(content) if isinstance(content, bytes) else value


def plain(value: object) -> str:
    """What JSON has no word for, as a text: of bytes only how many there are."""
    return f"({len(value):,} bytes)" if isinstance(value, bytes) else str(value)


def _text(answer: Any) -> str | None:
    """An answer as a text; None where it is neither a text nor a whole number."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    return answer if isinstance(answer, str) else None


def _is_none(image: Any) -> bool:
    """Whether a row says that it has no image: null, an empty cell, or what `datasets` has for null."""
    if isinstance(image, dict) and image.get("bytes") is None:
        image = image.get("path")
    return image is None or image == ""


def _image(given: Any, folder: Path | None) -> tuple[str | dict[str, Any], str]:
    """The image as a record holds it, and what is the same for all rows about it.

    given: a path within `folder`, with `/` or `\\` between its parts; bytes; or {"bytes", "path"} as `datasets` has it.
    """
    if isinstance(given, bytes):
        given = {"bytes": given}
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        digest = hashlib.sha256(given["bytes"]).hexdigest()[:32]
        return {"bytes": given["bytes"], "path": None}, digest
    if isinstance(given, dict):
        given = given.get("path")
    if _is_none(given):
        raise ValueError(f"expected a path as image, got {given!r}{OR_TEXT}")
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"expected a path as image, got {given!r:.200}")
    if URL.match(given):
        raise ValueError(f"image {given!r:.200} is an address: nothing is downloaded here; save it and give its path")
    if folder is None:
        raise ValueError(f"image {given!r} is a path, and there is no folder that it could be in; give images")
    path = Path(given) if "\\" not in given or (folder / given).exists() else Path(given.replace("\\", "/"))
    if path.is_absolute():
        if not path.is_relative_to(folder):
            raise ValueError(
                f"image {given!r} is an absolute path; give one relative to {folder}, or allow all with images: /"
            )
        path = path.relative_to(folder)
    if ".." in path.parts or "\0" in given:
        raise ValueError(f"image {given!r} is no plain path; give one within {folder}, without '..'")
    return str(folder / path), path.as_posix()
