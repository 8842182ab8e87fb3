"""A person's own examples, one JSON object a line -> records (data/records.py).

    {"image": "scene.jpg", "prefix": "caption en", "suffix": "a red circle"}

`suffix` may be a list of answers that are equally right. `id` may name the example, else its line's number does.
"""

import json
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import datasets

from data.processor import single_line
from data.records import Selection, majority, memory_mapped, require_pictures


def load_jsonl(
    path: str | PathLike[str],
    *,
    images: str | PathLike[str] | None = None,
    fraction: float | None = None,
    count: int | None = None,
    sample_by: Literal["image", "question"] = "image",
    seed: int = 0,
    cache_dir: str | PathLike[str] | None = None,
) -> datasets.Dataset:
    """Records of the chosen lines, in the order of the file.

    Args:
        path: the file of lines.
        images: the folder that holds the pictures, by default the file's own; links and paths out of it are refused.
        fraction, count, sample_by, seed, cache_dir: as for `load_vqav2`.

    Raises:
        ValueError: a line is no example, with file and line; an id occurs twice; pictures are missing.
    """
    file = Path(path)
    folder = (Path(images) if images else file.parent).absolute()
    selection = Selection(fraction, count, sample_by, seed)
    rows = partial(_records, file, folder, selection)
    return memory_mapped(rows, [file], ["jsonl", folder.resolve()], selection, cache_dir)


def _records(file: Path, folder: Path, selection: Selection) -> Iterator[dict[str, Any]]:
    image_ids = [example["image_id"] for example in _examples(file, folder)]
    if not image_ids:
        raise ValueError(f"{file} holds no examples; expected one JSON object a line")
    chosen = set(selection.choose(image_ids))
    require_pictures(dict.fromkeys(image_ids[position] for position in sorted(chosen)), folder)
    return (example for position, example in enumerate(_examples(file, folder)) if position in chosen)


def _examples(file: Path, folder: Path) -> Iterator[dict[str, Any]]:
    lines: dict[str, int] = {}
    with file.open("rb") as content:
        for number, line in enumerate(content, start=1):
            if not line.strip():
                continue
            try:
                example = _example(json.loads(line), number, folder)
                first = lines.setdefault(example["id"], number)
                if first != number:
                    raise ValueError(f"id {example['id']!r} is that of line {first} too; give each line its own")
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            yield example


def _example(line: Any, number: int, folder: Path) -> dict[str, Any]:
    if not isinstance(line, dict) or set(line) - {"id"} != {"image", "prefix", "suffix"}:
        raise ValueError(f'expected {{"image": ..., "prefix": ..., "suffix": ...}} and perhaps "id", got {line!r:.200}')
    answers = line["suffix"] if isinstance(line["suffix"], list) else [line["suffix"]]
    if not all(isinstance(text, str) for text in (line["image"], line["prefix"], *answers)):
        raise ValueError(f"expected texts as image, prefix and suffix, got {line!r:.200}")
    if not (answers and line["image"] and all(answer.strip() for answer in answers)):
        raise ValueError(f"expected an image and at least one suffix, none of them empty, got {line!r:.200}")
    if not isinstance(line.get("id", ""), str | int):
        raise ValueError(f"expected a text or a whole number as id, got {line['id']!r}")
    image = Path(line["image"])
    path = folder / image
    if image.is_absolute() or ".." in image.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {line['image']!r} leads out of {folder}; give a path within it")
    return {
        "id": str(line.get("id", number)),
        "image": str(path),
        "image_id": image.as_posix(),
        "question": line["prefix"],
        "prefix": single_line(line["prefix"]),
        "answers": answers,
        "answer": majority(answers),
        "answer_type": "",
        "question_type": "",
    }
