"""From addresses to files that load_records accepts, against a local server that can fail as networks do. Tests both
data/download/vqav2.py and data/download/remote_zip.py.
"""

from __future__ import annotations

import errno
import io
import os
import random
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
from pathlib import Path
from typing import IO, Any

import pytest

from data.download import remote_zip, vqav2
from data.records import load_records
from data.synthetic.scenes import write as write_scenes
from finetune.config.load import load_config
from tests.data.range_server import TIMEOUT, Server, serving, zipped

ROOT = Path(__file__).parents[2]
SCENES = {"train2014": 240, "val2014": 60}
FRACTION, COUNT, SEED = 0.1, 25, 7
SIZES: dict[str, dict[str, Any]] = {"train2014": {"fraction": FRACTION}, "val2014": {"count": COUNT}}
ANNOTATIONS = "/vqa/v2_Annotations_Train_mscoco.zip"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    for seed, (split, scenes) in enumerate(SCENES.items()):
        write_scenes(directory, scenes=scenes, seed=seed, split=split)
    return directory


@pytest.fixture(scope="module")
def archives(source: Path) -> dict[str, bytes]:
    """The six archives as they are published: images in a folder, the training images in ZIP64."""
    files = {}
    for split, name in vqav2.SPLITS.items():
        for kind, file in (("Questions", "OpenEnded_mscoco_{}_questions"), ("Annotations", "mscoco_{}_annotations")):
            text = f"v2_{file.format(split)}.json"
            files[f"/vqa/v2_{kind}_{name}_mscoco.zip"] = zipped({text: source / text}, zipfile.ZIP_DEFLATED)
        images = sorted((source / "images").glob(f"COCO_{split}_*"))
        random.Random(0).shuffle(images)  # neither sorted nor in the order of the questions
        folder = {f"{split}/": source, **{f"{split}/{path.name}": path for path in images}}
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
    with serving(archives) as server:
        yield server


def arguments(server: Server, output: Path, *more: str) -> list[str]:
    choice = ["--fraction", str(FRACTION), "--validation", str(COUNT), "--seed", str(SEED)]
    addresses = ["--annotations-url", f"{server.url}/vqa", "--images-url", f"{server.url}/zips"]
    return ["--output", str(output), *choice, *addresses, *more]


def run(server: Server, output: Path, *more: str) -> None:
    vqav2.main(arguments(server, output, *more))


def selected(source: Path, split: str) -> set[str]:
    questions = source / f"v2_OpenEnded_mscoco_{split}_questions.json"
    records = load_records(questions=questions, seed=SEED, **SIZES[split])
    return {image["path"] for image in records["image"]}


def expected(source: Path) -> dict[str, bytes]:
    """Every file that a download must write, by its path within the output."""
    texts = {path.name: path.read_bytes() for path in source.glob("v2_*.json")}
    names = [(split, name) for split in SCENES for name in selected(source, split)]
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


def requested_members(server: Server, path: str, archive: bytes) -> set[str]:
    """The members of which bytes were sent, other than by the requests for the first byte and the archive's end."""
    sent = [(begin, begin + count) for begin, last, count in server.sent.get(path, []) if last]
    sent = [(begin, end) for begin, end in sent if begin != len(archive) - remote_zip.TAIL]
    members = ranges(archive).items()
    return {name for name, (begin, end) in members for first, after in sent if first < end and begin < after}


