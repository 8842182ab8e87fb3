"""VQAv2 (arXiv 1612.00837) from its official files to records (data/records.py).

    v2_OpenEnded_mscoco_{split}_questions.json   "questions": [{question_id, image_id, question}, ...]
    v2_mscoco_{split}_annotations.json           "annotations": [{question_id, image_id, answers: [{answer}, ...],
                                                  multiple_choice_answer, answer_type, question_type}, ...]
    images/COCO_{split}_{image_id:012d}.jpg      or images/{split}/COCO_...
    images/{image_id}.jpg                        where ids are texts such as 003a8ae2ef43b901, as TextVQA has them

Each may be compressed by gzip (.json.gz).

The training annotations are 380 MB of JSON and several times that as Python objects, so files are read object by
object: once for where each stands, once more for those that were chosen. `json.load` takes 866 MiB for them. ijson
reads them as fast in less code, but replaces half a surrogate pair by "?" silently, does not say at which byte a file
is broken, and would be one more dependency. Not here: scoring (finetune/evaluation/vqa_accuracy.py).
"""

import codecs
import gzip
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.invalid import InvalidRecord
from data.processor import single_line

CHUNK = 1 << 12  # bytes decoded at once, more where an object is longer
LONGEST = 1 << 24  # bytes of one object; a file with a longer one is taken as broken
GZIP = b"\x1f\x8b"  # what a compressed file begins with
IMAGE_NAME = re.compile(r"\w[\w.-]*")  # what an image may be named by: nothing that leads out of its folder
OPTIONAL = {"answer": "multiple_choice_answer", "answer_type": "answer_type", "question_type": "question_type"}


def read_vqav2(
    files: list[Path], folder: Path | None, prompt: str, split: str | None, choose: Callable[[Sequence[int]], list[int]]
) -> Iterator[dict[str, Any] | InvalidRecord]:
    """Records of the questions at the positions that `choose` takes from all questions' image ids, in file order; what
    is wrong with one of them in its place.

    `files` are the questions and, where there are any, the annotations; `folder` is where the images are, or a folder
    of the split's name with them, or None where they need not exist. ValueError if a file is not what it should be as
    a whole, if the files are of two splits, or if the prompt has no {question}.
    """
    if "{question}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}; expected one with {{question}} where the question goes")
    questions = ObjectList(files[0], "questions")
    annotations = ObjectList(files[1], "annotations") if files[1:] else None
    said = questions.splits | (annotations.splits if annotations else {})
    if not split and (any(said.values()) or not questions.has_named_images):
        split = _one_split(said)
    if folder is not None and split and (folder / split).is_dir():
        folder = folder / split
    for position in choose(questions.image_ids.tolist()):
        image_id = str(questions.image_ids[position])
        id = str(questions.ids[position])
        try:
            one = questions.only(position)
            question = one.get("question")
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"{questions.path}: expected a text as question, got {question!r:.200}")
            if questions.has_named_images:
                image_id = _image_name(one["image_id"], questions.path)
            answered = _answers(annotations, questions, position) if annotations else {"answers": []}
        except ValueError as error:
            yield InvalidRecord(id, str(error))
            continue
        name = image_id if questions.has_named_images else f"COCO_{split}_{int(image_id):012d}"
        yield {
            "id": id,
            "image": os.path.join(folder or "", f"{name}.jpg"),  # no Path: each would be interned
            "image_id": image_id,
            "question": question,
            "prefix": single_line(prompt.replace("{question}", question)),
            "equally_right": False,
            **answered,
        }


def _one_split(said: Mapping[str, str | None]) -> str:
    """The one by which images are named, if all agree; questions of test-dev2015 are about those of test2015."""
    named = {what: split.replace("-dev", "") for what, split in said.items() if split}
    splits = set(named.values())
    if not splits:
        raise ValueError(
            f"expected a split such as train2014, by which images are named, in the {' or in the '.join(said)}; name "
            "the files as the official ones are named, or add data_subtype to them"
        )
    if len(splits) > 1:
        found = ", ".join(f"{split} (by the {what})" for what, split in named.items())
        raise ValueError(
            f"expected files of one split, found {found}; give files that belong together, or correct the name or "
            "data_subtype that is wrong"
        )
    return splits.pop()


def _answers(annotations: "ObjectList", questions: "ObjectList", position: int) -> dict[str, Any]:
    """The columns that a question's annotation fills; some files have nothing but the answers."""
    place = annotations.find(questions.ids[position])
    if place is None:
        raise ValueError(f"{annotations.path} has no annotation for it; give the two files that belong together")
    if annotations.image_ids[place] != questions.image_ids[position]:
        raise ValueError(f"{annotations.path} has another image_id for it; give the two files that belong together")
    annotation = annotations.only(place)
    try:
        answers = [answer["answer"] for answer in annotation["answers"]]
        if {str} != set(map(type, answers)):
            raise TypeError("no texts")
    except (KeyError, TypeError) as error:
        wanted = f'expected answers like [{{"answer": "yes"}}] in {annotation!r:.200}'
        raise ValueError(f"{annotations.path}: {wanted}") from error
    given = {column: annotation[key] for column, key in OPTIONAL.items() if annotation.get(key) is not None}
    return {"answers": answers} | given


