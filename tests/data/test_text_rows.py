"""Rows of text alone: allowed where a source says so, in every kind of table, and taken for themselves by all that goes
by images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from data import PaliGemmaDataset, Processor
from data.convert import main as convert
from data.invalid import SkippedRecords
from data.lengths import measure
from data.records import ImagesById, decodable, image_names, image_places, load_records
from data.splits import hold_out
from data.text_rows import names_image
from tests.images import IMAGE

BASE = Path(__file__).parents[2] / "assets/tiny-base"
PHOTO = {"image": "a.jpg", "prefix": "caption en", "suffix": "a logo"}
TEXT: dict[str, Any] = {"prefix": "2 + 2 =", "suffix": "4"}


def write(folder: Path, *rows: dict[str, Any], name: str = "train.jsonl") -> Path:
    (folder / "a.jpg").write_bytes(IMAGE)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> datasets.Dataset:
    return load_records(jsonl=write(folder, *rows), cache_dir=folder / "cache", **{"text_rows": True, **options})


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}, {"image": {"path": None, "bytes": None}}])
def test_a_row_without_an_image_is_a_record_without_one(tmp_path: Path, image: dict[str, Any]) -> None:
    photo, text, named = load(tmp_path, PHOTO, TEXT | image, TEXT | image | {"id": "mine"})
    assert photo["image_id"] == "a.jpg"
    assert (text["image"], text["prefix"], text["answers"], text["extra"]) == (None, "2 + 2 =", ["4"], "")
    assert [names_image(one["image_id"]) for one in (photo, text, named)] == [True, False, False]
    assert text["image_id"] != named["image_id"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (TEXT, r"line 2: it has no image; .*; or allow rows of text without an image, with text_rows: true"),
        (TEXT | {"image": None}, r"line 2: expected a path as image, got None; or allow rows .* text_rows: true"),
    ],
)
def test_without_the_key_it_is_an_error_that_names_it(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    source: dict[str, Any] = {"jsonl": write(tmp_path, PHOTO, row), "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match=said):
        load_records(**source)
    assert len(load_records(**source, text_rows=True)) == 2  # cached apart from what is read without the key


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            TEXT | {"prefix": "<image> 2 + 2 ="},
            "its text has <image>, and it has no image: give one, or remove the mark",
        ),
        (TEXT | {"image": "gone.jpg"}, r"gone\.jpg does not exist"),
        (TEXT | {"image": 7}, "expected a path as image, got 7"),
        ({"suffix": "4"}, "it has no question; expected"),
    ],
)
def test_what_is_no_row_of_text_stays_an_error(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(tmp_path, PHOTO, row)


def test_tables_of_every_kind_may_have_such_rows(tmp_path: Path) -> None:
    """A column may be missing, a cell empty, a value null; where `columns` names one for images, it must be there."""
    write(tmp_path, PHOTO, {"file_name": None, **TEXT}, name="metadata.jsonl")
    (tmp_path / "metadata.jsonl").write_text((tmp_path / "metadata.jsonl").read_text().replace("image", "file_name"))
    (tmp_path / "cells.csv").write_text("image,prefix,suffix\na.jpg,caption en,a logo\n,2 + 2 =,4\n")
    (tmp_path / "column.tsv").write_text("prefix\tsuffix\n2 + 2 =\t4\n")
    chats: list[dict[str, Any]] = [
        {"prompt": "<image>caption en", "completion": "a logo", "images": ["a.jpg"]},
        {"messages": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}], "images": []},
    ]
    write(tmp_path, *chats, name="chats.jsonl")
    rows = datasets.Dataset.from_list([PHOTO | {"image": {"bytes": IMAGE, "path": None}}, {"image": None, **TEXT}])
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    sources = {"folder": "", "csv": "cells.csv", "messages": "chats.jsonl", "parquet": "rows.parquet", "disk": "saved"}

    def texts_of(**source: Any) -> list[tuple[str, list[str]]]:
        records = decodable(load_records(**source, text_rows=True, cache_dir=tmp_path / "cache"))
        return [(one["prefix"], one["answers"]) for one in records if one["image"] is None]

    for key, name in sources.items():
        assert texts_of(**{key: tmp_path / name}) == [("2 + 2 =", ["4"])], key
    assert texts_of(tsv=tmp_path / "column.tsv") == [("2 + 2 =", ["4"])]
    with pytest.raises(ValueError, match=r"it has no photo; .*got nothing else$"):
        texts_of(tsv=tmp_path / "column.tsv", columns={"image": "photo"})


def test_sources_whose_rows_are_about_images_refuse_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_rows is for tables, not for official VQA files or COCO's JSON"):
        load_records(coco=tmp_path / "boxes.json", text_rows=True)


def test_no_two_records_share_what_stands_for_an_image(tmp_path: Path) -> None:
    """Of several sources, too: ids begin with the source's name there."""
    first = load(tmp_path, PHOTO, TEXT, TEXT, prefix_of_ids="first/")
    second = load(tmp_path, PHOTO, TEXT, prefix_of_ids="second/")
    ids = [*first["image_id"], *second["image_id"]]
    assert sorted(id for id in ids if names_image(id)) == ["a.jpg", "a.jpg"]
    assert len({id for id in ids if not names_image(id)}) == 3
    assert [name is None for name in image_names(image_places(first))] == [False, True, True]
    images = ImagesById(first)
    assert [images[id] is None for id in first["image_id"]] == [False, True, True]