def test_exactly_the_selected_images_are_downloaded(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, from their ranges only; and load_records opens them for the same selection."""
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
        assert {Path(image["path"]).name for image in records["image"]} == selected(source, split)
        assert requested_members(server, f"/zips/{split}.zip", archives[f"/zips/{split}.zip"]) == selected(
            source, split
        )
    assert server.total("/zips/train2014.zip") < 0.15 * len(archives["/zips/train2014.zip"])
    images, size = len(wanted) - 4, sum(map(len, wanted.values()))
    line = f"{images:,} images with their questions and annotations, {size:,} bytes, are in {output}\n"
    assert capsys.readouterr().out == line


def test_existing_files_are_not_downloaded_again(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path
) -> None:
    run(server, tmp_path)
    server.sent.clear()
    run(server, tmp_path)
    assert not any(requested_members(server, path, archives[path]) for path in archives if path.startswith("/zips"))
    assert server.total(ANNOTATIONS) < 0.2 * len(archives[ANNOTATIONS])
    assert found(tmp_path) == expected(source)


def test_verify_detects_a_changed_file_of_the_right_size(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path
) -> None:
    """A truncated file is always downloaded again, a changed byte is detected with --verify."""
    run(server, tmp_path)
    short, changed = sorted(selected(source, "train2014"))[:2]
    for name, content in found(tmp_path / "train2014").items():
        if name == short:
            (tmp_path / "train2014" / name).write_bytes(content[:-1])
        elif name == changed:
            (tmp_path / "train2014" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for more, fixed in (((), {short}), (("--verify",), {changed})):
        server.sent.clear()
        run(server, tmp_path, *more)
        assert requested_members(server, "/zips/train2014.zip", archives["/zips/train2014.zip"]) == fixed
    assert found(tmp_path) == expected(source)


def test_after_a_connection_error_the_download_resumes(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path
) -> None:
    """Every response of more than 2,000 bytes ends in its middle, and the next request starts there."""
    server.cut = lambda path, begin, length: length // 2 if length > 2000 else length
    run(server, tmp_path)
    assert found(tmp_path) == expected(source)
    members = ranges(archives["/zips/val2014.zip"])
    for name in selected(source, "val2014"):
        begin, end = members[name]
        counts = [count for first, _, count in server.sent["/zips/val2014.zip"] if begin <= first < end]
        assert len(counts) > 1
        assert sum(counts) == end - begin


def test_a_busy_server_is_asked_again(server: Server, source: Path, tmp_path: Path) -> None:
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
def test_an_interrupted_process_resumes(
    server: Server, source: Path, archives: dict[str, bytes], tmp_path: Path, path: str, how: signal.Signals
) -> None:
    """Interrupted in the middle of responses: no file is incomplete, and no received byte is requested again."""
    wanted = expected(source)
    names = [Path(name).name for name in wanted]
    members = {name: where for name, where in ranges(archives[path]).items() if name in names}
    hung = {begin: name for name, (begin, _) in list(members.items())[::2]}
    others = (3 if path == ANNOTATIONS else len(wanted) - len(hung)) + len(hung)  # no image before the annotations
    halves = {f"{name}.part": (members[name][1] - begin) // 2 for begin, name in hung.items()}
    server.hang = threading.Event()
    middles = {members[name][1] - (members[name][1] - begin + 1) // 2 for begin, name in hung.items()}

    def half(at: str, begin: int, length: int) -> int:
        if at == path and begin in middles:  # requested again after the client's timeout
            return 0
        return length // 2 if at == path and begin in hung and length > 1 else length

    server.cut = half

    def all_but_the_rest_is_received() -> bool:
        try:  # before any check: files that appear in between must not count
            sizes = {file.name: file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()}
        except FileNotFoundError:  # renamed in between
            return False
        parts = {name: size for name, size in sizes.items() if name.endswith((".part", ".new"))}
        return parts == halves and len(sizes) == others

    command = [sys.executable, "-m", "data.download.vqav2", *arguments(server, tmp_path)]
    handle = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=handle) as process:
        assert server.was_cut.wait(TIMEOUT)
        wait_until(all_but_the_rest_is_received)
        process.send_signal(how)
        server.hang.wait(0.3)
        server.hang.set()
        _, shown = process.communicate(timeout=TIMEOUT)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert b"Traceback" not in shown
    assert all_but_the_rest_is_received()
    kept = {name: content for name, content in found(tmp_path).items() if not name.endswith(".part")}
    assert kept == {name: wanted[name] for name in kept}
    server.sent.clear()
    server.cut = lambda path, begin, length: length
    run(server, tmp_path)
    assert found(tmp_path) == wanted
    again = sorted((begin, last + 1) for begin, last, _ in server.sent[path])
    rest = [(begin + halves[f"{name}.part"], members[name][1]) for begin, name in sorted(hung.items())]
    within = range(1, max(end for _, end in members.values()))
    assert [one for one in again if one[0] in within and one[1] - 1 in within] == rest


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, f"waited {TIMEOUT:.0f} seconds"
        time.sleep(0.05)


def test_a_corrupted_member_is_downloaded_again(server: Server, source: Path, tmp_path: Path) -> None:
    """Each member has a wrong byte in the first response, and is downloaded again as a whole."""
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
    """All other files exist; the corrupted one does not, nor any of its bytes."""
    name = sorted(selected(source, "val2014"))[0]
    archive = bytearray(archives["/zips/val2014.zip"])
    begin, end = ranges(archives["/zips/val2014.zip"])[name]
    if wrong == "data":
        archive[end - 50] ^= 1
    else:  # the size after unpacking, as the directory of the archive gives it
        entry = archive.rindex(b"PK\x01\x02", 0, archive.rindex(name.encode()))
        size = int.from_bytes(archive[entry + 24 : entry + 28], "little") + 1
        archive[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    server.files["/zips/val2014.zip"] = bytes(archive)
    with pytest.raises(ValueError, match=rf"^1 of the images differ from .* after 5 attempts: {name}; run") as raised:
        run(server, tmp_path)
    assert "\n" not in str(raised.value)
    wanted = expected(source)
    del wanted[f"val2014/{name}"]
    assert found(tmp_path) == wanted
    starts = [first for first, _, _ in server.sent["/zips/val2014.zip"]]
    assert starts.count(begin) == remote_zip.ATTEMPTS


def test_a_server_without_ranges_is_refused(server: Server, tmp_path: Path) -> None:
    server.ignore_range = True
    with pytest.raises(ValueError, match=r"v2_Questions_Train_mscoco.zip: the server ignores Range .* give another"):
        run(server, tmp_path)


@pytest.mark.parametrize("path", ["/vqa/v2_Annotations_Val_mscoco.zip", "/zips/train2014.zip"])
def test_a_missing_archive_is_named(server: Server, tmp_path: Path, path: str) -> None:
    """After the first request: another attempt would not help. The server's own text is not shown."""
    del server.files[path]
    server.reason = "\x1b[31mgone"
    with pytest.raises(ValueError, match=rf"{path}: the server answers 404 Not Found; find the .* --images-url"):
        run(server, tmp_path)


def test_an_unreachable_server_is_reported_after_all_attempts(server: Server, tmp_path: Path) -> None:
    closed = Server({})
    closed.server_close()
    with pytest.raises(ValueError, match=r"could not be read in 5 attempts \(.*refused.*\); check the network, then"):
        run(server, tmp_path, "--annotations-url", closed.url)


def test_a_file_that_is_not_an_archive_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["/zips/train2014.zip"] = b"<html>" * 1000
    with pytest.raises(ValueError, match=r"train2014.zip is not a zip archive \(.*\); give the address"):
        run(server, tmp_path)


def test_an_archive_without_a_selected_image_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["/zips/train2014.zip"] = server.files["/zips/val2014.zip"]
    with pytest.raises(ValueError, match=r"train2014.zip does not contain COCO_train2014_0.*jpg; give the address"):
        run(server, tmp_path)


def test_an_archive_that_changes_during_the_download_is_refused(
    server: Server, archives: dict[str, bytes], tmp_path: Path
) -> None:
    """And no further requests are made."""
    responses = 0

    def change(path: str, begin: int, content: bytes) -> bytes:
        nonlocal responses
        if path == "/zips/train2014.zip":
            responses += 1
            server.files[path] = archives[path] + bytes(responses > 5)
        return content

    server.change = change
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqav2, "CONNECTIONS", 1)
        with pytest.raises(
            ValueError, match=r"train2014.zip has changed while it was read; run the same command again"
        ):
            run(server, tmp_path)
    assert responses < 10


