"""A source as a configuration names it -> records: their columns, the choice of some, the file they are cached in.

A record holds the absolute path of its image, or its bytes where the source has those: `datasets` never opens it,
data/images.py does. Not here: reading the files (data/sources).
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter

from data.boxes import in_square
from data.files import File, require_file, require_folder
from data.image_check import unusable, unusable_contents
from data.images import image_size
from data.invalid import InvalidRecord, SkippedRecords
from data.sources import KEYS, open_table
from data.sources.pairs import with_pairs
from data.sources.rows import records_of
from data.sources.vqa_files import read_vqav2
from data.text_rows import MARK, own_image_id

TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    id=TEXT,
    image=datasets.Image(decode=False),  # None of a row of text alone
    image_id=TEXT,  # the same for all questions of one image; of bytes their digest; without one data/text_rows.py
    question=TEXT,  # as it was asked
    prefix=TEXT,  # the whole prompt, one line
    answers=datasets.List(TEXT),  # empty where unknown
    equally_right=datasets.Value("bool"),  # each of them is a right answer; else they are what annotators said
    answer=TEXT,  # the most frequent one; "" where answers is empty
    rejected=TEXT,  # of a preference pair the answer that the one of answers is preferred to; "" where there is none
    answer_type=TEXT,  # "" where unknown, as is the one below
    question_type=TEXT,
    extra=TEXT,  # what else a row of a person's own says, as JSON; "" for nothing
)
FORMAT = 8  # goes up when records are written differently, so that cached ones are written again
AT_ONCE = 1 << 23  # bytes of images that are in memory at once while records are written
ROWS_AT_ONCE = 500  # and rows: each batch takes some kilobytes of whoever maps the file


class NoRecordsError(ValueError):
    """Of all records of a source none can be used."""


def load_records(
    *,
    questions: File | None = None,
    annotations: File | None = None,
    images: File | None = None,
    columns: Mapping[str, str] | None = None,
    fraction: float | None = None,
    count: int | None = None,
    sample_by: Literal["image", "question"] = "image",
    prompt: str = "answer en {question}",
    seed: int = 0,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    cache_dir: File | None = None,
    skipped: SkippedRecords | None = None,
    aspect: Literal["squash", "pad"] = "squash",
    prefix_of_ids: str = "",
    text_rows: bool = False,
    **tables: File | None,
) -> datasets.Dataset:
    """Records of the chosen questions or rows, in the order of their file.

    Args:
        questions, annotations: the official files, the second one only where answers are needed.
        tables: or one other source, by a key of `data.sources.KEYS`, such as jsonl.
        images: the folder of the images, by default that of the file; without it official questions need none.
        columns: the names of a table's columns by what they are, where those are others (data/sources/rows.py).
        fraction, count, sample_by, seed: draw this share or number, by whole images or by single questions.
        prompt: the prefix of a question, with {question} where the question goes.
        split: such as "train2014", where the official files do not say it; or of a data set with several (disk, hub).
        subset, revision: of a data set on the Hub.
        cache_dir: where the records are cached, by default in a folder of the cache of `datasets`.
        skipped: where what cannot be used goes; by default there may be none. Records whose image cannot be used by
            its header are among them, but keep their places: in training others are taken instead, for an evaluation
            see `decodable`.
        aspect: how the network makes images square. With "pad" locations in prefixes and answers, which are those of
            the image, become those of the square around it (data/boxes.py).
        prefix_of_ids: what all ids begin with, so that those of several sources differ.
        text_rows: whether a row of a table may have no image.

    Raises:
        ValueError: a file is missing or not what it should be; there are too few questions to draw from; records
            cannot be used, more than may be skipped.
    """
    draw = partial(choose, fraction=fraction, count=count, sample_by=sample_by, seed=seed)
    drawn = fraction is not None or count is not None  # else the seed changes nothing
    folder = None if images is None else require_folder(images)
    given = {key: value for key, value in tables.items() if value is not None}
    if text_rows and (questions is not None or "coco" in given):
        raise ValueError("text_rows is for tables, not for official VQA files or COCO's JSON: leave it out")
    if questions is not None:
        files = [Path(file) for file in (questions, annotations) if file is not None]
        rows, within = partial(read_vqav2, files, folder, prompt, split, draw), None
        options, name = ["vqav2", folder, prompt, split], str(files[0])
    elif len(given) == 1 and given.keys() <= set(KEYS):
        ((key, value),) = given.items()
        table = with_pairs(open_table(key, value, folder, split, subset, revision), columns or {})
        files, folder, name = table.files, table.folder, table.name
        rows, within = partial(records_of, table, columns or {}, prompt, draw if drawn else None, text_rows), folder
        options = [key, folder, prompt, split, json.dumps(columns, sort_keys=True), table.about, str(text_rows)]
    else:
        raise ValueError(f"a source needs questions (with annotations and images), or one of {', '.join(KEYS)}")
    cache = cache_folder(cache_dir)
    if aspect == "pad":
        rows, options = partial(in_squares, rows), [*options, aspect]
    if prefix_of_ids:
        rows, options = partial(with_prefix, rows, prefix_of_ids, name), [*options, prefix_of_ids]
    records, invalid = memory_mapped(rows, files, [*options, draw.keywords if drawn else ""], cache)
    total = len(records) + len(invalid)
    if len(records) and (folder is not None or questions is None):  # official questions may do without images
        within = within if questions is None else Path(records[0]["image"]["path"]).parent
        reasons = with_unusable_image(records, cache, within)
        invalid += [InvalidRecord(records[position]["id"], reason) for position, reason in reasons.items()]
    (skipped or SkippedRecords()).add(invalid, total)
    if not len(records):
        raise NoRecordsError(f"{name} holds no record that can be used")
    return records


def with_unusable_image(
    records: datasets.Dataset, cache: Path, folder: Path | None = None, decode: bool = False
) -> dict[int, str]:
    """The positions of the records whose image cannot be used, with the reason.

    Args:
        folder: that no image that is a file may lie outside of; None: that was looked at before.
        decode: read all pixels, not the header alone.
    """
    places = image_places(records)
    reasons: dict[str, str] = {}
    if files := places["path"].drop_null().unique().to_pylist():
        reasons |= unusable(files, cache, folder, decode)
    if digests := places["digest"].drop_null().unique().to_pylist():
        images = records.select_columns("image")
        positions: dict[str | None, int] = {}
        for position, digest in enumerate(places["digest"].to_pylist()):
            positions.setdefault(digest, position)
        stored = [Path(one["filename"]).stem for one in records.cache_files]
        checked = cache / f"images-{stored[0]}.json" if stored else None
        contents = {digest: positions[digest] for digest in digests}
        reasons |= unusable_contents(contents, lambda at: images[at]["image"]["bytes"], checked, decode)
    if not reasons:
        return {}
    names = image_names(places)
    return {position: reasons[name] for position, name in enumerate(names) if name in reasons}


def image_places(records: datasets.Dataset) -> pa.Table:
    """Where the records' images are: `path` of those that are files, `digest` of those that are bytes, which stay
    unread; neither of a row of text alone.
    """
    flat = records.select_columns(["image", "image_id"]).flatten().select_columns(["image.path", "image_id"])
    table = flat.with_format("arrow")[:]
    paths, ids = (table[name].cast(pa.string()) for name in table.column_names)
    is_no_digest = pc.or_(pc.is_valid(paths), pc.starts_with(ids, MARK))
    return pa.table({"path": paths, "digest": pc.if_else(is_no_digest, pa.scalar(None, pa.string()), ids)})


def image_names(places: pa.Table) -> list[str | None]:
    """What `image_places` found, as one name for each record: the path, or the digest; None without an image."""
    names: list[str | None] = pc.coalesce(places["path"], places["digest"]).to_pylist()
    return names


def with_prefix(
    rows: Callable[[], Iterable[dict[str, Any] | InvalidRecord]], prefix: str, file: str
) -> Iterator[dict[str, Any] | InvalidRecord]:
    """What `rows()` yields, with ids that begin with `prefix`, unless they say a place in `file`."""
    for row in rows():
        if isinstance(row, InvalidRecord):
            yield row if row.id.startswith(f"{file}, ") else row._replace(id=prefix + row.id)
        else:
            id = prefix + row["id"]
            yield {**row, "id": id} | ({"image_id": own_image_id(id)} if row["image"] is None else {})


def in_squares(
    rows: Callable[[], Iterable[dict[str, Any] | InvalidRecord]],
) -> Iterator[dict[str, Any] | InvalidRecord]:
    """What `rows()` yields, with locations of the square around each image instead of those of the image."""
    for row in rows():
        if isinstance(row, InvalidRecord) or row["image"] is None:
            yield row
            continue
        if "<loc" in texts_of(row):
            try:
                size = image_size(row["image"])
            except ValueError as error:
                yield InvalidRecord(row["id"], str(error))
                continue
            answers = [in_square(answer, size) for answer in row["answers"]]
            prefix, rejected = (in_square(row.get(name, ""), size) for name in ("prefix", "rejected"))
            row = {**row, "prefix": prefix, "answers": answers, "rejected": rejected}
        yield row


def decodable(
    records: datasets.Dataset, skipped: SkippedRecords | None = None, cache_dir: File | None = None
) -> datasets.Dataset:
    """The records whose images can be decoded, after decoding all of them; `skipped` as in `load_records`.

    Raises:
        ValueError: more cannot be used than may be skipped.
    """
    reasons = with_unusable_image(records, cache_folder(cache_dir), decode=True)
    if not reasons:
        return records
    invalid = [InvalidRecord(records[position]["id"], reason) for position, reason in reasons.items()]
    (skipped or SkippedRecords()).add(invalid, len(records))
    return records.select([position for position in range(len(records)) if position not in reasons])


class ImagesById(Mapping[str, dict[str, Any] | None]):
    """The images of records by `image_id`, each read when it is asked for; None of a row of text alone."""

    def __init__(self, records: datasets.Dataset) -> None:
        self.images = records.select_columns("image")
        self.positions = {name: position for position, name in enumerate(records["image_id"][:])}

    def __getitem__(self, name: str) -> dict[str, Any] | None:
        image: dict[str, Any] | None = self.images[self.positions[name]]["image"]
        return image

    def __iter__(self) -> Iterator[str]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def cache_folder(cache_dir: File | None) -> Path:
    """Where records and the results of checking images are cached."""
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "paligemma_lora")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def choose(
    image_ids: Sequence[Hashable], *, fraction: float | None, count: int | None, sample_by: str, seed: int
) -> list[int]:
    """Positions of a share or a number of all questions, ascending; of all, if both are None.

    Drawn by image, 10% of VQAv2's questions touch 10% of its images; drawn by question, 43%. By image, of the last
    one only as many are taken as `count` needs.
    """
    if sample_by not in ("image", "question"):
        raise ValueError(f'sample_by is {sample_by!r}; expected "image" or "question"')
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected above 0, at most 1")
    if count is not None and (count < 1 or fraction is not None):
        raise ValueError(f"count is {count}, fraction {fraction}; expected a count from 1, or a fraction")
    if fraction is None and count is None:
        return list(range(len(image_ids)))
    if count is not None and count > len(image_ids):
        raise ValueError(f"count is {count:,}; there are only {len(image_ids):,} examples")
    groups: dict[Hashable, list[int]] = {}
    for position, image_id in enumerate(image_ids):
        groups.setdefault(image_id if sample_by == "image" else position, []).append(position)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    if fraction is not None:
        order = order[: max(1, round(fraction * len(order)))]
    return sorted([position for group in order for position in group][:count])


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of them in a tie, "" if there is none."""
    return max(answers, key=answers.count, default="")


