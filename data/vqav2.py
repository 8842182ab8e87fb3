"""VQAv2 (arXiv 1612.00837) from its official files to records (data/records.py).

    v2_OpenEnded_mscoco_{split}_questions.json   "questions": [{question_id, image_id, question}, ...]
    v2_mscoco_{split}_annotations.json           "annotations": [{question_id, image_id, answers: [{answer}, ...],
                                                  multiple_choice_answer, answer_type, question_type}, ...]
    images/COCO_{split}_{image_id:012d}.jpg      or images/{split}/COCO_...

The training annotations are 380 MB of JSON and several times that as Python objects, so files are read object by
object: once for where each stands, once more for those that were chosen. Not here: scoring (finetune/vqa_accuracy.py).
"""

import codecs
import json
import mmap
import os
import re
from array import array
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from data.processor import single_line
from data.records import Selection, majority, memory_mapped, require_pictures

CHUNK = 1 << 16  # bytes decoded at once, more where an object is longer
LONGEST = 1 << 24  # bytes of one object; beyond, the file is taken as broken
SEPARATORS = frozenset(" \t\r\n,")
UNANSWERED = {"answers": [], "answer": "", "answer_type": "", "question_type": ""}


def load_vqav2(
    questions: str | PathLike[str],
    annotations: str | PathLike[str] | None,
    images: str | PathLike[str] | None,
    *,
    prompt: str = "answer en {question}",
    fraction: float | None = None,
    count: int | None = None,
    sample_by: Literal["image", "question"] = "image",
    seed: int = 0,
    split: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> datasets.Dataset:
    """Records of the chosen questions, in the order of the file.

    Args:
        questions, annotations, images: as above; annotations may be None, and images where pictures are not needed.
        prompt: the prefix, with {question} where the question goes.
        fraction, count, seed: draw this share or number of the questions.
        sample_by: draw whole images with all their questions, or single questions.
        split: such as "train2014", where the files do not say it.
        cache_dir: where the records are kept for the next time, by default beside those of `datasets`.

    Raises:
        ValueError: the files contradict themselves, each other or the folder of images.
    """
    if "{question}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}; expected one with {{question}} where the question goes")
    selection = Selection(fraction, count, sample_by, seed)
    files = [Path(file) for file in (questions, annotations) if file is not None]
    folder = None if images is None else Path(images).absolute()
    options = ["vqav2", folder, prompt, split]
    rows = partial(_records, files, folder, prompt, split, selection)
    return memory_mapped(rows, files, options, selection, cache_dir)


def _records(
    files: list[Path], folder: Path | None, prompt: str, split: str | None, selection: Selection
) -> Iterator[dict[str, Any]]:
    questions = ObjectList(files[0], "questions", split)
    annotations = ObjectList(files[1], "annotations", split) if files[1:] else None
    where = _join(questions, annotations) if annotations else questions.ids
    if questions.split is None:
        raise ValueError(f"{questions.path} does not say its split, by which pictures are named; give one")
    chosen = selection.choose(questions.image_ids.tolist())
    name = f"COCO_{questions.split}_{{:012d}}.jpg".format
    if folder is not None:
        folder = folder / questions.split if (folder / questions.split).is_dir() else folder
        require_pictures(map(name, np.unique(questions.image_ids[chosen])), folder)
    for position in chosen:
        question, image_id = questions[position], int(questions.image_ids[position])
        if not isinstance(question.get("question"), str):
            raise ValueError(f"{questions.path}: expected a text as question in {question}")
        yield {
            "id": str(questions.ids[position]),
            "image": os.path.join(folder or "", name(image_id)),  # no Path: each would be interned
            "image_id": str(image_id),
            "question": question["question"],
            "prefix": single_line(prompt.replace("{question}", question["question"])),
            **(_answers(annotations, where[position]) if annotations else UNANSWERED),
        }


def _join(questions: "ObjectList", annotations: "ObjectList") -> np.ndarray:
    """The position of each question's annotation, i64[questions]."""
    if questions.split and annotations.split and questions.split != annotations.split:
        both = f"{questions.path} is of {questions.split}, {annotations.path} of {annotations.split}"
        raise ValueError(f"{both}; give two files of one split")
    order = np.argsort(annotations.ids)
    found = np.searchsorted(annotations.ids, questions.ids, sorter=order)
    where: np.ndarray = order[np.minimum(found, len(order) - 1)]
    for column, fault in (("ids", "no annotation"), ("image_ids", "another image_id")):
        differ = getattr(annotations, column)[where] != getattr(questions, column)
        if differ.any():
            which = f"{_some(questions.ids[differ])} of {questions.path}"
            raise ValueError(f"{annotations.path} has {fault} for {which}; give the two files that belong together")
    return where