def test_too_small_a_disk_is_detected_before_anything_is_written(
    server: Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte less than the missing images need."""
    run(server, tmp_path)
    shutil.rmtree(tmp_path / "train2014")
    needed = sum(len(content) for name, content in expected(source).items() if name.startswith("train"))
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=rf"has room for {needed - 1:,} bytes, but the images .* {needed:,}; free"):
        run(server, tmp_path)
    assert not (tmp_path / "train2014").exists()
    usage = usage._replace(free=needed)
    run(server, tmp_path)
    assert found(tmp_path) == expected(source)


def test_a_disk_that_fills_up_leaves_no_incomplete_file(
    server: Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is being unpacked does not get its name; once there is room, the same command completes it."""

    def fill_up(source: IO[bytes], target: IO[bytes], length: int) -> None:
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", fill_up)
        with pytest.raises(
            ValueError, match=r"cannot be written \(.*No space left.*\); free some disk space, or choose another"
        ):
            run(server, tmp_path)
    assert {Path(name).suffix for name in found(tmp_path)} <= {".part", ".new"}
    run(server, tmp_path)
    assert found(tmp_path) == expected(source)


def test_a_directory_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"file/vqav2 cannot be written \(.*\); free some disk space, or choose another --output"
    ):
        run(server, tmp_path / "file/vqav2")


