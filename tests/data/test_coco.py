"""COCO's detection and caption files become records; what is wrong with an annotation is said with file and id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.boxes import boxes_in
from data.invalid import SkippedRecords
from data.records import load_records
from data.sources.coco import contents_of
from finetune.config.load import load_config
from finetune.training.examples import open_records
from tests.images import encoded

CATEGORIES = [{"id": 3, "name": "zebra", "supercategory": "animal"}, {"id": 1, "name": "red  circle"}]
PROMPT = "detect zebra ; red circle"


def image(id: int, **changes: Any) -> dict[str, Any]:
    return {"id": id, "file_name": f"{id}.png", "width": 400, "height": 200, **changes}


def box(id: int, image_id: Any, bbox: Any, category_id: Any = 3, **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0, **more}


def write(folder: Path, images: list[Any], annotations: list[Any], **more: Any) -> Path:
    for number in range(1, 5):
        (folder / f"{number}.png").write_bytes(encoded(Image.new("RGB", (40, 20))))
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES, **more}))
    return file


def test_an_image_is_an_example_with_all_categories_in_its_prompt_and_its_boxes_as_answer(tmp_path: Path) -> None:
    annotations = [
        box(7, 2, [200, 100, 100, 50], 1, segmentation=[[1, 2]], area=5000),
        box(8, 2, [0, 0, 400, 200]),
        box(9, 2, [10, 10, 300, 100], iscrowd=1),
        box(4, 1, [390.5, -3, 20, 23.0]),  # partly outside
    ]
    file = write(tmp_path, [image(2), image(1), image(3)], annotations)
    records = load_records(coco=file, cache_dir=tmp_path / "cache")
    answers = [
        "<loc0000><loc0000><loc1023><loc1023> zebra ; <loc0512><loc0512><loc0767><loc0767> red circle",
        "<loc0000><loc0999><loc0102><loc1023> zebra",
        "",
    ]
    assert records["id"] == ["2", "1", "3"]
    assert records["image_id"] == ["2.png", "1.png", "3.png"]
    assert [value["path"] for value in records["image"]] == [str(tmp_path / f"{id}.png") for id in (2, 1, 3)]
    assert records["prefix"] == [PROMPT] * 3
    assert records["answers"] == [[answer] for answer in answers]
    assert records["answer"] == answers
    assert records["equally_right"] == [True] * 3
    assert records["extra"] == [""] * 3


def test_captions_are_equally_right_suffixes(tmp_path: Path) -> None:
    captions = [(5, 1, "A zebra. "), (6, 2, "Two dogs\n"), (7, 1, "The zebra.")]
    annotations = [{"id": id, "image_id": of, "caption": text} for id, of, text in captions]
    file = write(tmp_path, [image(1), {"id": 2, "file_name": "2.png"}], annotations, categories=[])
    records = load_records(coco=file, cache_dir=tmp_path / "cache")
    assert records["prefix"] == ["caption en"] * 2
    assert records["answers"] == [["A zebra.", "The zebra."], ["Two dogs"]]
    assert records["equally_right"] == [True] * 2
    file = write(tmp_path, [image(1), image(3)], annotations[:1])
    with pytest.raises(ValueError, match=r"instances\.json, entry 2: image 3 has no caption to learn"):
        load_records(coco=file, cache_dir=tmp_path / "cache")


def test_images_may_lie_elsewhere_and_some_be_drawn(tmp_path: Path) -> None:
    file = write(tmp_path, [image(id) for id in (1, 2, 3, 4)], [])
    (tmp_path / "images").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "images" / path.name)
    records = load_records(coco=file, images=tmp_path / "images", count=2, cache_dir=tmp_path / "cache")
    assert len(records) == 2
    assert records[0]["image"]["path"].startswith(str(tmp_path / "images"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (box(17, 2, [10, 10, 0, 5]), r"annotation 17 of image 2: Box.* has no area within an image of 400 x 200"),
        (box(17, 2, [400, 10, 5, 5]), r"annotation 17 of image 2: .*has no area within"),
        (box(17, 2, [10, 10, -5, 5]), r"annotation 17 of image 2: .*has no area within"),
        (box(17, 2, [1, 2, 3]), r"annotation 17 of image 2: expected a bbox \[x, y, width, height\] in pixels"),
        (box(17, 2, [1, 2, 3, float("nan")]), r"annotation 17 of image 2: expected a bbox"),
        (box(17, 2, [1, 2, 3, 10**400]), r"annotation 17 of image 2: expected a bbox"),
        (box(17, 2, [1, 2, 3, True]), r"annotation 17 of image 2: expected a bbox"),
        (box(17, 2, None), r"annotation 17 of image 2: expected a bbox"),
        (box(17, 2, [1, 2, 3, 4], 99), r"annotation 17 of image 2: category_id is 99, which is not among categories"),
        (box(17, 2, [1, 2, 3, 4], None), r"annotation 17 of image 2: category_id is None"),
    ],
    ids=repr,
)
def test_a_broken_annotation_is_named_and_its_image_skipped(tmp_path: Path, wrong: Any, message: str) -> None:
    file = write(tmp_path, [image(1), image(2)], [box(1, 1, [1, 2, 30, 40]), wrong])
    with pytest.raises(ValueError, match=rf"(?s)instances\.json, entry 2: {message}"):
        load_records(coco=file, cache_dir=tmp_path / "cache")
    skipped = SkippedRecords(share=0.5)
    assert load_records(coco=file, cache_dir=tmp_path / "cache", skipped=skipped)["id"] == ["1"]
    assert list(skipped.reasons) == [f"{file}, entry 2"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (box(17, 99, [1, 2, 3, 4]), "entry 2: annotation 17 is of image 99, which is not among images"),
        (box(17, None, [1, 2, 3, 4]), "entry 2: annotation 17 is of image None, which"),
        ([1], r"entry 2: expected an object as annotation, got \[1\] at place 2"),
    ],
    ids=repr,
)
def test_an_annotation_of_no_image_is_named(tmp_path: Path, wrong: Any, message: str) -> None:
    file = write(tmp_path, [image(1)], [box(1, 1, [1, 2, 30, 40]), wrong])
    with pytest.raises(ValueError, match=rf"instances\.json, {message}"):
        load_records(coco=file, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (image(1), "id '1' is that of entry 1 too"),
        (image(2, width=None), "image 2: expected width and height in pixels, got None and 200"),
        (image(2, height=0), "image 2: expected width and height in pixels, got 400 and 0"),
        (image(2, file_name=None), "expected a path as image, got None"),
        (image(2, file_name="../2.png"), "is no plain path"),
        ({"file_name": "2.png"}, "expected an image with a whole number as id"),
        ("2.png", "expected an image with a whole number as id"),
    ],
    ids=repr,
)
def test_a_broken_image_is_named(tmp_path: Path, wrong: Any, message: str) -> None:
    file = write(tmp_path, [image(1), wrong], [])
    with pytest.raises(ValueError, match=rf"instances\.json, entry 2: .*{message}"):
        load_records(coco=file, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"instances\.json is no JSON"),
        ("[]", "has no list of images: expected COCO's JSON, with images and annotations, got no object"),
        ('{"images": [1]}', "has no list of annotations: .* got the keys images"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [{"id": 1}], "annotations": []}', "has neither annotations nor categories"),
        (
            '{"images": [{"id": 1}], "annotations": [{"segments_info": []}]}',
            "a bbox or a caption, got one with segments",
        ),
        ('{"images": [{"id": 1}], "annotations": [{"bbox": []}]}', "has no list of categories"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a;b"}]}',
            "the name of category 1: 'a;b' cannot label a box",
        ),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}',
            "expected a category with an id of its own and a name",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "instances.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(coco=tmp_path / "instances.json", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "contents"),
    [
        ({"images": [], "annotations": [{"id": 1, "bbox": [1, 2, 3, 4]}, {"caption": "x"}]}, "boxes"),
        ({"annotations": [{"caption": 'a "bbox" : [', "id": 1}], "images": []}, "captions"),
        ({"images": [{"annotations": [{"text": "of another kind"}]}], "annotations": [{"caption": "a"}]}, "captions"),
        ({"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}, "boxes"),
        ({"images": [], "annotations": []}, None),
        ({"images": [], "annotations": [{"keypoints": []}]}, None),
        ({"images": []}, None),
        ([], None),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_what_a_file_holds_is_told_by_its_first_annotation(
    tmp_path: Path, content: Any, contents: str | None, indent: int | None
) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(content, indent=indent))
    assert contents_of(file) == contents


def test_what_is_no_json_holds_nothing(tmp_path: Path) -> None:
    for text in ("", "no JSON", '{"annotations": ['):
        (tmp_path / "file.json").write_text(text)
        assert contents_of(tmp_path / "file.json") is None
    assert contents_of(tmp_path / "missing.json") is None


def test_a_configuration_names_it_and_a_padding_network_gets_locations_of_the_square(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1)], [box(1, 1, [100, 50, 200, 100])])
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: google/paligemma-3b-pt-224}}\ndata: {{train: {{coco: '{file}'}}}}\n"
        f"train: {{max_steps: 1}}\noutput: '{tmp_path}/run'\n"
    )
    config = load_config(path)
    assert config.data.only("train").coco == str(file)
    assert config.data.only("train").paths == {"coco": str(file)}
    answer = open_records(config, "train")[0]["answer"]
    assert answer == "<loc0256><loc0256><loc0767><loc0767> zebra"
    (padded,) = open_records(load_config(path, ["image.aspect=pad"]), "train")["answers"][0]
    assert padded == "<loc0384><loc0256><loc0639><loc0767> zebra"
    (seen,) = boxes_in(padded, (400, 200), "pad")
    assert all(abs(a - b) < 0.4 for a, b in zip(seen[1:], (100, 50, 300, 150), strict=True))
    with pytest.raises(ValueError, match=r"expected either questions, images .*, or one of jsonl, .*coco"):
        load_config(path, ["data.train.jsonl=x.jsonl"])
