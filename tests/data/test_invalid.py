"""What a run skips is counted over all its processes, and listed with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Self

import pytest
from filelock import FileLock

from data.invalid import InvalidRecord, SkippedRecords

INVALID = [InvalidRecord(f"q{k}", f"reason {k}") for k in range(5)]


def listed(file: Path) -> list[str]:
    return [json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_by_default_none_may_be_skipped_and_the_first_ones_are_named() -> None:
    SkippedRecords().add([], 100)
    with pytest.raises(
        ValueError, match=r"^1 of 100 records .*; fix them, or take them out of the file:\n  q0: reason 0$"
    ):
        SkippedRecords().add(INVALID[:1], 100)
    with pytest.raises(ValueError, match=r"(?s)5 of 100 .*q0: reason 0\n  q1: .*\n  q2: reason 2\n  and 2 more$"):
        SkippedRecords().add(INVALID, 100)


def test_up_to_a_share_they_are_skipped_and_listed_once(tmp_path: Path) -> None:
    skipped = SkippedRecords(tmp_path / "run" / "skipped.jsonl", share=0.03)
    skipped.add(INVALID[:2], 100)
    skipped.add([INVALID[1], INVALID[2], INVALID[2]], 100)
    assert listed(tmp_path / "run" / "skipped.jsonl") == ["q0", "q1", "q2"]
    with pytest.raises(ValueError, match=r"4 of 100 .* more than the 3\.0% that may be skipped"):
        skipped.add(INVALID[2:4], 100)
    assert listed(tmp_path / "run" / "skipped.jsonl") == list(skipped.reasons) == ["q0", "q1", "q2"]
    assert skipped.reasons["q2"] == "reason 2"


def test_processes_count_together(tmp_path: Path) -> None:
    """Through the file, that of a run taken up again too; a line cut short by a kill is no record."""
    file = tmp_path / "skipped.jsonl"
    file.write_bytes(b'{"id": "q0", "reason": "before"}\n{"id": "q9", "rea\n')
    here, there = SkippedRecords(file, share=0.03), SkippedRecords(file, share=0.03)
    here.add(INVALID[:2], 100)
    there.add(INVALID[2:3], 100)
    with pytest.raises(ValueError, match="4 of 100"):
        here.add(INVALID[3:4], 100)
    assert here.reasons == there.reasons == {"q0": "before", "q1": "reason 1", "q2": "reason 2"}


def test_processes_that_come_upon_a_record_at_once_list_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process wrote between a first look at the list and the lock on it counts."""
    file = tmp_path / "skipped.jsonl"

    class OtherCameFirst(FileLock):
        def __enter__(self) -> Self:
            monkeypatch.setattr("data.invalid.FileLock", FileLock)
            SkippedRecords(file, share=0.03).add(INVALID[:2], 100)
            return super().__enter__()

    monkeypatch.setattr("data.invalid.FileLock", OtherCameFirst)
    here = SkippedRecords(file, share=0.03)
    here.add(INVALID[1:3], 100)
    assert listed(file) == ["q0", "q1", "q2"]
    assert set(here.reasons) == {"q0", "q1", "q2"}
    assert list(tmp_path.iterdir()) == [file], "the lock is no longer there"


def test_a_line_that_is_still_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "skipped.jsonl"
    file.write_bytes(b'{"id": "q0", "rea')
    skipped = SkippedRecords(file, share=0.5)
    skipped.add([], 100)
    with file.open("ab") as more:
        more.write(b'son": "before"}\n')
    skipped.add([], 100)
    assert skipped.reasons == {"q0": "before"}


@pytest.mark.parametrize(
    ("share", "count", "advice"),
    [
        (0.0, 1, "fix them, or skip them with data.on_error=skip"),
        (
            0.0,
            4,
            "more than the 3.0% that data.skip_at_most lets be skipped: fix them, or set data.on_error=skip and raise "
            "data.skip_at_most",
        ),
        (0.03, 4, "more than the 3.0% that data.skip_at_most lets be skipped: fix them, or raise data.skip_at_most"),
        (0.0, 100, "none is left, fix them"),
    ],
)
def test_the_advice_can_be_followed(share: float, count: int, advice: str) -> None:
    """data.on_error=skip is no help beyond its share, nor where nothing would be left."""
    invalid = [InvalidRecord(f"q{k}", "broken") for k in range(count)]
    with pytest.raises(ValueError, match=re.escape(f"{count} of 100 records cannot be used; {advice}:")):
        SkippedRecords(share=share, skippable=0.03).add(invalid, 100)


def test_records_with_broken_lines_are_counted_among_all_to_the_end() -> None:
    """A line that is no record is not among the records whose images are looked at later."""
    skipped = SkippedRecords(share=0.5)
    skipped.add([InvalidRecord("line 1", "broken")], 4)
    skipped.add([InvalidRecord("2", "truncated")], 3)
    assert list(skipped.reasons) == ["line 1", "2"]
    with pytest.raises(ValueError, match=r"3 of 4 records cannot be used"):
        skipped.add([InvalidRecord("3", "truncated")], 3)
