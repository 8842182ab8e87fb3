"""Questions to begin with, from what a run was validated on; and the same as files, beside an exported page."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.images import suffix_of
from data.records import cache_folder
from finetune.config.load import load_config
from finetune.training.examples import open_records, skipped_records

FILE = "examples.json"
COUNT = 8
QUESTION = "{question}"  # the prompt of a question that is a whole prompt itself


class Example(NamedTuple):
    """A question about an image; prompt: with {question} where the question goes."""

    image: Path
    question: str
    prompt: str


def examples_of(run: Path, count: int = COUNT, seed: int = 0) -> list[Example]:
    """Questions drawn from a run's validation records, each of another image, for the page asks about images; none of
    an adapter without its run, or of a run without such records.

    Raises:
        ValueError: the configuration or the records cannot be read, or are no longer there.
    """
    if not (run / "config.yaml").is_file():
        return []
    config = load_config(run / "config.yaml")
    if config.data.validation is None:
        return []
    records = open_records(config, "validation", skipped_records(config, "validation", listed=False))
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    found: dict[str, Example] = {}
    for i in order:
        if len(found) == count:
            break
        record = records[i]
        if record["image"] is not None and (path := image_file(record["image"], record["image_id"])):
            found[record["image_id"]] = example(path, record["question"], record["prefix"], config.data.prompt)
    return list(found.values())


def image_file(image: Mapping[str, Any], digest: str) -> Path | None:
    """The file of an image, which is written into the cache where a record holds its bytes; None where there is no such
    image. digest: of the bytes.
    """
    if image["bytes"] is None:
        path = Path(image["path"])
        return path if path.is_file() else None
    try:
        path = cache_folder(None) / "examples" / f"{digest}{suffix_of(image)}"
    except ValueError:
        return None
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_bytes(image["bytes"])
    return path


def example(image: Path, question: str, prefix: str, prompt: str) -> Example:
    """Question and prompt apart where the prefix is made of them, else the prefix as the question."""
    if question and prompt.replace(QUESTION, question) == prefix:
        return Example(image, question, prompt)
    return Example(image, prefix, QUESTION)


def write_examples(examples: Sequence[Example], directory: Path) -> None:
    """Copy the images, and list the questions, in a new directory."""
    directory.mkdir()
    lines = []
    for number, one in enumerate(examples):
        name = f"{number}{one.image.suffix.lower()}"
        shutil.copyfile(one.image, directory / name)
        lines.append({"image": name, "question": one.question, "prompt": one.prompt})
    (directory / FILE).write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_examples(directory: Path) -> list[Example]:
    """What `write_examples` wrote. ValueError where it cannot be read."""
    file = directory / FILE
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
        return [Example(directory / line["image"], line["question"], line["prompt"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}): export the page again") from error
