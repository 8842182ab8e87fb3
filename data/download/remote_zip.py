"""Download members of a zip archive on a server by HTTP range requests, without the rest of the archive.

`zipfile` reads the archive, including ZIP64 and CRC-32. Here are the remote file that `zipfile` reads from, and the
atomic write of a member to the disk. An interrupted download resumes: NAME.part holds the compressed bytes received so
far, NAME.new is being unpacked, and NAME exists only with the right size and CRC-32.
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
from http.client import HTTPException, HTTPResponse, responses
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

CHUNK = 1 << 16  # bytes
TAIL = 1 << 10  # bytes at the end of an archive that say where its directory begins, with ZIP64, too
ATTEMPTS = 5  # in a row without a new byte; also for a member that differs from its CRC-32
DELAY = 1.0  # seconds before the second attempt, then doubled
TIMEOUT = 20.0  # seconds without a byte; Ctrl-C may take as long


class RemoteFile:
    """A read-only file on a server, for `zipfile`. Reads come from a buffered range if it has them, else from HTTP.

    Raises:
        ValueError: the server has no such file, ignores Range, changes the file, or cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url, self.size, self.stopped = url, -1, threading.Event()
        self._position = 0
        self.buffer(0, b"".join(self.stream(0, 1)))  # the first response has the size
        begin = max(0, self.size - TAIL)
        self.buffer(begin, b"".join(self.stream(begin, self.size)))

    def buffer(self, begin: int, content: bytes) -> None:
        """Keep these bytes of the file, which start at `begin`, for `read`; replaces those kept before."""
        self._begin, self._buffered = begin, content

    def read(self, size: int = -1) -> bytes:
        begin = self._position
        end = min(self.size, begin + size) if size >= 0 else self.size
        self._position = max(begin, end)
        if self._begin <= begin and end <= self._begin + len(self._buffered):
            return self._buffered[begin - self._begin : end - self._begin]
        return b"".join(self.stream(begin, end))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset
        if target < 0:
            raise OSError(f"{self.url} has no byte {target}")  # zipfile expects this of a file that is too short
        self._position = target
        return target

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def stream(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from begin to end, in chunks. After a connection error the next request starts at the last byte."""
        failures = 0
        while begin < end:
            problem: Exception = ConnectionError("the connection was closed before the end")
            try:
                with self._request(begin, end) as response:
                    while not self.stopped.is_set() and (chunk := response.read1(min(CHUNK, end - begin))):
                        begin, failures = begin + len(chunk), 0
                        yield chunk
            except (OSError, HTTPException) as error:
                problem = error
            if begin < end:
                failures += 1
                if failures == ATTEMPTS:
                    raise ValueError(
                        f"{self.url} could not be read in {ATTEMPTS} attempts ({problem!r}); check the network, then "
                        "run the same command again: it resumes"
                    )
                if self.stopped.wait(DELAY * 2 ** (failures - 1)):
                    raise ValueError(f"{self.url}: stopped")

    def _request(self, begin: int, end: int) -> HTTPResponse:
        request = Request(self.url, headers={"Range": f"bytes={begin}-{end - 1}"})
        try:
            response: HTTPResponse = urlopen(request, timeout=TIMEOUT)
        except HTTPError as error:
            error.close()
            if error.code >= 500 or error.code in (408, 429):  # temporary: try again
                raise
            status = f"{error.code} {responses.get(error.code, '')}".strip()  # not the server's own text
            raise ValueError(
                f"{self.url}: the server answers {status}; find the file's current address, and give it with "
                "--annotations-url or --images-url"
            ) from error
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status != 206 or found is None or int(found[1]) != begin:
            response.close()
            raise ValueError(
                f"{self.url}: the server ignores Range and sends the whole file; give another address "
                "(--annotations-url, --images-url), or use no proxy"
            )
        if self.size not in (-1, int(found[2])):
            response.close()
            raise ValueError(f"{self.url} has changed while it was read; run the same command again")
        self.size = int(found[2])
        return response


class Archive:
    """A zip archive on a server: its members by file name, and the byte at which each ends."""

    def __init__(self, url: str) -> None:
        self.file, self.lock = RemoteFile(url), threading.Lock()  # the lock guards reads through `zip`
        try:
            self.zip = zipfile.ZipFile(self.file)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{url} is not a zip archive ({error}); give the address of the official one") from error
        self.members = {PurePosixPath(info.filename).name: info for info in self.zip.infolist()}
        begins = sorted(info.header_offset for info in self.zip.infolist())
        self.ends = dict(pairwise([*begins, self.zip.start_dir]))

    def member(self, name: str, directory: Path) -> Member:
        if name not in self.members:
            raise ValueError(f"{self.file.url} does not contain {name}; give the address of the official archive")
        info = self.members[name]
        return Member(self, info, directory / name, info.header_offset, self.ends[info.header_offset])


@dataclass(frozen=True)
class Member:
    """A member of an archive, the range of its bytes from its header to the next one's, and the file to write."""

    archive: Archive
    info: zipfile.ZipInfo
    target: Path
    begin: int
    end: int

    def is_complete(self, verify: bool) -> bool:
        """Whether the file exists with the right size, and with `verify` the right CRC-32."""
        if not self.target.is_file() or self.target.stat().st_size != self.info.file_size:
            return False
        crc = 0
        with self.target.open("rb") as file:
            while verify and (chunk := file.read(CHUNK)):
                crc = zlib.crc32(chunk, crc)
        return not verify or crc == self.info.CRC

    def fetch(self, advance: Callable[[int], Any]) -> bool:
        """Download and unpack; False if size or CRC-32 were wrong in every attempt.

        advance: called with the number of bytes received, or with a negative number when they were corrupted.
        """
        part = self.target.with_name(f"{self.target.name}.part")
        for _ in range(ATTEMPTS):
            with part.open("ab") as file:
                advance(file.tell())
                for chunk in self.archive.file.stream(self.begin + file.tell(), self.end):
                    file.write(chunk)
                    file.flush()  # so that received bytes survive if the process is killed
                    advance(len(chunk))
            valid = self._unpack(part.read_bytes())
            if not valid:
                advance(-part.stat().st_size)
            part.unlink()
            if valid:
                return True
        return False

    def _unpack(self, content: bytes) -> bool:
        """Write the file from the member's bytes in the archive; False if they are corrupted."""
        new = self.target.with_name(f"{self.target.name}.new")
        try:
            with self.archive.lock:
                self.archive.file.buffer(self.begin, content)
                with self.archive.zip.open(self.info) as source, new.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)  # checks the CRC-32 at the end
            if new.stat().st_size != self.info.file_size:
                raise EOFError
        except (zipfile.BadZipFile, zlib.error, EOFError):
            new.unlink(missing_ok=True)
            return False
        new.replace(self.target)
        return True
