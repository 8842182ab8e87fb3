"""Directories that are whole or not there: whatever moment the writing of one is cut off at."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.system import atomic
from finetune.system.atomic import MANIFEST, NoSpaceError, damage, delete_whole, recover, write_text_whole, write_whole


def files(text: str) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        (path / "a.txt").write_text(text)
        (path / "b.bin").write_bytes(text.encode() * 1000)

    return fill


def test_written_it_is_whole_and_its_manifest_says_so(tmp_path: Path) -> None:
    write_whole(tmp_path / "d", files("one"))
    assert damage(tmp_path / "d") is None
    assert sorted(os.listdir(tmp_path / "d")) == ["a.txt", "b.bin", MANIFEST]
    assert os.listdir(tmp_path) == ["d"]


def test_what_is_there_gives_way_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_whole(tmp_path / "d", files("one"))
    with pytest.raises(FileExistsError, match="exists already"):
        write_whole(tmp_path / "d", files("two"))
    assert (tmp_path / "d/a.txt").read_text() == "one"
    write_whole(tmp_path / "d", files("two"), replace=True)
    assert (tmp_path / "d/a.txt").read_text() == "two"
    assert os.listdir(tmp_path) == ["d"]


def test_a_deletion_that_is_cut_off_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "d", files("one"))
    remove = shutil.rmtree

    def cut_off(path: Path, ignore_errors: bool = False) -> None:
        if (path / MANIFEST).exists():
            (path / MANIFEST).unlink()
            raise KeyboardInterrupt
        remove(path, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            delete_whole(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    recover(tmp_path / "d")
    assert os.listdir(tmp_path) == []


CALLS = ("rename", "mkdir", "fsync", "rmtree")


@pytest.mark.parametrize("kill_at", range(1, 14))
def test_killed_at_any_moment_the_old_or_the_new_one_is_whole(tmp_path: Path, kill_at: int) -> None:
    """A second process replaces a directory and kills itself at its n-th call that changes the disk."""
    write_whole(tmp_path / "d", files("old"))
    code = f"""
import os, pathlib, shutil, signal
from finetune.system import atomic
from tests.system.test_atomic import files
left = {kill_at}
def deadly(function):
    def call(*arguments, **keywords):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call
os.fsync = deadly(os.fsync)
shutil.rmtree = deadly(shutil.rmtree)
pathlib.Path.rename, pathlib.Path.mkdir = deadly(pathlib.Path.rename), deadly(pathlib.Path.mkdir)
atomic.write_whole(pathlib.Path({str(tmp_path / "d")!r}), files("new"), replace=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    assert (done.returncode == 0) == (kill_at > 12)  # twelve calls in all: the last parameter is a run to the end
    recover(tmp_path / "d")
    assert damage(tmp_path / "d") is None
    assert (tmp_path / "d/a.txt").read_text() in ("old", "new")
    assert os.listdir(tmp_path) == ["d"]


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "d", files("old"))
    usage = atomic.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=99))
    with pytest.raises(NoSpaceError, match="needs 100 bytes, and 99 are free"):
        write_whole(tmp_path / "d", files("new"), size=100, replace=True)
    write_whole(tmp_path / "d", files("new"), size=99, replace=True)


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, small_files: None) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("old")
    with pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "d", files("new"), replace=True)
    assert (tmp_path / "d/a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["d"]


def test_what_does_not_get_into_its_place_leaves_the_old_one_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "d", files("old"))
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if path.name == ".d.unfinished":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "d", files("new"), replace=True)
    assert (tmp_path / "d/a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["d"]


def test_a_single_file_is_written_whole_or_not_at_all(tmp_path: Path, small_files: None) -> None:
    write_text_whole(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match="File too large"):
        write_text_whole(tmp_path / "a.txt", "new" * 1000)
    assert (tmp_path / "a.txt").read_text() == "old"
    write_text_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("b.bin", Path.unlink, "b.bin is missing"),
        ("b.bin", cut, "b.bin has 2,999 bytes instead of 3,000"),
        ("b.bin", flip, r"b.bin is not what was written \(its sha256 differs\)"),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, cut, "cannot be read"),
        (MANIFEST, lambda path: path.write_text("[1]"), "cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"a.txt": 3}'), "cannot be read"),
        (MANIFEST, lambda path: path.write_bytes(b"\xff"), "cannot be read"),
        (MANIFEST, lambda path: path.write_text("[" * 100_000), "cannot be read"),
        (MANIFEST, lambda path: (path.unlink(), path.mkdir()), r"a file cannot be read \(.*Is a directory"),
    ],
)
def test_every_damage_is_seen(tmp_path: Path, name: str, spoil: Callable[[Path], object], message: str) -> None:
    write_whole(tmp_path / "d", files("one"))
    spoil(tmp_path / "d" / name)
    if name == MANIFEST and spoil is cut:
        cut(tmp_path / "d" / name)  # the last line's end, and then its brace
    reason = damage(tmp_path / "d")
    assert reason is not None
    assert re.search(message, reason)
