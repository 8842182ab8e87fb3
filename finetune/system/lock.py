"""One process at a time writes into a place, such as the directory of a run.

The lock is the operating system's, on an open file (filelock): a process holds it, and its death releases it, also on
a network file system. A lock file that is left behind by a process that was killed locks nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from finetune.system import distributed

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(lock_file: Path, place: Path, doing: str) -> Iterator[None]:
    """Hold `place` while writing into it; of several processes of one run the first one holds it for all.

    Args:
        lock_file: made for this long, and its directory, if that is not there.
        doing: what others are told, such as "training".

    Raises:
        ValueError: another process holds it (says which, where and since when), or the lock file cannot be written.
    """
    held = contextlib.ExitStack()
    distributed.on_main(lambda: held.enter_context(_held(lock_file, place, doing)))
    with held:
        yield


@contextlib.contextmanager
def _held(lock_file: Path, place: Path, doing: str) -> Iterator[None]:
    holder, made = lock_file.with_name(f"{lock_file.name}.json"), not lock_file.parent.exists()
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file, blocking=False, thread_local=False, fallback_to_soft=False)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{place} is in use: {_who(holder)}. Wait until it has ended, stop it, or choose another output"
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise ValueError(
                f"{place} cannot be written: {error}\nfix that and start the same command again"
            ) from error
        tqdm.write(f"{place} is on a file system without locks: see to it that nothing else writes there", sys.stderr)
        yield
        return
    me = {"pid": os.getpid(), "host": platform.node(), "since": now(), "doing": doing}
    with contextlib.suppress(OSError):  # the disk is full: who it is remains unsaid
        holder.write_text(json.dumps(me) + "\n", encoding="utf-8")
    try:
        yield
    finally:
        # Whoever opened the file meanwhile notices that it is gone. On Windows it stays.
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
            lock_file.unlink()
            if made:
                lock_file.parent.rmdir()  # unless something was written
        lock.release()


def is_held(lock_file: Path) -> bool:
    """Whether a process holds a lock, by what it wrote down; one of another machine may have been killed."""
    try:
        holder = json.loads(lock_file.with_name(f"{lock_file.name}.json").read_text(encoding="utf-8"))
        return bool(holder["host"] != platform.node() or psutil.pid_exists(int(holder["pid"])))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")


def _who(holder: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        it = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {it['pid']} on {it['host']} has been {it['doing']} there since {it['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process, which could not write down its number, is at work there"