def test_the_default_selection_is_that_of_the_configuration() -> None:
    """And so are the paths: configs/vqav2_8gb.yaml runs on what a download without arguments writes."""
    config, given = load_config(ROOT / "configs/vqav2_8gb.yaml"), vqav2.parse([])
    train, validation = config.data.only("train"), config.data.only("validation")
    assert (train.fraction, train.count, train.sample_by) == (given.fraction, None, given.sample_by)
    assert (validation.fraction, validation.count, validation.sample_by) == (None, given.validation, given.sample_by)
    assert config.train.seed == given.seed
    for split, files in (("train2014", train), ("val2014", validation)):
        assert files.questions == f"{given.output}/v2_OpenEnded_mscoco_{split}_questions.json"
        assert files.annotations == f"{given.output}/v2_mscoco_{split}_annotations.json"
        assert files.images == f"{given.output}/{split}"


def test_reads_with_a_buffered_range_are_those_of_the_file(server: Server) -> None:
    """Any read: inside the buffered range, outside it, and across its ends."""
    content = server.files["/bytes"] = random.Random(0).randbytes(2000)
    file, rng = remote_zip.RemoteFile(f"{server.url}/bytes"), random.Random(1)
    assert (file.size, zlib.crc32(file.read())) == (2000, zlib.crc32(content))
    for _ in range(300):
        begin, length = rng.randrange(80, 200), rng.randrange(-1, 60)
        file.buffer(100, content[100:180])
        assert file.seek(begin) == begin
        assert file.read(length) == content[begin : begin + length if length >= 0 else None]
        assert file.tell() == (begin + length if length >= 0 else 2000)
    assert file.seek(-7, io.SEEK_END) == 1993
    assert file.seek(-3, io.SEEK_CUR) == 1990
    with pytest.raises(OSError, match="has no byte -1"):
        file.seek(-2001, io.SEEK_END)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--help"], 0, ""),
        (["--output", "$NO_SUCH_VARIABLE/vqav2"], 2, "the environment variable 'NO_SUCH_VARIABLE' is not set"),
        (["--output", "a$"], 2, "write $$ for a dollar sign"),
        (["--output", "file/vqav2"], 2, "error: file/vqav2 cannot be written"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path, argv: list[str], code: int, message: str) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "data.download.vqav2", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DISK", "/mnt/disk")
    for text, path in (("~/a", "/home/someone/a"), ("$DISK/${DISK}", "/mnt/disk/mnt/disk"), ("a$$b", "a$b")):
        assert vqav2.parse(["--output", text]).output == Path(path)
