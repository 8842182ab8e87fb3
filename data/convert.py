"""Write any source of examples as JSON lines, the form that is easiest to look at, to edit and to share.

    python -m data.convert mine.csv --to jsonl mine.jsonl               the kind is told by the file
    python -m data.convert --csv mine.csv --columns question=query --to jsonl mine.jsonl
    python -m data.convert --questions Q --annotations A --images DIR --to jsonl mine.jsonl

The options are the keys that a source has in a configuration. What is read back is the same: ids, prompts or questions,
answers, further columns; of the official VQA files also that the answers are annotators' and not equally right, and of
which type they are. Images that are files stay where they are, and the line to read the result with, which is printed,
names their folder; those of Parquet files, save_to_disk and the Hub are written as files into NAME-images beside the
result. Rows that cannot be used are skipped and listed with the reason. The exit code is 0, 1 if rows were skipped,
2 after an error (nothing is written then), 130 after Ctrl-C. Not here: reading (data/records.py), which see for what
a row may be.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.files import path_argument
from data.images import suffix_of
from data.invalid import SkippedRecords
from data.records import load_records
from data.script import run
from data.sources import HUB, TABLES, open_table
from data.sources.kinds import kind_of
from data.sources.rows import ANNOTATED, ROLES

OFFICIAL = ("questions", "annotations")
WITH_BYTES = ("parquet", "disk", HUB)  # sources whose images may be bytes
# Put before questions while they are read, so that they are told from prefixes, which are whole prompts.
MARK = "\ue000"
SKIPPED = 1  # exit code
Records = Iterator[Mapping[str, Any]]
Write = Callable[[Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        count: of examples. skipped: why each of the others cannot be used, by its id or place.
        images: the folder that `images` has to name to read the result; None: its own.
        text_rows: how many have no image, which reading them has to allow.
    """

    count: int
    skipped: Mapping[str, str]
    images: Path | None
    text_rows: int = 0