class ObjectList:
    """The objects of a list in a JSON file, read one by one: 32 bytes of memory for each.

    `ids` and `image_ids` are i64[N]; of ids of images that are texts, which is what `has_named_images` says, these are
    the digests. `splits` maps what says whose images they are about to what it says, or None.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.has_named_images = path, False
        self._content = mapped(path)
        within = re.search(rb'"data_subtype"\s*:\s*"([^"]+)"', self._content)
        named = re.search(r"_((?:train|val|test)(?:-dev)?\d{4})_", path.name)
        self.splits = {f"data_subtype of {path}": within and within[1].decode(), f"name of {path}": named and named[1]}
        rows = np.fromiter(self._walk(name), np.dtype((np.int64, 4)))
        if not len(rows):
            raise ValueError(f"{path} holds no {name}; expected one object for each question")
        self.ids, self.image_ids, self._offsets, self._lengths = rows.T
        self._order = np.argsort(self.ids)
        self._sorted = self.ids[self._order]
        distinct, counts = np.unique(self.ids, return_counts=True)
        self._repeated = dict(zip(distinct[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True))

    def find(self, question_id: int) -> int | None:
        """The position of an object of this question."""
        place = self._sorted.searchsorted(question_id)
        return int(self._order[place]) if place < len(self.ids) and self._sorted[place] == question_id else None

    def only(self, position: int) -> dict[str, Any]:
        """The object at a position. ValueError if it is not the only one of its question."""
        offset, question_id = int(self._offsets[position]), int(self.ids[position])
        if count := self._repeated.get(question_id):
            raise ValueError(f"{self.path} holds {count} objects of question {question_id}; expected one for each")
        return json.loads(str(self._content[offset : offset + int(self._lengths[position])], "utf-8"))

    def _walk(self, name: str) -> Iterator[tuple[int, int, int, int]]:
        """(question_id, image_id, byte offset, byte length) of the objects in the list `name`."""
        begin = re.search(rb'"%s"\s*:\s*\[' % name.encode(), self._content)
        if begin is None:
            raise ValueError(f'{self.path} has no list "{name}"; give the official file of {name}')
        offset, size, decode = begin.end(), CHUNK, json.JSONDecoder().raw_decode
        while True:
            chunk = self._content[offset : offset + size]
            content = chunk.lstrip(b" \t\r\n,")
            if content.startswith(b"]"):
                return
            offset += len(chunk) - len(content)
            try:
                text, _ = codecs.utf_8_decode(content, "strict", False)
                value, end = decode(text)
            except (ValueError, RecursionError) as error:  # it continues after this chunk, or the file is broken
                if len(chunk) < size or size > LONGEST:
                    raise ValueError(f"{self.path} is cut off or no JSON at byte {offset:,}: {error}") from error
                size *= 2
                continue
            length = len(text[:end].encode())
            yield _whole_number(value, "question_id", self.path), self._image_number(value), offset, length
            offset, size = offset + length, CHUNK

    def _image_number(self, value: Any) -> int:
        """The id of an object's image; of one that is a text a number below 0 that stands for it."""
        given = value.get("image_id") if isinstance(value, dict) else None
        if not isinstance(given, str) or given.isdecimal():
            return _whole_number(value, "image_id", self.path)
        self.has_named_images = True
        digest = hashlib.blake2b(_image_name(given, self.path).encode(), digest_size=8).digest()
        return -1 - (int.from_bytes(digest) >> 1)


def mapped(path: Path) -> mmap.mmap:
    """What a file holds, decompressed onto the disk where it is compressed, and not in memory."""
    with path.open("rb") as file:
        if file.read(2) != GZIP:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with tempfile.TemporaryFile() as content:  # gone from the disk once the map is
        try:
            with gzip.open(path) as compressed:
                shutil.copyfileobj(compressed, content, CHUNK << 8)
            content.flush()
            return mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:  # the last of an empty one
            raise ValueError(f"{path} cannot be decompressed: {error}; copy or download it again") from error


def _image_name(given: Any, path: Path) -> str:
    """The id of an image whose file is named by it."""
    name = str(given) if isinstance(given, int) else given
    if isinstance(name, str) and IMAGE_NAME.fullmatch(name):
        return name
    raise ValueError(f"{path}: expected image_id to be a number, or a name without /, got {given!r:.200}")


def _whole_number(value: Any, key: str, path: Path) -> int:
    number = value.get(key) if isinstance(value, dict) else None
    if isinstance(number, str) and number.isdecimal() and len(number) < 20:  # met in real files
        number = int(number)
    if isinstance(number, int) and abs(number) < 2**63:
        return number
    raise ValueError(f"{path}: expected a whole number as {key} in {value!r:.200}")