def _answers(annotations: "ObjectList", position: int) -> dict[str, Any]:
    """The columns that an annotation fills; all but `answers` are missing in some files."""
    annotation = annotations[position]
    try:
        answers = [answer["answer"] for answer in annotation["answers"]]
        if {str} != set(map(type, answers)):
            raise TypeError("no texts")
    except (KeyError, TypeError) as error:
        wanted = f'expected answers like [{{"answer": "yes"}}] in {annotation!r:.200}'
        raise ValueError(f"{annotations.path}: {wanted}") from error
    top = annotation.get("multiple_choice_answer") or majority(answers)
    types = {name: annotation.get(name) or "" for name in ("answer_type", "question_type")}
    return {"answers": answers, "answer": top, **types}


class ObjectList:
    """The objects of a list in a JSON file, read one by one: 32 bytes of memory for each.

    `ids` and `image_ids` are i64[N]; `split` says whose pictures they are about, if anything does.
    """

    def __init__(self, path: Path, name: str, split: str | None) -> None:
        self.path = path
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.split = split or self._find_split()
        columns = [array("q") for _ in range(4)]
        for value, offset, length in self._walk(name):
            ids = (_whole_number(value, key, path) for key in ("question_id", "image_id"))
            for column, number in zip(columns, (*ids, offset, length), strict=True):
                column.append(number)
        self.ids, self.image_ids, self._offsets, self._lengths = map(np.array, columns)
        unique, counts = np.unique(self.ids, return_counts=True)
        if not len(unique) or counts.max() > 1:
            fault = f"{_some(unique[counts > 1])} more than once" if len(unique) else f"no {name}"
            raise ValueError(f"{path} holds {fault}; expected one object for each question")

    def __getitem__(self, position: int) -> dict[str, Any]:
        offset = self._offsets[position]
        value: dict[str, Any] = json.loads(self._content[offset : offset + self._lengths[position]])
        return value

    def _find_split(self) -> str | None:
        """What data_subtype or else the file's name says; test-dev2015 asks about pictures of test2015."""
        within = re.search(rb'"data_subtype"\s*:\s*"([^"]+)"', self._content)
        named = re.search(r"_((?:train|val|test)(?:-dev)?\d{4})_", self.path.name)
        found = [match.replace("-dev", "") for match in (within and within[1].decode(), named and named[1]) if match]
        if len(set(found)) > 1:
            raise ValueError(f"{self.path} is of {found[0]} by its data_subtype; rename it, or give the split")
        return found[0] if found else None

    def _walk(self, name: str) -> Iterator[tuple[Any, int, int]]:
        """(object, byte offset, byte length) of the objects in the list `name`."""
        begin = re.search(rb'"%s"\s*:\s*\[' % name.encode(), self._content)
        if begin is None:
            raise ValueError(f'{self.path} has no list "{name}"; give the official file of {name}')
        offset, size, decode = begin.end(), CHUNK, json.JSONDecoder().raw_decode
        while True:
            chunk = offset
            try:
                text, _ = codecs.utf_8_decode(self._content[chunk : chunk + size], "strict", False)
                at = 0
                while True:
                    start = at
                    while text[start : start + 1] in SEPARATORS:
                        start += 1
                    if text.startswith("]", start):
                        return
                    value, end = decode(text, start)
                    length = len(text[start:end].encode())
                    yield value, offset + start - at, length
                    at, offset = end, offset + start - at + length
            except ValueError as error:  # an object goes on after this chunk, or the file is broken
                if chunk + size >= len(self._content) or size > LONGEST:
                    raise ValueError(f"{self.path} is cut off or no JSON at byte {offset:,}: {error}") from error
            size = CHUNK if offset > chunk else 2 * size


def _whole_number(value: Any, key: str, path: Path) -> int:
    number = value.get(key) if isinstance(value, dict) else None
    if isinstance(number, int) or (isinstance(number, str) and number.isdecimal()):  # texts are met in real files
        return int(number)
    raise ValueError(f"{path}: expected a whole number as {key} in {value!r:.200}")


def _some(ids: np.ndarray) -> str:
    return f"{len(ids):,} questions ({', '.join(map(str, ids[:3]))}{', ...' if len(ids) > 3 else ''})"
