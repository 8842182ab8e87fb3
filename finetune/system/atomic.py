"""Atomic writes: a directory or file is written whole, or the old one stays as it was.

A directory is filled under a temporary path, every file is synced to the disk, a manifest lists the size and sha256 of
each, and the directory is renamed. A process that is killed at any moment leaves the old directory as it was, and at
most a temporary one, which `recover` removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MANIFEST = "manifest.json"


class NoSpaceError(OSError):
    """The disk has too little room for what is to be written; nothing was written."""


def write_whole(directory: Path, fill: Callable[[Path], None], size: int = 0, replace: bool = False) -> None:
    """Write `directory` atomically, with the files that `fill` writes into the path it is given.

    Args:
        size: bytes that will be written, about; too little room is an error before anything is written.
        replace: an existing `directory` is replaced, once the new one is complete.

    Raises:
        FileExistsError: there is something at `directory` already.
        NoSpaceError: too little room. Any other OSError while writing (the disk is full after all): nothing is left
            behind, and `directory` is as it was.
    """
    recover(directory)
    if occupied(directory) and not replace:
        raise FileExistsError(f"{directory} exists already")
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if free < size:
        raise NoSpaceError(f"{directory} needs {size:,} bytes, and {free:,} are free on its disk")
    unfinished, superseded = temporary_paths(directory)
    unfinished.mkdir()
    try:
        fill(unfinished)
        listed = {path.name: describe(path) for path in sorted(unfinished.iterdir())}
        (unfinished / MANIFEST).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        for path in [*unfinished.iterdir(), unfinished]:
            sync(path)
        if directory.exists():
            directory.rename(superseded)
        unfinished.rename(directory)
    except BaseException:
        recover(directory)
        raise
    sync(directory.parent)
    shutil.rmtree(superseded, ignore_errors=True)


def delete_whole(directory: Path) -> None:
    """Delete `directory`: under its name it is whole or gone, also where the process is killed meanwhile."""
    recover(directory)
    unfinished, _ = temporary_paths(directory)
    directory.rename(unfinished)
    shutil.rmtree(unfinished)


def write_text_whole(path: Path, text: str) -> None:
    """Write a file atomically; OSError where there is no room."""
    with text_to_be(path, text):
        pass


def write_bytes_whole(path: Path, content: bytes) -> None:
    """As `write_text_whole`, of bytes."""
    with bytes_to_be(path, content):
        pass


@contextlib.contextmanager
def text_to_be(path: Path, text: str) -> Iterator[None]:
    """As `write_text_whole`, but the file, already on the disk, is renamed when this context ends without an error."""
    with bytes_to_be(path, text.encode()):
        yield


@contextlib.contextmanager
def bytes_to_be(path: Path, content: bytes) -> Iterator[None]:
    """As `text_to_be`, of bytes."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        sync(unfinished)
        yield
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def occupied(directory: Path) -> bool:
    """Whether there is anything at a path; an empty directory is nothing."""
    return directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))


def recover(directory: Path) -> None:
    """Remove what a killed `write_whole` left; restore the old directory where the new one was not complete."""
    unfinished, superseded = temporary_paths(directory)
    if superseded.exists() and not directory.exists():
        superseded.rename(directory)
    for leftover in (unfinished, superseded):
        shutil.rmtree(leftover, ignore_errors=True)


def temporary_paths(directory: Path) -> tuple[Path, Path]:
    """The path under which a new directory is filled, and the old one's while the two are renamed."""
    return directory.with_name(f".{directory.name}.unfinished"), directory.with_name(f".{directory.name}.superseded")


def files_of(directory: Path) -> set[str]:
    """The files that were written into a directory, by its manifest; none where that cannot be read."""
    try:
        return set(json.loads((directory / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return set()


def damage(directory: Path) -> str | None:
    """What is wrong with a directory by its own manifest, or None: every file is there as it was written."""
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            if not (path := directory / name).is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if describe(path) != expected:
                return f"{name} is not what was written (its sha256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"a file cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return None


def require_whole(directory: Path) -> None:
    """ValueError where a directory has a manifest and is not what that says; published ones have none."""
    if (directory / MANIFEST).exists() and (reason := damage(directory)):
        raise ValueError(f"{directory} is not as it was written: {reason}; if that is meant, delete its {MANIFEST}")


def describe(path: Path) -> dict[str, int | str]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def describe_all(paths: Sequence[Path], about: str = "") -> dict[str, int | str]:
    """Size and sha256 of a file; of several, of all of them with their names. about: what else they stand with."""
    if about:
        return describe_all(paths) | {"about": about}
    if len(paths) == 1:
        return describe(paths[0])
    described = {str(path): describe(path) for path in paths}
    listed = [[Path(path).name, about["sha256"]] for path, about in described.items()]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"files": len(paths), "bytes": sum(int(about["bytes"]) for about in described.values()), "sha256": digest}


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot do this for directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
