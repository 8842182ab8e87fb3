"""An HTTP server for range requests on this machine, which can fail as servers and networks do."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TIMEOUT = 600.0  # seconds, for what takes one
Response = tuple[int, int, int]  # first byte, last byte requested, bytes that were sent


class Server(ThreadingHTTPServer):
    """Serves `files` by ranges, records what it sent, and fails as configured."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.sent, self.guard = dict(files), dict[str, list[Response]](), threading.Lock()
        self.ignore_range = False
        self.reason: str | None = None  # of a 404, instead of the standard one
        self.status: Callable[[str, int], int | None] = lambda path, begin: None  # instead of 206
        self.cut: Callable[[str, int, int], int] = lambda path, begin, length: length  # bytes that are sent
        self.change: Callable[[str, int, bytes], bytes] = lambda path, begin, content: content
        self.was_cut = threading.Event()
        self.hang: threading.Event | None = None  # instead of closing a response that was cut: wait for this

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def total(self, path: str) -> int:
        return sum(count for _, _, count in self.sent.get(path, []))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.path
        content = server.files.get(path)
        if content is None:
            self.send_error(404, server.reason)
        elif server.ignore_range:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
        else:
            self.send_range(path, content)

    def send_range(self, path: str, content: bytes) -> None:
        server = self.server
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert asked is not None, self.headers["Range"]
        begin, last = int(asked[1]), int(asked[2])
        assert begin <= last < len(content)
        if status := server.status(path, begin):
            self.send_error(status)
            return
        chunk = server.change(path, begin, content[begin : last + 1])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(chunk)))
        self.end_headers()
        count = server.cut(path, begin, len(chunk))
        with server.guard:
            server.sent.setdefault(path, []).append((begin, last, count))
        self.wfile.write(chunk[:count])
        if count < len(chunk):
            server.was_cut.set()
            if server.hang:
                self.wfile.flush()
                server.hang.wait(TIMEOUT)


def zipped(files: dict[str, Path], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, path in files.items():
            archive.write(path, name)
    return buffer.getvalue()


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """A server of these files, by their paths, that runs within this context."""
    with Server(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        if server.hang:
            server.hang.set()
        server.shutdown()
        thread.join()
