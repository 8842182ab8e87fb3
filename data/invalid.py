"""Invalid records: named with the reason; either they end a run or, up to a share, they are skipped.

Not here: finding them (data/sources, data/image_check.py), and what takes the place of one in training
(data/dataset.py).
"""

import contextlib
import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

NAMED = 3  # invalid records that an error spells out


class InvalidRecord(NamedTuple):
    """A record that cannot be used: its id, or the line it stands in, and the reason in words."""

    id: str
    reason: str


class SkippedRecords:
    """The records that a run skips, each once: in memory, and in a file of JSON lines `{"id", "reason"}`.

    All processes of a run append to the file and count what the others wrote, and before a run was resumed.

    Args:
        file: the list, made when it is needed; None: in this process's memory alone.
        share: of all records that may be skipped, at most; 0: none.
        skippable: the share that data.on_error=skip would allow; None where there is no such key to set.

    Attributes:
        reasons: why each was skipped, by its id.
        looked_at: the records that the calls of `add` were about, together.
        total: the most records that a call was about: of a file with broken lines those are more than its records.
    """

    def __init__(
        self, file: str | PathLike[str] | None = None, share: float = 0.0, skippable: float | None = None
    ) -> None:
        self.file, self.share, self.skippable = None if file is None else Path(file), share, skippable
        self.reasons: dict[str, str] = {}
        self.looked_at = 0
        self.total = 0
        self._read = 0  # bytes of the file that are known

    def add(self, invalid: Iterable[InvalidRecord], total: int) -> None:
        """Skip these of `total` records.

        Raises:
            ValueError: then more were skipped than may be; names the first. None of them is skipped.
        """
        self.looked_at += total
        self.total = max(self.total, total)
        invalid = list(invalid)
        if not (new := self._new(invalid)):
            return
        if self.file is None:
            self.reasons |= new
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{self.file}.lock")
        with FileLock(lock):  # another process may come upon the same records at this moment
            new = self._new(invalid)
            self.reasons |= new
            with self.file.open("ab") as file:
                lines = "".join(json.dumps({"id": id, "reason": reason}) + "\n" for id, reason in new.items())
                file.write(lines.encode())
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                lock.unlink()  # who waits for it notices that it is gone

    def _new(self, invalid: list[InvalidRecord]) -> dict[str, str]:
        """The reasons of those that no process has skipped yet, by their ids.

        Raises:
            ValueError: with them more would be skipped than may be.
        """
        self._catch_up()
        new = {record.id: record.reason for record in invalid if record.id not in self.reasons}
        count = len(self.reasons) + len(new)
        if new and count > self.share * self.total:
            named = [f"{id}: {reason}" for id, reason in list(new.items())[:NAMED]]
            named += [f"and {len(new) - NAMED:,} more"] if len(new) > NAMED else []
            said = f"{count:,} of {self.total:,} records cannot be used; {self.advice(count, self.total)}:"
            raise ValueError("\n  ".join([said, *named]))
        return new

    def advice(self, count: int, total: int) -> str:
        """What there is to do about so many records that cannot be used, of all."""
        if self.skippable is None:
            limit = f"more than the {self.share:.1%} that may be skipped: " if self.share else ""
            return f"{limit}fix them, or take them out of the file"
        if count == total:
            return "none is left, fix them"
        if count > self.skippable * total:
            limit = f"more than the {self.skippable:.1%} that data.skip_at_most lets be skipped"
            skipping = "" if self.share else "set data.on_error=skip and "
            return f"{limit}: fix them, or {skipping}raise data.skip_at_most"
        return "fix them, or skip them with data.on_error=skip"

    def _catch_up(self) -> None:
        if self.file is None or not self.file.exists():
            return
        with self.file.open("rb") as content:
            content.seek(self._read)
            for line in content:
                if not line.endswith(b"\n"):
                    break  # another process is at it
                self._read += len(line)
                try:
                    record = json.loads(line)
                    self.reasons[record["id"]] = record["reason"]
                except (ValueError, KeyError, TypeError):  # cut off when a process was killed
                    continue
