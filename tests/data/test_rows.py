"""Rows of any table: ids that occur twice, columns that are missing from all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.invalid import InvalidRecord
from data.sources.rows import Table, _Ids, records_of


def table(*ids: Any, columns: list[str] | None = None, numbers: list[int] | None = None) -> Table:
    rows: list[tuple[int, Any]] = [
        (number, {"image": "a.jpg", "prefix": "x", "suffix": "y"} | ({} if id is None else {"id": id}))
        for number, id in zip(numbers or range(1, len(ids) + 1), ids, strict=True)
    ]
    return Table("t", "line", lambda: iter(rows), [], Path("/"), columns=columns)


def read(given: Table) -> list[str]:
    """The ids, and of invalid rows what is said of the id."""
    found = records_of(given, {}, "answer en {question}", None)
    return [one.reason if isinstance(one, InvalidRecord) else one["id"] for one in found]


def clash(id: str, line: int) -> str:
    return f"id {id!r} is that of line {line} too; give each line its own"


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["x", "x", "y", "x"], ["x", clash("x", 1), "y", clash("x", 1)]),
        ([None, None, "1"], ["1", "2", clash("1", 1)]),
        ([None, None, 2], ["1", "2", clash("2", 2)]),
        (["3", None, None, 3], ["3", "2", clash("3", 1), clash("3", 1)]),
        (["9", None, "2"], ["9", "2", clash("2", 2)]),
        ([None, "01", "\uff11", "-1", "1" * 30, "1.0"], ["1", "01", "\uff11", "-1", "1" * 30, "1.0"]),
        (["0", 0], ["0", clash("0", 1)]),
        (["1", 2, None, "3"], ["1", "2", "3", clash("3", 3)]),
        (["", None, ""], ["1", "2", "3"]),  # an empty id is none
        (["x", [1], "2"], ["x", "expected a text or a whole number as id, got [1]", "2"]),
    ],
)
def test_an_id_that_occurred_before_is_named_with_its_row(ids: list[Any], expected: list[str]) -> None:
    assert read(table(*ids)) == expected


def test_rows_need_not_be_numbered_without_gaps() -> None:
    assert read(table(None, None, "3", "4", numbers=[2, 5, 7, 8])) == ["2", "5", "3", "4"]
    assert read(table(None, None, "5", numbers=[2, 5, 7])) == ["2", "5", clash("5", 5)]


def test_the_ids_of_rows_without_one_take_no_memory_to_speak_of() -> None:
    ids = _Ids()
    assert all(ids.add(str(number), number) == number for number in range(1, 10_001))
    assert not ids._rows
    assert len(ids._is_own_number) == 10_001
    assert ids.add("10000", 10_001) == 10_000


def test_a_column_that_no_row_has_is_said_once() -> None:
    with pytest.raises(
        ValueError, match=r"t: it has no suffix; .* got label; name them with columns: \{suffix: \.\.\."
    ):
        read(table("x", "y", columns=["image", "prefix", "label", "id"]))
    assert read(table("x", columns=["image", "prefix", "suffix", "id"])) == ["x"]
