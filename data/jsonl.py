"""A person's own examples, one JSON object a line -> records (data/records.py).

    {"image": "scene.jpg", "prefix": "caption en", "suffix": "a red circle"}

`suffix` may be a list of answers that are equally right. `id` may name the example, else its line's number does.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.images import require_pictures
from data.processor import single_line


def read_jsonl(file: Path, folder: Path, choose: Callable[[Sequence[str]], list[int]]) -> Iterator[dict[str, Any]]:
    """Records of the lines at the positions that `choose` takes from all lines' image ids, in the order of the file.

    ValueError if a line is no example, with file and line, if an id occurs twice, or if an image is missing from the
    folder or leads out of it, by its path or by a link.
    """
    image_ids = [example["image_id"] for example in _examples(file, folder)]
    if not image_ids:
        raise ValueError(f"{file} holds no examples; expected one JSON object a line")
    chosen = set(choose(image_ids))
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
    texts = (line["prefix"], line["image"], *answers)
    if not answers or not all(isinstance(text, str) for text in texts) or not all(map(str.strip, texts[1:])):
        raise ValueError(f"expected texts, of which only the prefix may be empty, got {line!r:.200}")
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
    }
