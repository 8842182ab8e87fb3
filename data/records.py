"""What data/vqav2.py and data/jsonl.py share: the columns of a record, the choice of some, the file they live in.

A record holds the absolute path of its picture: `datasets` never opens it, data/images.py does.
"""

import hashlib
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

Rows = Callable[[], Iterable[dict[str, Any]]]
TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "image": datasets.Image(decode=False),
        "image_id": TEXT,  # the same for all questions of one picture
        "question": TEXT,  # as it was asked
        "prefix": TEXT,  # the whole prompt, one line
        "answers": datasets.List(TEXT),  # empty where unknown
        "answer": TEXT,  # the most frequent one; "" where unknown, as the two below
        "answer_type": TEXT,
        "question_type": TEXT,
    }
)
FORMAT = 1  # goes up when records are written differently, so that kept ones are written anew


@dataclass(frozen=True)
class Selection:
    """A share (`fraction`) or a number (`count`) of all questions, drawn by `seed`; neither: all of them.

    Drawn by image, 10% of VQAv2's questions touch 10% of its pictures; drawn by question, 43%.
    """

    fraction: float | None
    count: int | None
    sample_by: str
    seed: int

    def __post_init__(self) -> None:
        if self.sample_by not in ("image", "question"):
            raise ValueError(f'sample_by is {self.sample_by!r}; expected "image" or "question"')
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; expected above 0, at most 1")
        if self.count is not None and (self.count < 1 or self.fraction is not None):
            raise ValueError(f"count is {self.count}, fraction {self.fraction}; expected a count from 1, or a fraction")

    def choose(self, image_ids: Sequence[Hashable]) -> list[int]:
        """Positions of the chosen questions, ascending; by image, of the last one only as many as `count` needs."""
        if self.fraction is None and self.count is None:
            return list(range(len(image_ids)))
        if self.count is not None and self.count > len(image_ids):
            raise ValueError(f"count is {self.count:,}; there are only {len(image_ids):,} questions")
        groups: dict[Hashable, list[int]] = {}
        for position, image_id in enumerate(image_ids):
            groups.setdefault(image_id if self.sample_by == "image" else position, []).append(position)
        order = list(groups.values())
        random.Random(self.seed).shuffle(order)
        if self.fraction is not None:
            order = order[: max(1, round(self.fraction * len(order)))]
        return sorted([position for group in order for position in group][: self.count])


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of them in a tie."""
    return Counter(answers).most_common(1)[0][0]


def require_pictures(names: Iterable[str], folder: Path) -> None:
    """Raises ValueError with the first few names that are no files of the folder."""
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{len(missing):,} pictures are not in {folder}: {some}; add them, or mend the images folder")


def memory_mapped(
    rows: Rows, files: list[Path], options: list[Any], selection: Selection, cache_dir: str | PathLike[str] | None
) -> datasets.Dataset:
    """What `rows()` yields, written once, then memory-mapped until `files`, `options` or `selection` change."""
    drawn = selection.fraction is not None or selection.count is not None  # else the seed changes nothing
    key: list[Any] = [FORMAT, *map(str, options), str(selection) if drawn else ""]
    for file in files:
        if not file.is_file() or not (status := file.stat()).st_size:
            raise ValueError(f"{file} does not exist or is empty; mend its path")
        key.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "paligemma_lora")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.arrow"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            written = f"{unfinished}/records.arrow"
            with ArrowWriter(path=written, features=FEATURES) as writer:
                for row in rows():
                    writer.write(row)
                writer.finalize()
            os.replace(written, kept)  # whole or not at all, also when several processes write it
    return datasets.Dataset.from_file(str(kept))
