"""Members of a zip archive on a server, without the rest of it: its directory first, then the ranges asked for.

`zipfile` reads the archive, 64-bit form and CRC-32 included; here is the file on the server that it reads from, and how
a member becomes a file on the disk, whole or not at all. Killed at any moment, the same call goes on: NAME.part holds
the bytes so far as the archive has them, NAME.new is being unpacked, and NAME has the right size and CRC-32.
"""

from __future__ import annotations

import io
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

CHUNK = 1 << 16  # bytes
TAIL = 1 << 10  # bytes; where an archive says where its directory begins, in the 64-bit form too
ATTEMPTS = 5  # in a row without a new byte, and for a member that differs from its CRC-32
DELAY = 1.0  # seconds before the second attempt, then doubled
TIMEOUT = 20.0  # seconds without a byte; as long as Ctrl-C may take


class RemoteFile:
    """A file on a server as `zipfile` reads one: from the window that was put before it, else by HTTP ranges.

    Raises:
        ValueError: the server has no such file, ignores Range, changes the file, or stays out of reach.
    """

    def __init__(self, url: str) -> None:
        self.url, self.size, self.stopped = url, -1, threading.Event()
        self._position = 0
        self.show(0, b"".join(self.stream(0, 1)))  # the first answer tells the size
        begin = max(0, self.size - TAIL)
        self.show(begin, b"".join(self.stream(begin, self.size)))

    def show(self, begin: int, content: bytes) -> None:
        """Put a window before `read`: these bytes of the file, which begin there."""
        self._begin, self._window = begin, content

    def read(self, size: int = -1) -> bytes:
        begin = self._position
        end = min(self.size, begin + size) if size >= 0 else self.size
        self._position = max(begin, end)
        if self._begin <= begin and end <= self._begin + len(self._window):
            return self._window[begin - self._begin : end - self._begin]
        return b"".join(self.stream(begin, end))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset
        if target < 0:
            raise OSError(f"{self.url} has no byte {target}")  # what zipfile expects of a file that is too short
        self._position = target
        return target

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def stream(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from begin to end, piece by piece; a connection that breaks is taken up where it broke."""
        failures = 0
        while begin < end:
            problem: Exception = ConnectionError("the connection was closed before the end")
            try:
                with self._ask(begin, end) as answer:
                    while not self.stopped.is_set() and (piece := answer.read1(min(CHUNK, end - begin))):
                        begin, failures = begin + len(piece), 0
                        yield piece
            except (OSError, HTTPException) as error:
                problem = error
            if begin < end:
                failures += 1
                if failures == ATTEMPTS:
                    again = "look at the network, then start the same command again: it goes on where it stopped"
                    raise ValueError(f"{self.url} could not be read in {ATTEMPTS} attempts ({problem}); {again}")
                if self.stopped.wait(DELAY * 2 ** (failures - 1)):
                    raise ValueError(f"{self.url}: stopped")

    def _ask(self, begin: int, end: int) -> HTTPResponse:
        request = Request(self.url, headers={"Range": f"bytes={begin}-{end - 1}"})
        try:
            answer: HTTPResponse = urlopen(request, timeout=TIMEOUT)
        except HTTPError as error:
            error.close()
            if error.code >= 500 or error.code in (408, 429):  # may pass: another attempt
                raise
            other = "look where the file is now, and give --annotations-url or --pictures-url"
            raise ValueError(f"{self.url}: the server answers {error.code} {error.reason}; {other}") from error
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or given is None or int(given[1]) != begin:
            answer.close()
            other = "give another address (--annotations-url, --pictures-url), or go round the proxy"
            raise ValueError(f"{self.url}: the server ignores Range and sends the whole file; {other}")
        if self.size not in (-1, int(given[2])):
            answer.close()
            raise ValueError(f"{self.url} has changed while it was read; start the same command again")
        self.size = int(given[2])
        return answer


class Archive:
    """A zip archive on a server: its members by file name, and the byte where each one ends."""

    def __init__(self, url: str) -> None:
        self.file, self.lock = RemoteFile(url), threading.Lock()  # the lock is for reading through `zip`
        try:
            self.zip = zipfile.ZipFile(self.file)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{url} is no zip archive ({error}); give the address of the official one") from error
        self.members = {PurePosixPath(info.filename).name: info for info in self.zip.infolist()}
        begins = sorted(info.header_offset for info in self.zip.infolist())
        self.ends = dict(pairwise([*begins, self.zip.start_dir]))

    def member(self, name: str, directory: Path) -> Member:
        if name not in self.members:
            raise ValueError(f"{self.file.url} does not hold {name}; give the address of the official archive")
        info = self.members[name]
        return Member(self, info, directory / name, info.header_offset, self.ends[info.header_offset])


@dataclass(frozen=True)
class Member:
    """A member of an archive, the bytes there from its header to the next one's, and the file that it becomes."""

    archive: Archive
    info: zipfile.ZipInfo
    target: Path
    begin: int
    end: int

    def is_there(self, verify: bool) -> bool:
        """Whether the file has the right size, and with `verify` the right CRC-32."""
        if not self.target.is_file() or self.target.stat().st_size != self.info.file_size:
            return False
        crc = 0
        with self.target.open("rb") as file:
            while verify and (piece := file.read(CHUNK)):
                crc = zlib.crc32(piece, crc)
        return not verify or crc == self.info.CRC

    def fetch(self, advance: Callable[[int], Any]) -> bool:
        """Fetch and unpack; False where size or CRC-32 are wrong each time. `advance` hears of bytes, lost ones too."""
        part = self.target.with_name(f"{self.target.name}.part")
        for _ in range(ATTEMPTS):
            with part.open("ab") as file:
                advance(file.tell())
                for piece in self.archive.file.stream(self.begin + file.tell(), self.end):
                    file.write(piece)
                    file.flush()  # what is received stays, whatever happens to the process
                    advance(len(piece))
            good = self._unpack(part.read_bytes())
            if not good:
                advance(-part.stat().st_size)
            part.unlink()
            if good:
                return True
        return False

    def _unpack(self, content: bytes) -> bool:
        new = self.target.with_name(f"{self.target.name}.new")
        try:
            with self.archive.lock:
                self.archive.file.show(self.begin, content)
                with self.archive.zip.open(self.info) as source, new.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)  # compares the CRC-32 at its end
            if new.stat().st_size != self.info.file_size:
                raise EOFError
        except (zipfile.BadZipFile, zlib.error, EOFError):
            new.unlink(missing_ok=True)
            return False
        new.replace(self.target)
        return True
