"""The whole way from addresses to files that load_records accepts, against a server of its own that can fail in every
way a network does. Both modules: recipes/fetch_vqav2.py and recipes/remote_zip.py.
"""

from __future__ import annotations

import errno
import io
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import pytest

from data.records import load_records
from data.synthetic.scenes import write as write_scenes
from finetune.config.load import load_config
from recipes import fetch_vqav2, remote_zip

ROOT = Path(__file__).parent.parent
SCENES = {"train2014": 240, "val2014": 60}
FRACTION, COUNT, SEED = 0.1, 25, 7
PATIENCE = 600.0  # seconds, for what takes one
SIZES: dict[str, dict[str, Any]] = {"train2014": {"fraction": FRACTION}, "val2014": {"count": COUNT}}
ANNOTATIONS = "/vqa/v2_Annotations_Train_mscoco.zip"
Answer = tuple[int, int, int]  # first byte, last byte asked for, bytes that were sent


class Server(ThreadingHTTPServer):
    """Serves `files` by ranges, notes what it sent, and fails as it is told."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.sent, self.guard = dict(files), dict[str, list[Answer]](), threading.Lock()
        self.ignore_range = False
        self.status: Callable[[str, int], int | None] = lambda path, begin: None  # instead of 206
        self.cut: Callable[[str, int, int], int] = lambda path, begin, length: length  # bytes before it breaks off
        self.change: Callable[[str, int, bytes], bytes] = lambda path, begin, content: content
        self.broken_off = threading.Event()
        self.hang: threading.Event | None = None  # instead of closing a broken-off answer: waits for this

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
            self.send_error(404)
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
        piece = server.change(path, begin, content[begin : last + 1])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        count = server.cut(path, begin, len(piece))
        with server.guard:
            server.sent.setdefault(path, []).append((begin, last, count))
        self.wfile.write(piece[:count])
        if count < len(piece):
            server.broken_off.set()
            if server.hang:
                self.wfile.flush()
                server.hang.wait(PATIENCE)


def zipped(files: dict[str, Path], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, path in files.items():
            archive.write(path, name)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    for seed, (split, scenes) in enumerate(SCENES.items()):
        write_scenes(directory, scenes=scenes, seed=seed, split=split)
    return directory


@pytest.fixture(scope="module")
def archives(source: Path) -> dict[str, bytes]:
    """The six archives as they are published: pictures in a folder, those of training in the 64-bit form."""
    files = {}
    for split, name in fetch_vqav2.SPLITS.items():
        for kind, file in (("Questions", "OpenEnded_mscoco_{}_questions"), ("Annotations", "mscoco_{}_annotations")):
            text = f"v2_{file.format(split)}.json"
            files[f"/vqa/v2_{kind}_{name}_mscoco.zip"] = zipped({text: source / text}, zipfile.ZIP_DEFLATED)
        pictures = sorted((source / "images").glob(f"COCO_{split}_*"))
        random.Random(0).shuffle(pictures)  # neither sorted nor in the order of the questions
        folder = {f"{split}/": source, **{f"{split}/{path.name}": path for path in pictures}}
        with pytest.MonkeyPatch.context() as patch:
            if split == "train2014":  # what zipfile writes beyond 4 GB and 65,535 members
                patch.setattr(zipfile, "ZIP64_LIMIT", 1000)
                patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
            files[f"/zips/{split}.zip"] = zipped(
                folder, zipfile.ZIP_STORED if split == "val2014" else zipfile.ZIP_DEFLATED
            )
    assert b"PK\x06\x06" in files["/zips/train2014.zip"][-200:]
    assert b"PK\x06\x06" not in files["/zips/val2014.zip"][-200:]
    return files


@pytest.fixture
def server(archives: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote_zip, "DELAY", 0.001)
    monkeypatch.setattr(remote_zip, "TIMEOUT", 20.0)
    with Server(archives) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        if server.hang:
            server.hang.set()
        server.shutdown()
        thread.join()


def arguments(server: Server, output: Path, *more: str) -> list[str]:
    choice = ["--fraction", str(FRACTION), "--validation", str(COUNT), "--seed", str(SEED)]
    addresses = ["--annotations-url", f"{server.url}/vqa", "--pictures-url", f"{server.url}/zips"]
    return ["--output", str(output), *choice, *addresses, *more]


def run(server: Server, output: Path, *more: str) -> None:
    fetch_vqav2.main(arguments(server, output, *more))


def chosen(source: Path, split: str) -> set[str]:
    questions = source / f"v2_OpenEnded_mscoco_{split}_questions.json"
    records = load_records(questions=questions, seed=SEED, **SIZES[split])
    return {image["path"] for image in records["image"]}


def expected(source: Path) -> dict[str, bytes]:
    """Every file that a fetch has to leave, by its path within the output."""
    texts = {path.name: path.read_bytes() for path in source.glob("v2_*.json")}
    names = [(split, name) for split in SCENES for name in chosen(source, split)]
    return texts | {f"{split}/{name}": (source / "images" / name).read_bytes() for split, name in names}


def found(output: Path) -> dict[str, bytes]:
    files = (path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def ranges(content: bytes) -> dict[str, tuple[int, int]]:
    """Where the members of an archive begin and end, by file name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    return {Path(info.filename).name: (info.header_offset, end) for info, end in zip(infos, ends, strict=True)}


