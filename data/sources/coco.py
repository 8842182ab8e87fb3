"""COCO's JSON (arXiv 1405.0312), of detection or of captions, as rows (rows.py): one image, one example.

    {"images": [{"id", "file_name", "width", "height"}, ...],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}, ...],
     "categories": [{"id", "name"}, ...]}
    {"images": [{"id", "file_name"}, ...], "annotations": [{"id", "image_id", "caption"}, ...]}

Detection: the prefix asks for all categories of the file, in its order (`detect cat ; dog`), of every image, and the
suffix has a box for each object (data/boxes.py), in that order. So the prompt does not give away what is in an image, a
category that is not there is answered by nothing, and an image without objects has the empty suffix: absence is
learned, and a network is asked in training as it is asked later. For few categories at a time, make a file with those.
Objects marked `iscrowd` stand for a crowd, not for one box, and are left out. A bbox is in pixels of an image of the
width and height that the file states.

Captions: the prefix is `caption en`, and the captions of an image are its suffixes, equally right.

The file is read at once, into memory. Not here: keypoints, masks and panoptic segments.
"""

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard

from data.boxes import Box, boxes_text, require_label
from data.files import require_file
from data.sources.rows import Table

CAPTION_PROMPT = "caption en"
ANNOTATIONS = re.compile(rb'"annotations"\s*:\s*\[\s*')
LONGEST = 1 << 20  # bytes of an annotation, which may have the outline of an object


def coco(file: Path, folder: Path | None) -> Table:
    """The images of a file. folder: where they are, by default that of the file; `file_name` is a path within."""
    require_file(file)

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        content = _content(file)
        about, lost = _by_image(content)
        has_boxes = _has_boxes(content, file)
        names = _names(content, file) if has_boxes else {}
        for number, image in enumerate(content["images"], start=1):
            try:
                annotations = about.get(_image_id(image), [])
                row = _detection(image, annotations, names) if has_boxes else _captions(image, annotations)
            except ValueError as error:
                yield number, error
            else:
                yield number, row
        yield from enumerate(lost, start=len(content["images"]) + 1)

    return Table(str(file), "entry", rows, [file], folder or file.parent.absolute())


def contents_of(file: Path) -> Literal["boxes", "captions"] | None:
    """What the annotations of a file are, by the first of them: it is searched for, the file is not read as a whole.
    None where that does not tell; `coco` says what is wrong with such a file.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for match in ANNOTATIONS.finditer(content):
                begin = content[match.end() : match.end() + LONGEST].decode(errors="replace")
                if begin.startswith("]") and content.find(b'"categories"') >= 0:
                    return "boxes"
                first, _ = json.JSONDecoder().raw_decode(begin)
                if isinstance(first, dict) and {"caption", "bbox"} & first.keys():
                    return "captions" if "caption" in first else "boxes"
    except (OSError, ValueError, RecursionError):
        return None
    return None


def _content(file: Path) -> dict[str, Any]:
    """The file, with lists of images and annotations. ValueError where it is no such file."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}; expected COCO's, with images and annotations") from error
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            got = f"the keys {', '.join(map(str, content)) or '(none)'}" if isinstance(content, dict) else "no object"
            raise ValueError(
                f"{file} has no list of {key}: expected COCO's JSON, with images and annotations, got {got}"
            )
    if not content["images"]:
        raise ValueError(f"{file} lists no images; expected some in images")
    return content


def _has_boxes(content: Mapping[str, Any], file: Path) -> bool:
    """Whether the annotations are boxes, not captions; where there are none, by the categories."""
    first = next(iter(content["annotations"]), None)
    if not isinstance(first, dict):
        if first is None and not content.get("categories"):
            raise ValueError(f"{file} has neither annotations nor categories: expected boxes or captions of its images")
        return True
    if not {"caption", "bbox"} & first.keys():
        raise ValueError(f"{file}: expected annotations with a bbox or a caption, got one with {', '.join(first)}")
    return "caption" not in first