def memory_mapped(
    rows: Callable[[], Iterable[dict[str, Any] | InvalidRecord]], files: list[Path], options: list[Any], folder: Path
) -> tuple[datasets.Dataset, list[InvalidRecord]]:
    """What `rows()` yields, written to `folder` once, then memory-mapped until `files` or `options` change."""
    key: list[Any] = [FORMAT, *map(str, options)]
    for file in files:
        status = require_file(file)
        key.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    cached = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.arrow"
    if not cached.exists():
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            written, invalid = Path(unfinished, "records.arrow"), []
            with ArrowWriter(path=str(written), features=FEATURES, writer_batch_size=ROWS_AT_ONCE) as writer:
                waiting = 0  # bytes of images that are not yet written
                for row in map(encodable, rows()):
                    if isinstance(row, InvalidRecord):
                        invalid.append(row)
                    else:
                        unknown = dict.fromkeys(("rejected", "answer_type", "question_type", "extra"), "")
                        writer.write({"answer": majority(row["answers"]), **unknown, **row})
                        waiting += len(row["image"]["bytes"]) if isinstance(row["image"], dict) else 0
                        if waiting > AT_ONCE:
                            writer.write_examples_on_file()
                            waiting = 0
                writer.finalize()
            Path(unfinished, "invalid.json").write_text(json.dumps(invalid))
            # Whole or not at all, also when several processes write it: the records last.
            os.replace(Path(unfinished, "invalid.json"), cached.with_suffix(".json"))
            os.replace(written, cached)
    invalid = [InvalidRecord(*entry) for entry in json.loads(cached.with_suffix(".json").read_bytes())]
    return datasets.Dataset.from_file(str(cached)), invalid


def texts_of(row: Mapping[str, Any]) -> str:
    """What is asked and answered, one after the other."""
    return "".join([row["prefix"], *row["answers"], row.get("rejected", "")])


def encodable(row: dict[str, Any] | InvalidRecord) -> dict[str, Any] | InvalidRecord:
    """The row, or what is wrong with a text that no file can hold: JSON allows halves of surrogate pairs."""
    if isinstance(row, InvalidRecord):
        return row
    try:
        path = row["image"] if isinstance(row["image"], str) else ""
        "".join([row["id"], path, texts_of(row)]).encode()
    except UnicodeEncodeError as error:
        return InvalidRecord(ascii(row["id"]), f"its text is no Unicode: {error}")
    return row