def asked_members(server: Server, path: str, archive: bytes) -> set[str]:
    """The members of which bytes were sent; the probe of the first byte and the tail of the archive aside."""
    answers = [(begin, begin + count) for begin, last, count in server.sent.get(path, []) if last]
    answers = [(begin, end) for begin, end in answers if begin != len(archive) - remote_zip.TAIL]
    members = ranges(archive).items()
    return {name for name, (begin, end) in members for first, after in answers if first < end and begin < after}


def test_exactly_the_chosen_pictures_are_fetched(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, from the ranges of those alone, and load_records takes them for the same choice."""
    output = tmp_path / "vqav2"
    run(server, output)
    wanted = expected(source)
    assert found(output) == wanted
    for split in SCENES:
        questions = output / f"v2_OpenEnded_mscoco_{split}_questions.json"
        annotations = output / f"v2_mscoco_{split}_annotations.json"
        records = load_records(
            questions=questions, annotations=annotations, images=output / split, seed=SEED, **SIZES[split]
        )
        assert {Path(image["path"]).name for image in records["image"]} == chosen(source, split)
        assert asked_members(server, f"/zips/{split}.zip", archives[f"/zips/{split}.zip"]) == chosen(source, split)
    assert server.total("/zips/train2014.zip") < 0.15 * len(archives["/zips/train2014.zip"])
    pictures, size_in_all = len(wanted) - 4, sum(map(len, wanted.values()))
    line = f"{pictures:,} pictures with their questions and annotations, {size_in_all:,} bytes, are in {output}\n"
    assert capsys.readouterr().out == line


def test_what_is_there_is_not_fetched_again(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path
) -> None:
    run(server, tmp_path)
    server.sent.clear()
    run(server, tmp_path)
    assert not any(asked_members(server, path, archives[path]) for path in archives if path.startswith("/zips"))
    assert server.total(ANNOTATIONS) < 0.2 * len(archives[ANNOTATIONS])
    assert found(tmp_path) == expected(source)


def test_verify_finds_what_has_the_right_size_only(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path
) -> None:
    """A file cut short is fetched again in any case, a changed byte is seen with --verify."""
    run(server, tmp_path)
    short, changed = sorted(chosen(source, "train2014"))[:2]
    for name, content in found(tmp_path / "train2014").items():
        if name == short:
            (tmp_path / "train2014" / name).write_bytes(content[:-1])
        elif name == changed:
            (tmp_path / "train2014" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for more, mended in (((), {short}), (("--verify",), {changed})):
        server.sent.clear()
        run(server, tmp_path, *more)
        assert asked_members(server, "/zips/train2014.zip", archives["/zips/train2014.zip"]) == mended
    assert found(tmp_path) == expected(source)


def test_a_broken_connection_is_taken_up_where_it_broke(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path
) -> None:
    """Every answer of more than 2,000 bytes breaks off in its middle, the next one begins there."""
    server.cut = lambda path, begin, length: length // 2 if length > 2000 else length
    run(server, tmp_path)
    assert found(tmp_path) == expected(source)
    members = ranges(archives["/zips/val2014.zip"])
    for name in chosen(source, "val2014"):
        begin, end = members[name]
        counts = [count for first, _, count in server.sent["/zips/val2014.zip"] if begin <= first < end]
        assert len(counts) > 1
        assert sum(counts) == end - begin


def test_a_server_that_is_busy_is_asked_again(server: Server, source: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def status(path: str, begin: int) -> int | None:
        asked.append((path, begin))
        return {1: 503, 2: 429}.get(asked.count((path, begin)))

    server.status = status
    run(server, tmp_path)
    assert found(tmp_path) == expected(source)


@pytest.mark.parametrize(
    ("path", "how"),
    [(ANNOTATIONS, signal.SIGKILL), ("/zips/train2014.zip", signal.SIGKILL), ("/zips/train2014.zip", signal.SIGINT)],
)
def test_a_killed_process_goes_on(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path, path: str, how: signal.Signals
) -> None:
    """Killed while answers hang in their middle: no file is half there, and what was received is not sent again."""
    wanted = expected(source)
    names = [Path(name).name for name in wanted]
    members = {name: where for name, where in ranges(archives[path]).items() if name in names}
    hung = {begin: name for name, (begin, _) in list(members.items())[::2]}
    others = (3 if path == ANNOTATIONS else len(wanted) - len(hung)) + len(hung)  # no picture before the annotations
    halves = {f"{name}.part": (members[name][1] - begin) // 2 for begin, name in hung.items()}
    server.hang = threading.Event()
    middles = {members[name][1] - (members[name][1] - begin + 1) // 2 for begin, name in hung.items()}

    def half(at: str, begin: int, length: int) -> int:
        if at == path and begin in middles:  # asked for again, by a client that was not patient enough
            return 0
        return length // 2 if at == path and begin in hung and length > 1 else length

    server.cut = half

    def as_far_as_possible() -> bool:
        try:  # all looked at once: what is begun meanwhile must not stand for what is done
            sizes = {file.name: file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()}
        except FileNotFoundError:  # renamed meanwhile
            return False
        parts = {name: size for name, size in sizes.items() if name.endswith((".part", ".new"))}
        return parts == halves and len(sizes) == others

    command = [sys.executable, "-m", "recipes.fetch_vqav2", *arguments(server, tmp_path)]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it from birth
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        assert server.broken_off.wait(PATIENCE)
        wait_until(as_far_as_possible)
        process.send_signal(how)
        server.hang.wait(0.3)
        server.hang.set()
        _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert b"Traceback" not in told
    assert as_far_as_possible()
    kept = {name: content for name, content in found(tmp_path).items() if not name.endswith(".part")}
    assert kept == {name: wanted[name] for name in kept}
    server.sent.clear()
    server.cut = lambda path, begin, length: length
    run(server, tmp_path)
    assert found(tmp_path) == wanted
    again = sorted((begin, last + 1) for begin, last, _ in server.sent[path])
    rest = [(begin + halves[f"{name}.part"], members[name][1]) for begin, name in sorted(hung.items())]
    within = range(1, max(end for _, end in members.values()))
    assert [answer for answer in again if answer[0] in within and answer[1] - 1 in within] == rest


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} seconds"
        time.sleep(0.05)


def test_a_corrupted_member_is_fetched_again(server: Server, source: Path, tmp_path: Path) -> None:
    """Each member comes with a wrong byte the first time, all of its bytes come again, and the second time is right."""
    seen: set[tuple[str, int]] = set()

    def change(path: str, begin: int, content: bytes) -> bytes:
        if len(content) < 1000 or (path, begin) in seen or content[:4] != b"PK\x03\x04":
            return content
        seen.add((path, begin))
        return content[:-20] + bytes([content[-20] ^ 255]) + content[-19:]

    server.change = change
    run(server, tmp_path)
    assert len(seen) == len(expected(source))
    assert found(tmp_path) == expected(source)


@pytest.mark.parametrize("wrong", ["data", "size"])
def test_members_that_stay_corrupted_are_named(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path, wrong: str
) -> None:
    """All others are there, the wrong ones are not, neither whole nor in part."""
    name = sorted(chosen(source, "val2014"))[0]
    archive = bytearray(archives["/zips/val2014.zip"])
    begin, end = ranges(archives["/zips/val2014.zip"])[name]
    if wrong == "data":
        archive[end - 50] ^= 1
    else:  # the size after unpacking, as the directory of the archive gives it
        entry = archive.rindex(b"PK\x01\x02", 0, archive.rindex(name.encode()))
        size = int.from_bytes(archive[entry + 24 : entry + 28], "little") + 1
        archive[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    server.files["/zips/val2014.zip"] = bytes(archive)
    with pytest.raises(
        ValueError, match=rf"^1 of the pictures differ from .* after 5 attempts: {name}; start"
    ) as raised:
        run(server, tmp_path)
    assert "\n" not in str(raised.value)
    wanted = expected(source)
    del wanted[f"val2014/{name}"]
    assert found(tmp_path) == wanted
    answers = [first for first, _, _ in server.sent["/zips/val2014.zip"]]
    assert answers.count(begin) == remote_zip.ATTEMPTS


def test_a_server_without_ranges_is_refused(server: Server, tmp_path: Path) -> None:
    server.ignore_range = True
    with pytest.raises(ValueError, match=r"v2_Questions_Train_mscoco.zip: the server ignores Range .* give another"):
        run(server, tmp_path)


@pytest.mark.parametrize("path", ["/vqa/v2_Annotations_Val_mscoco.zip", "/zips/train2014.zip"])
def test_what_is_not_there_is_named(server: Server, tmp_path: Path, path: str) -> None:
    """At once: asking again would not help."""
    del server.files[path]
    with pytest.raises(ValueError, match=rf"{path}: the server answers 404 Not Found; look where .* --pictures-url"):
        run(server, tmp_path)


def test_no_network_is_said_after_some_attempts(server: Server, tmp_path: Path) -> None:
    nowhere = Server({})
    nowhere.server_close()
    with pytest.raises(ValueError, match=r"could not be read in 5 attempts \(.*refused.*\); look at the network, then"):
        run(server, tmp_path, "--annotations-url", nowhere.url)


def test_what_is_no_archive_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["/zips/train2014.zip"] = b"<html>" * 1000
    with pytest.raises(ValueError, match=r"train2014.zip is no zip archive \(.*\); give the address"):
        run(server, tmp_path)


def test_an_archive_without_a_chosen_picture_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["/zips/train2014.zip"] = server.files["/zips/val2014.zip"]
    with pytest.raises(ValueError, match=r"train2014.zip does not hold COCO_train2014_0.*jpg; give the address"):
        run(server, tmp_path)


def test_an_archive_that_changes_meanwhile_is_refused(
    server: Server, archives: dict[str, bytes], tmp_path: Path
) -> None:
    """And what was waiting is not asked for any more."""
    answers = 0

    def change(path: str, begin: int, content: bytes) -> bytes:
        nonlocal answers
        if path == "/zips/train2014.zip":
            answers += 1
            server.files[path] = archives[path] + bytes(answers > 5)
        return content

    server.change = change
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_vqav2, "CONNECTIONS", 1)
        with pytest.raises(
            ValueError, match=r"train2014.zip has changed while it was read; start the same command again"
        ):
            run(server, tmp_path)
    assert answers < 10


def test_too_small_a_disk_is_found_before_anything_is_written(
    server: Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte less than the pictures need, when the rest is there."""
    run(server, tmp_path)
    shutil.rmtree(tmp_path / "train2014")
    needed = sum(len(content) for name, content in expected(source).items() if name.startswith("train"))
    room = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(ValueError, match=rf"has room for {needed - 1:,} bytes, the pictures .* {needed:,}; make room"):
        run(server, tmp_path)
    assert not (tmp_path / "train2014").exists()
    room = room._replace(free=needed)
    run(server, tmp_path)
    assert found(tmp_path) == expected(source)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half(
    server: Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being unpacked then is not there under its name; all of it is once there is room."""

    def fill_up(source: IO[bytes], target: IO[bytes], length: int) -> None:
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", fill_up)
        with pytest.raises(ValueError, match=r"cannot be written \(.*No space left.*\); make room or give another"):
            run(server, tmp_path)
    assert {Path(name).suffix for name in found(tmp_path)} <= {".part", ".new"}
    run(server, tmp_path)
    assert found(tmp_path) == expected(source)


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/vqav2 cannot be written \(.*\); make room or give another --output"):
        run(server, tmp_path / "file/vqav2")


def test_the_choice_without_arguments_is_that_of_the_configuration() -> None:
    """The files too: configs/vqav2_8gb.yaml runs on what a fetch without arguments leaves."""
    config, given = load_config(ROOT / "configs/vqav2_8gb.yaml"), fetch_vqav2.parse([])
    train, validation = config.data.train, config.data.validation
    assert validation is not None
    assert (train.fraction, train.count, train.sample_by) == (given.fraction, None, given.sample_by)
    assert (validation.fraction, validation.count, validation.sample_by) == (None, given.validation, given.sample_by)
    assert config.train.seed == given.seed
    for split, files in (("train2014", train), ("val2014", validation)):
        assert files.questions == f"{given.output}/v2_OpenEnded_mscoco_{split}_questions.json"
        assert files.annotations == f"{given.output}/v2_mscoco_{split}_annotations.json"
        assert files.images == f"{given.output}/{split}"


def test_a_window_over_the_file_is_read_as_the_file_is(server: Server) -> None:
    """Any read anywhere: inside the window that is held, outside it, and across its edges."""
    content = server.files["/bytes"] = random.Random(0).randbytes(2000)
    file, rng = remote_zip.RemoteFile(f"{server.url}/bytes"), random.Random(1)
    assert (file.size, zlib.crc32(file.read())) == (2000, zlib.crc32(content))
    for _ in range(300):
        begin, length = rng.randrange(80, 200), rng.randrange(-1, 60)
        file.show(100, content[100:180])
        assert file.seek(begin) == begin
        assert file.read(length) == content[begin : begin + length if length >= 0 else None]
        assert file.tell() == (begin + length if length >= 0 else 2000)
    assert file.seek(-7, io.SEEK_END) == 1993
    assert file.seek(-3, io.SEEK_CUR) == 1990
    with pytest.raises(OSError, match="has no byte -1"):
        file.seek(-2001, io.SEEK_END)
