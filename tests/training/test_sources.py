"""The sources of a configuration, opened: one after the other, held out by image, with what cannot be used named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.invalid import SkippedRecords
from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.training.examples import drawn, in_turns, open_records, open_sources
from tests.config.minimal import MINIMAL


def lines(folder: Path, name: str, images: range, broken: int = 0) -> str:
    """A source in which each image has two records, and some lines are no examples."""
    for i in images:
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    rows: list[Any] = [{"image": f"{i}.png", "prefix": f"{name} {n}", "suffix": "x"} for i in images for n in range(2)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, *["no example"] * broken])
    (folder / f"{name}.jsonl").write_text(text)
    return f"{{jsonl: {folder}/{name}.jsonl}}"


def config_of(folder: Path, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(MINIMAL)
    return load_config(folder / "run.yaml", [f"output={folder}/run", *overrides])


def test_records_of_a_list_follow_each_other_and_have_ids_of_their_source(tmp_path: Path) -> None:
    first, second = lines(tmp_path, "ask", range(3)), lines(tmp_path, "tell", range(2, 4))
    config = config_of(tmp_path, f"data.train=[{first}, {second}]")
    assert [len(source) for source in open_sources(config, "train")] == [6, 4]
    records = open_records(config, "train")
    assert records["id"][:] == [*(f"ask/{n}" for n in range(1, 7)), *(f"tell/{n}" for n in range(1, 5))]
    assert records["prefix"][5:7] == ["ask 1", "tell 0"]
    assert records[6]["image"]["path"] == f"{tmp_path}/2.png"
    alone = config_of(tmp_path, f"data.train={second}")
    assert open_records(alone, "train")["id"][:] == ["1", "2", "3", "4"]


def test_auto_holds_out_images_that_no_source_trains_on(tmp_path: Path) -> None:
    first, second = lines(tmp_path, "ask", range(20)), lines(tmp_path, "tell", range(20))
    config = config_of(tmp_path, f"data.train=[{first}, {second}]", "data.validation=auto")
    train, validation = (open_sources(config, split) for split in ("train", "validation"))
    assert [len(source) for source in (*train, *validation)] == [36, 36, 4, 4]
    held, kept = ({image for source in of for image in source["image_id"][:]} for of in (validation, train))
    assert len(held) == 2
    assert not held & kept


def test_of_several_sources_each_is_asked_about() -> None:
    assert in_turns((5,), 3) == [0, 1, 2]
    assert in_turns((4, 1, 3), 7) == [0, 4, 5, 1, 6, 2, 7]


def test_a_selection_has_as_many_of_each_source_as_there_are(tmp_path: Path) -> None:
    large, small = lines(tmp_path, "large", range(40)), lines(tmp_path, "small", range(3))
    records = open_records(config_of(tmp_path, f"data.train=[{large}, {small}]"), "train")
    for count, of_small in ((4, 2), (20, 6)):
        some = drawn(records, (80, 6), count, seed=1)["id"][:]
        assert len(set(some)) == count
        assert sum(id.startswith("small/") for id in some) == of_small
    assert drawn(records, (80, 6), 20, seed=1)["id"][:] == some
    assert drawn(records, (80, 6), 20, seed=2)["id"][:] != some


def test_the_share_that_may_be_skipped_is_of_all_sources(tmp_path: Path) -> None:
    """Two of eight lines of a small source cannot be used: two of the 88 in all."""
    large, small = lines(tmp_path, "large", range(40)), lines(tmp_path, "small", range(3), broken=2)
    config = config_of(tmp_path, f"data.train=[{small}, {large}]", "data.on_error=skip", "data.skip_at_most=0.03")
    skipped = SkippedRecords(share=0.03)
    assert len(open_records(config, "train", skipped)) == 86
    assert list(skipped.reasons) == [f"{tmp_path}/small.jsonl, line {number}" for number in (7, 8)]
    with pytest.raises(ValueError, match=r"2 of 88 records cannot be used; .*:\n  [^:]*small\.jsonl, line 7: expected"):
        open_records(config, "train", SkippedRecords(share=0.01))


def test_a_source_of_which_nothing_can_be_used_says_why(tmp_path: Path) -> None:
    good, bad = lines(tmp_path, "good", range(3)), lines(tmp_path, "bad", range(0), broken=2)
    config = config_of(tmp_path, f"data.train=[{good}, {bad}]")
    with pytest.raises(ValueError, match=r"2 of 8 records cannot be used; .*:\n  [^:]*bad\.jsonl, line 1: expected"):
        open_records(config, "train")
