"""All images of a data set looked at before hours are spent: which of them cannot be used, and why.

Only headers are read, unless asked for more: 83,000 images take seconds. What was found valid is remembered, so that
the next check reads nothing: files by path, size and time of change, bytes by their digest. Not here: what makes an
image usable (data/images.py).
"""

import errno
import functools
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.images import check_header, is_exhausted, open_image, suffixes
from data.progress import progress_bar

AT_ONCE = 64  # images that a thread takes
ValidImages = dict[str, list[int]]  # name -> size, time of change in ns (of files); 1 if all of it was decoded


def unusable(paths: Iterable[str], cache_dir: Path, root: Path | None = None, decode: bool = False) -> dict[str, str]:
    """The images that cannot be used, with the reason.

    Args:
        paths: absolute.
        cache_dir: where the names of valid images are cached, a file for each folder.
        root: the folder that no image may lie outside of, by a link; None: that was looked at before.
        decode: read all pixels, not the header alone.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        folders.setdefault(folder, []).append(name)
    home = None if root is None else Path(os.path.realpath(root))
    reasons: dict[str, str] = {}
    count = sum(map(len, folders.values()))
    names_in = functools.cache(_names_in)
    with ThreadPoolExecutor() as pool, progress_bar(total=count, desc="looking at images", unit="image") as bar:
        for folder, names in folders.items():
            cached = cache_dir / f"images-{hashlib.sha256(folder.encode()).hexdigest()[:32]}.json"
            check = ImageCheck(folder, home, decode, _read(cached))
            for found in pool.map(check, [names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE)]):
                reasons |= found
                bar.update(min(AT_ONCE, count - bar.n))
            for path in check.missing:
                if meant := _meant(path, names_in):
                    reasons[path] += f"; did you mean {meant}?"
            if check.changed:
                _write(cached, check.valid)
    return reasons


def unusable_contents(
    images: Mapping[str, int], read: Callable[[int], bytes], cached: Path | None, decode: bool = False
) -> dict[str, str]:
    """The images that cannot be used, with the reason, where they are no files: by the digest of their bytes.

    Args:
        images: digest -> position.
        read: gives the bytes at a position.
        cached: the file in which the digests of valid images are cached; None: they are not.
        decode: read all pixels, not the header alone.
    """
    depth, known = int(decode), _read(cached) if cached else {}
    check: Callable[[bytes], object] = open_image if decode else check_header

    def reason(digest: str) -> tuple[str, str | None]:
        try:
            check(read(images[digest]))
        except ValueError as error:
            return digest, str(error)
        return digest, None

    new = [digest for digest in images if known.get(digest, (-1,))[-1] < depth]
    reasons: dict[str, str] = {}
    with ThreadPoolExecutor() as pool, progress_bar(total=len(new), desc="looking at images", unit="image") as bar:
        for digest, found in pool.map(reason, new):
            if found is None:
                known[digest] = [depth]
            else:
                reasons[digest] = found
            bar.update()
    if cached and len(new) > len(reasons):
        _write(cached, known)
    return reasons


class ImageCheck:
    """Checks images of one folder; takes names, returns reasons by path, remembers in `valid` what is valid, in
    `missing` the paths of those that are not there."""

    def __init__(self, folder: str, home: Path | None, decode: bool, valid: ValidImages) -> None:
        self.folder, self.home, self.valid, self.changed = folder, home, valid, False
        self.missing: list[str] = []
        self.open: Callable[[str], object] = open_image if decode else check_header
        self.depth = int(decode)
        self.is_within = self._is_within(folder)

    def __call__(self, names: Sequence[str]) -> dict[str, str]:
        reasons = {}
        for name in names:
            path = os.path.join(self.folder, name)
            try:
                self._look(path, name)
            except OSError as error:
                if is_exhausted(error):
                    raise
                if error.errno == errno.ENOENT:
                    self.missing.append(path)
                said = "does not exist" if error.errno == errno.ENOENT else f"cannot be used: {error.strerror}"
                reasons[path] = f"image {path} {said}"
            except ValueError as error:
                reasons[path] = str(error)
        return reasons

    def _look(self, path: str, name: str) -> None:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            status, is_within = os.stat(path), self._is_within(path)
        else:
            is_within = self.is_within
        if not is_within:
            raise ValueError(f"image {path} leads out of its folder by a link; put a copy there, or name its folder")
        size, changed, depth = self.valid.get(name, (-1, -1, 0))
        if (size, changed) != (status.st_size, status.st_mtime_ns) or depth < self.depth:
            self.open(path)
            self.valid[name] = [status.st_size, status.st_mtime_ns, self.depth]
            self.changed = True

    def _is_within(self, path: str) -> bool:
        return self.home is None or Path(os.path.realpath(path)).is_relative_to(self.home)


def _names_in(folder: str) -> dict[str, str]:
    """The names in a folder by what they are in lower case; none where it cannot be listed."""
    try:
        return {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}
    except OSError:
        return {}


def _meant(path: str, names_in: Callable[[str], dict[str, str]]) -> str | None:
    """The file that is there instead of a missing one, if only case, or a suffix such as .jpg, makes them differ."""
    above, name = os.path.split(path)
    if not name:
        return None
    if not os.path.isdir(above):
        folder = _meant(above, names_in)
        if folder is None or not os.path.isdir(folder):
            return None
        above = folder
    there = names_in(above)
    known = (name.lower(), *(name.lower() + suffix for suffix in sorted(suffixes())))
    found = [os.path.join(above, there[one]) for one in known if one in there]
    return next((one for one in found if one != path), None)


def _read(cached: Path) -> ValidImages:
    try:
        valid: ValidImages = json.loads(cached.read_bytes())
    except (OSError, ValueError):  # none yet
        return {}
    return valid


def _write(cached: Path, valid: ValidImages) -> None:
    with tempfile.TemporaryDirectory(dir=cached.parent) as unfinished:
        written = Path(unfinished, cached.name)
        written.write_text(json.dumps(valid))
        os.replace(written, cached)