def convert(source: Mapping[str, Any], output: Path) -> Converted:
    """Write the examples of a source.

    Args:
        source: arguments of `load_records` that say where examples are.
        output: the file.

    Raises:
        ValueError: the source cannot be read, has no answers, or has nothing that can be used; `output` exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: give another path, or delete it")
    skipped, count, text_rows = SkippedRecords(share=math.inf), 0, 0
    with rewriting(source, output, skipped) as (records, write):
        for record in records:
            write(record)
            count, text_rows = count + 1, text_rows + (record["image"] is None)
        if not count:
            raise ValueError("\n  ".join(["no example can be used:", *map(": ".join, skipped.reasons.items())]))
    return Converted(count, skipped.reasons, folder_to_name(source, output), text_rows)


@contextlib.contextmanager
def rewriting(source: Mapping[str, Any], output: Path, skipped: SkippedRecords) -> Iterator[tuple[Records, Write]]:
    """The records of a source that can be used, and what writes one as a line. `output` has the lines when the block
    ends without an error, and is left as it was otherwise.

    Raises:
        ValueError: the source cannot be read, or has no answers.
    """
    if source.get("questions") and not source.get("annotations"):
        raise ValueError("the questions have no answers: give their annotations too (--annotations)")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, ignore_cleanup_errors=True) as within:
        try:
            records = load_records(**source, prompt=MARK + "{question}", skipped=skipped, cache_dir=within)
        except ValueError as error:
            raise ValueError("\n  ".join([str(error), *map(": ".join, skipped.reasons.items())])) from error
        folder = folder_of(source)
        place = writer_of_images(output) if folder is None else path_within(folder)
        unfinished = Path(within, output.name)
        with unfinished.open("w", encoding="utf-8") as lines:

            def write(record: Mapping[str, Any]) -> None:
                image = None if record["image"] is None else place(record["image"])
                lines.write(json.dumps(row_of(record, image), ensure_ascii=False) + "\n")

            yield (record for record in records if record["id"] not in skipped.reasons), write
        os.replace(unfinished, output)


def folder_to_name(source: Mapping[str, Any], output: Path) -> Path | None:
    """The folder that `images` has to name to read what was written; None: its own."""
    folder = folder_of(source)
    return None if folder == output.parent.absolute() else folder


def folder_of(source: Mapping[str, Any]) -> Path | None:
    """The folder that images lie in as files; None where they may be bytes."""
    if any(source.get(key) for key in WITH_BYTES):
        return None
    if source.get("images"):
        return Path(source["images"]).absolute()
    key = next(key for key in TABLES if source.get(key))
    return open_table(key, source[key], None).folder


def path_within(folder: Path) -> Callable[[Mapping[str, Any]], str]:
    """What names an image that is a file: its path within a folder."""
    return lambda image: Path(image["path"]).relative_to(folder).as_posix()


def writer_of_images(output: Path) -> Callable[[Mapping[str, Any]], str]:
    """What writes an image as a file beside `output`, named by its content, and names it."""
    folder = output.with_name(f"{output.stem}-images")

    def place(image: Mapping[str, Any]) -> str:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        file = folder / (hashlib.sha256(content).hexdigest()[:32] + suffix_of(content))
        if not file.exists():
            folder.mkdir(exist_ok=True)
            file.write_bytes(content)
        return f"{folder.name}/{file.name}"

    return place


def row_of(record: Mapping[str, Any], image: str | None) -> dict[str, Any]:
    """A record (data/records.py) as the row that is read as it. image: what names it; None of a row of text alone.

    Raises:
        ValueError: it has a further column with a name that means something in a row.
    """
    role = "question" if record["prefix"].startswith(MARK) else "prefix"
    answers = record["answers"]
    row = {"id": record["id"], **({} if image is None else {"image": image}), role: record["question"]}
    row["suffix"] = answers[0] if len(answers) == 1 else answers
    if record["rejected"]:
        row["rejected"] = record["rejected"]
    if not record["equally_right"]:
        row |= {"equally_right": False} | {name: record[name] for name in ANNOTATED if record[name]}
    extra = json.loads(record["extra"]) if record["extra"] else {}
    if taken := sorted({*ROLES, *(ANNOTATED if not record["equally_right"] else ())} & extra.keys()):
        raise ValueError(
            f"example {record['id']}: beside what --columns names it has {', '.join(taken)}, which would be taken for "
            "that: rename the column in the source"
        )
    return row | extra


def columns_argument(text: str) -> dict[str, str]:
    """`question=query,suffix=label` for `argparse`."""
    pairs = [part.split("=", 1) for part in text.split(",")]
    if wrong := [pair for pair in pairs if len(pair) < 2 or pair[0] not in ROLES or not pair[1]]:
        expected = f"expected ROLE=NAME with {', '.join(ROLES)} as role, such as question=query"
        raise argparse.ArgumentTypeError(f"{'='.join(wrong[0])!r}: {expected}")
    return dict(pairs)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source_and_output(parser)
    parser.add_argument("--to", choices=["jsonl"], default="jsonl", help="what to write (default: %(default)s)")
    return parser.parse_intermixed_args(argv)


def add_source_and_output(parser: argparse.ArgumentParser) -> None:
    """IN and OUT, and the options that say what IN is; `source_of` reads them."""
    parser.add_argument("source", metavar="IN", nargs="?", type=path_argument, help="a file or folder")
    parser.add_argument("output", metavar="OUT", type=path_argument, help="the file to write")
    for key in TABLES:
        parser.add_argument(f"--{key}", type=path_argument, help=f"instead of IN: read it as {key}")
    parser.add_argument("--hub", metavar="OWNER/NAME", help="instead of IN: a data set on the Hugging Face Hub")
    parser.add_argument("--questions", type=path_argument, help="instead of IN: the official questions file")
    parser.add_argument("--annotations", type=path_argument, help="with --questions: the official annotations file")
    parser.add_argument("--images", type=path_argument, metavar="DIR", help="folder of the images, if not IN's own")
    parser.add_argument(
        "--columns", type=columns_argument, metavar="ROLE=NAME,...", help="other names of columns: question=query"
    )
    parser.add_argument("--text-rows", action="store_true", default=None, help="allow rows of text without an image")
    parser.add_argument("--split", help="of a data set with several, or train2014 where official files do not say it")
    parser.add_argument("--subset", help="of a data set on the Hub with several configurations")
    parser.add_argument("--revision", help="branch, tag or commit of a data set on the Hub")


def source_of(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load_records`; a line says as what IN is read.

    Raises:
        ValueError: not one source is given, or it cannot be told what IN is.
    """
    keys = [key for key in (*TABLES, HUB, "questions") if getattr(given, key) is not None]
    if len(keys) + (given.source is not None) != 1:
        got = ", ".join([*([str(given.source)] if given.source else []), *(f"--{key}" for key in keys)]) or "none"
        raise ValueError(f"expected one source, IN or one of the options that name one, got {got}")
    names = (*TABLES, HUB, *OFFICIAL, "images", "columns", "split", "subset", "revision", "text_rows")
    source = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.source is not None:
        key = kind_of(given.source)
        print(f"{given.source} is read as {key}")
        source[key] = given.source
    return source


def shown_path(path: Path) -> Path:
    """A path as a person would write it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    report(convert(source_of(given), given.output), "examples", given.output)


def report(converted: Converted, what: str, output: Path) -> None:
    """Say what was written, and end with `SKIPPED` where rows cannot be used."""
    for name, reason in converted.skipped.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    if converted.skipped:
        print(f"{len(converted.skipped):,} rows cannot be used and were skipped", file=sys.stderr)
    images = f", images: {shown_path(converted.images)}" if converted.images else ""
    images += ", text_rows: true" if converted.text_rows else ""
    print(f"{converted.count:,} {what} written; read them with train: {{jsonl: {output}{images}}}")
    if converted.skipped:
        sys.exit(SKIPPED)


if __name__ == "__main__":
    sys.exit(run(main))