def test_rows_are_drawn_and_held_out_one_by_one(tmp_path: Path) -> None:
    rows = [PHOTO | {"prefix": f"p {i}"} for i in range(5)] + [TEXT | {"prefix": f"t {i}"} for i in range(39)]
    assert len(load(tmp_path, *rows, fraction=0.5, seed=1)) in range(20, 25)  # of 40 images and texts, one with 5 rows
    found = hold_out({"all": load(tmp_path, *rows)}, seed=0)["all"]
    assert len(set(found.validation["image_id"])) == 4
    assert not set(found.validation["image_id"]) & set(found.train["image_id"])


def test_locations_in_a_text_alone_stay_as_they_are(tmp_path: Path) -> None:
    box = "<loc0000><loc0000><loc1023><loc1023> x"
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    wide = PHOTO | {"image": "wide.png", "suffix": box}
    photo, text = load(tmp_path, wide, TEXT | {"suffix": box}, aspect="pad")
    assert photo["answer"] != box
    assert text["answer"] == box


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BASE)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], skipped: int) -> bool:
    return all(ours[name].tolist() == tensor[skipped:].tolist() for name, tensor in theirs.items())


def test_a_row_of_text_is_that_of_an_image_without_image_tokens(processor: Processor) -> None:
    count = processor.num_image_tokens
    assert count > 0
    of_text = processor.encode("2 + 2 =", "4", image=False)
    assert of_text["input_ids"][0] == processor.bos_id
    assert of_text["input_ids"][-1] == processor.eos_id
    assert equal(of_text, processor.encode("2 + 2 =", "4"), count)
    several = processor.encode_suffixes("2 + 2 =", ["4", "four"], [0.5, 0.5], image=False)
    assert equal(several, processor.encode_suffixes("2 + 2 =", ["4", "four"], [0.5, 0.5]), count)


@pytest.mark.parametrize("answers", ["rotate", "majority", "all"])
def test_an_example_of_text_has_no_pixels(tmp_path: Path, processor: Processor, answers: Any) -> None:
    records = load(tmp_path, PHOTO, TEXT | {"suffix": ["4", "four"]})
    photo, text = (PaliGemmaDataset(records, processor, answers)[i] for i in range(2))
    assert "pixel_values" in photo
    assert set(text) == set(photo) - {"pixel_values"}
    assert processor.image_token_id not in text["input_ids"]
    assert len(text["input_ids"]) == len(text["labels"]) == len(text["token_type_ids"])


def test_lengths_are_those_of_the_texts_and_answers_are_cut_alike(tmp_path: Path) -> None:
    rows = [TEXT | {"suffix": "four is what it comes to"}]
    processor = Processor.from_pretrained(BASE, max_text_tokens=14, truncate_answers=True)
    of_text = load(tmp_path, *rows)
    of_photo = load(tmp_path, *(row | {"image": "a.jpg"} for row in rows))
    found, expected = (measure(records, processor, "rotate", tmp_path) for records in (of_text, of_photo))
    assert found.cut == 1
    assert found.longest == expected.longest
    assert np.array_equal(found.answer, expected.answer)
    example = PaliGemmaDataset(of_text, processor)[0]
    assert len(example["input_ids"]) == 1 + found.longest.text


def test_converted_rows_of_text_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path, PHOTO, TEXT), tmp_path / "out.jsonl"
    convert([str(file), "--text-rows", "--to", "jsonl", str(out)])
    assert f"2 examples written; read them with train: {{jsonl: {out}, text_rows: true}}" in capsys.readouterr().out
    assert json.loads(out.read_text().splitlines()[1]) == {"id": "2", **TEXT}
    read = [load_records(jsonl=path, text_rows=True, cache_dir=tmp_path / "cache").to_list() for path in (file, out)]
    assert read[0] == read[1]


def test_they_count_among_what_may_be_skipped(tmp_path: Path) -> None:
    skipped = SkippedRecords(share=0.5)
    assert load(tmp_path, PHOTO, TEXT, text_rows=False, skipped=skipped)["id"] == ["1"]
    assert len(skipped.reasons) == 1