def _names(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    """The name of each category, by its id, in the order of the file. ValueError where one could not be asked for."""
    given = content.get("categories")
    if not isinstance(given, list) or not given:
        raise ValueError(f"{file} has no list of categories, which annotations with a bbox need: add it")
    names: dict[int, str] = {}
    for category in given:
        id, name = (category.get(key) if isinstance(category, dict) else None for key in ("id", "name"))
        if not _is_id(id) or not isinstance(name, str) or id in names:
            raise ValueError(f"{file}: expected a category with an id of its own and a name, got {category!r:.200}")
        try:
            names[id] = require_label(" ".join(name.split()))
        except ValueError as error:
            raise ValueError(f"{file}: the name of category {id}: {error}") from error
    return names


def _by_image(content: Mapping[str, Any]) -> tuple[dict[int, list[dict[str, Any]]], list[ValueError]]:
    """The annotations of each image, by its id; and what is wrong with those that are of none."""
    images = {image.get("id") for image in content["images"] if isinstance(image, dict) and _is_id(image.get("id"))}
    about: dict[int, list[dict[str, Any]]] = {}
    lost = []
    for number, annotation in enumerate(content["annotations"], start=1):
        if not isinstance(annotation, dict):
            lost.append(ValueError(f"expected an object as annotation, got {annotation!r:.200} at place {number}"))
        elif not _is_id(image := annotation.get("image_id")) or image not in images:
            lost.append(ValueError(f"{_called(annotation)} is of image {image!r}, which is not among images"))
        else:
            about.setdefault(image, []).append(annotation)
    return about, lost


def _detection(image: Mapping[str, Any], annotations: list[dict[str, Any]], names: Mapping[int, str]) -> dict[str, Any]:
    width, height = image.get("width"), image.get("height")
    if not (_is_id(width) and _is_id(height) and width > 0 and height > 0):
        raise ValueError(f"image {image['id']}: expected width and height in pixels, got {width!r} and {height!r}")
    size = (width, height)
    boxes = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            continue
        try:
            box = _box(annotation, names)
            boxes_text([box], size)  # here, where the annotation can be named
        except ValueError as error:
            raise ValueError(f"{_called(annotation)} of image {image['id']}: {error}") from error
        boxes.append(box)
    labels = list(dict.fromkeys(names.values()))
    return _row(image, f"detect {' ; '.join(labels)}", boxes_text(boxes, size, labels))


def _box(annotation: Mapping[str, Any], names: Mapping[int, str]) -> Box:
    category, given = annotation.get("category_id"), annotation.get("bbox")
    if not _is_id(category) or category not in names:
        raise ValueError(f"category_id is {category!r}, which is not among categories")
    if not isinstance(given, list) or len(given) != 4 or not all(map(_is_finite, given)):
        raise ValueError(f"expected a bbox [x, y, width, height] in pixels, got {given!r:.200}")
    x, y, width, height = given
    return Box(names[category], x, y, x + width, y + height)


def _captions(image: Mapping[str, Any], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    captions = []
    for annotation in annotations:
        caption = annotation.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{_called(annotation)} of image {image['id']}: expected a caption, got {caption!r:.200}")
        captions.append(caption.strip())
    if not captions:
        raise ValueError(f"image {image['id']} has no caption to learn: add one, or take the image out")
    return _row(image, CAPTION_PROMPT, captions)


def _row(image: Mapping[str, Any], prefix: str, suffix: str | list[str]) -> dict[str, Any]:
    return {"image": image.get("file_name"), "prefix": prefix, "suffix": suffix, "id": image["id"]}


def _image_id(image: Any) -> int:
    if not isinstance(image, dict) or not _is_id(image.get("id")):
        raise ValueError(f"expected an image with a whole number as id, got {image!r:.200}")
    return int(image["id"])


def _called(annotation: Mapping[str, Any]) -> str:
    return f"annotation {annotation.get('id', 'without id')}"


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
