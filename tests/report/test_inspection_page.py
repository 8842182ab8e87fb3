"""The page of `--inspect` shows what the network gets, escaped, in one file that needs nothing from outside."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from data.image_form import normalized
from finetune.config.schema import RunConfig
from finetune.preflight.inspection import Inspection, inspect_examples
from finetune.report.inspection_page import KINDS, inspect, mask_image, shown, unnormalized
from model.layers import prefix_lm_mask
from tests.images import encoded
from tests.preflight.small_run import BASE

HOSTILE = "<script>alert(1)</script> & \u202e"


def config_of(folder: Path, **changes: object) -> RunConfig:
    """A run on two examples of images with noise, of which the second one is longer."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8)
    (folder / "a.png").write_bytes(encoded(Image.fromarray(noise)))
    lines = [{"image": "a.png", "prefix": "caption en", "suffix": "two"}]
    lines += [{"image": "a.png", "prefix": f"answer en {HOSTILE}", "suffix": HOSTILE, "id": HOSTILE}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {
        "model": {"path": str(BASE), "dtype": "float32", "device": "cpu"},
        "data": {"train": {"jsonl": str(folder / "train.jsonl")}, "workers": 0},
        "train": {"max_steps": 4, "batch_size": 8},
        "output": str(folder / "run"),
    }
    return RunConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    return inspect_examples(config_of(tmp_path_factory.mktemp("inspected")))


def row_of(found: Inspection, id: str) -> int:
    return [example["id"] for example in found.examples].index(id)


def test_each_example_of_a_step_is_there_once(found: Inspection) -> None:
    """A step of eight takes two records several times."""
    assert sorted(example["id"] for example in found.examples) == ["1", HOSTILE]
    assert [check.name for check in found.checks if check.outcome == "fail"] == []


def test_every_token_is_there_with_its_id_and_its_label(found: Inspection) -> None:
    row = row_of(found, "1")
    one, processor = shown(found, row), found.processor
    assert [kind for kind, _ in one.tokens] == ["image", "prefix", "suffix", "padding"]
    by_kind = dict(one.tokens)
    ids = [token.id for _, tokens in one.tokens for token in tokens for _ in range(token.count)]
    assert ids == found.batch["input_ids"][row].tolist()
    assert [(token.id, token.count) for token in by_kind["image"]] == [(processor.image_token_id, 16)]
    assert [token.id for token in by_kind["prefix"]] == [processor.bos_id, *processor.prompt_ids("caption en")]
    assert by_kind["prefix"][-1].text == "\\n"
    assert [token.label for token in by_kind["suffix"]] == processor.answer_ids("two")
    assert {token.label for kind in ("image", "prefix", "padding") for token in by_kind[kind]} == {None}
    assert by_kind["suffix"][0].position == 16 + len(by_kind["prefix"])
    assert (one.prefix, one.suffix, one.length) == ("caption en", "two", ids.index(processor.pad_id))


def test_the_image_is_what_the_vision_tower_gets(found: Inspection) -> None:
    form = found.processor.pixel_form
    pixels = found.examples[0]["pixel_values"]
    image = unnormalized(pixels, form)
    assert normalized(image, form, pixels.shape[-1]).equal(pixels)


def test_tiles_and_padding_are_shown(tmp_path: Path) -> None:
    tiled = config_of(tmp_path, image={"tiles": 4, "aspect": "pad"})
    one = shown(inspect_examples(tiled), 0)
    assert len(one.images) == 5
    whole = Image.open(io.BytesIO(base64.b64decode(one.images[-1].partition(",")[2]))).convert("RGB")
    grey = np.asarray(whole)[: whole.height // 8]  # an image twice as wide as high, in the middle of a square
    assert abs(grey.astype(int) - 127).max() < 40


def test_the_mask_is_the_networks(found: Inspection) -> None:
    batch = found.batch
    expected = prefix_lm_mask(batch["attention_mask"], batch["token_type_ids"])[0, 0].numpy()
    kinds = [kind for kind, tokens in shown(found, 0).tokens for token in tokens for _ in range(token.count)]
    buffer = io.BytesIO()
    mask_image(expected, kinds).save(buffer, "PNG")
    pixels = np.asarray(Image.open(buffer).convert("RGBA"))
    assert np.array_equal(pixels[..., 3] > 0, expected)
    suffix = tuple(bytes.fromhex(KINDS["suffix"][1:]))
    colored = (pixels[..., :3] == suffix).all(-1) & expected
    assert np.array_equal(colored, expected & (np.array(kinds) == "suffix"))


def test_the_page_needs_nothing_from_outside_and_escapes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(config_of(tmp_path), tmp_path / "new/page.html")
    page = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    assert f"the same as a page, with images and every token: {tmp_path}/new/page.html" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert not re.findall(r"https?://|@import|url\(", page)


def test_examples_that_would_ruin_the_training_end_in_an_error_after_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr("finetune.preflight.inspection.leaks_of", lambda *_: [1])
    with pytest.raises(
        ValueError, match=r"would ruin the training:\n  fail: leak: the answer of row 1 leaks .*; do not"
    ):
        inspect(config)
    page = (tmp_path / "run/inspect.html").read_text(encoding="utf-8")
    assert "1 checks fail" in page
    assert "fail: leak" in capsys.readouterr().out


def test_page_without_inspect_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: x}\ndata: {train: {jsonl: x}}\ntrain: {epochs: 1}\noutput: x\n")
    with pytest.raises(ValueError, match="--page says where --inspect writes"):
        train.main([str(tmp_path / "run.yaml"), "--page", "x.html"])
