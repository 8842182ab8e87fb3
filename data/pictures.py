"""All pictures of a data set looked at before hours are spent: which of them cannot be used, and why.

Only headers are read, unless asked for more: 83,000 pictures take seconds. What was found sound is remembered by path,
size and time of change, so that the next look reads nothing. Not here: what makes a picture usable (data/images.py).
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data.images import check_header, is_exhausted, open_image

AT_ONCE = 64  # pictures that a thread takes
Sound = dict[str, list[int]]  # name -> size, time of change in ns, 1 if all of it was decoded


def unusable(paths: Iterable[str], cache_dir: Path, root: Path | None = None, decode: bool = False) -> dict[str, str]:
    """The pictures that cannot be used, with the reason.

    Args:
        paths: absolute.
        cache_dir: where is kept what was found sound, a file for each folder of pictures.
        root: the folder that no picture may lie outside of, by a link; None: that was looked at before.
        decode: read all pixels, not the header alone.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        folders.setdefault(folder, []).append(name)
    home = None if root is None else Path(os.path.realpath(root))
    faults: dict[str, str] = {}
    count = sum(map(len, folders.values()))
    with ThreadPoolExecutor() as pool, tqdm(total=count, desc="looking at images", leave=False, delay=3) as bar:
        for folder, names in folders.items():
            kept = cache_dir / f"pictures-{hashlib.sha256(folder.encode()).hexdigest()[:32]}.json"
            look = Look(folder, home, decode, _read(kept))
            for found in pool.map(look, [names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE)]):
                faults |= found
                bar.update(AT_ONCE)
            if look.changed:
                _write(kept, look.sound)
    return faults


class Look:
    """A look at pictures of one folder; takes names, returns faults by path, remembers in `sound` what is sound."""

    def __init__(self, folder: str, home: Path | None, decode: bool, sound: Sound) -> None:
        self.folder, self.home, self.sound, self.changed = folder, home, sound, False
        self.open: Callable[[str], object] = open_image if decode else check_header
        self.depth = int(decode)
        self.is_within = self._is_within(folder)

    def __call__(self, names: Sequence[str]) -> dict[str, str]:
        faults = {}
        for name in names:
            path = os.path.join(self.folder, name)
            try:
                self._look(path, name)
            except OSError as error:
                if is_exhausted(error):
                    raise
                faults[path] = f"image {path} cannot be used: {error.strerror}"
            except ValueError as error:
                faults[path] = str(error)
        return faults

    def _look(self, path: str, name: str) -> None:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            status, is_within = os.stat(path), self._is_within(path)
        else:
            is_within = self.is_within
        if not is_within:
            raise ValueError(f"image {path} leads out of its folder by a link; put a copy there, or name its folder")
        size, changed, depth = self.sound.get(name, (-1, -1, 0))
        if (size, changed) != (status.st_size, status.st_mtime_ns) or depth < self.depth:
            self.open(path)
            self.sound[name] = [status.st_size, status.st_mtime_ns, self.depth]
            self.changed = True

    def _is_within(self, path: str) -> bool:
        return self.home is None or Path(os.path.realpath(path)).is_relative_to(self.home)


def _read(kept: Path) -> Sound:
    try:
        sound: Sound = json.loads(kept.read_bytes())
    except (OSError, ValueError):  # none yet
        return {}
    return sound


def _write(kept: Path, sound: Sound) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as unfinished:
        written = Path(unfinished, kept.name)
        written.write_text(json.dumps(sound))
        os.replace(written, kept)
