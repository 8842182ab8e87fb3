"""What a run learns from: wrong paths are said at once, and images that it is scored on, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets

from data.records import load_records
from finetune.config.load import load_config
from finetune.evaluation.run import evaluate_run
from finetune.run import learn
from finetune.training.examples import open_examples, open_processor, shared_images_note
from tests.test_scripts import base_with_scenes, files, overrides
from train import main

CONFIG = "configs/quickstart.yaml"


def test_a_wrong_path_is_said_before_a_run_is_compared_with_the_one_that_began(tmp_path: Path) -> None:
    base = base_with_scenes(tmp_path / "base")
    words = overrides(base, tmp_path / "run")
    learn(load_config(CONFIG, words), [])
    images = f"{files(base, 'val2014')['images']}"
    wrong = [*words, f"data.train.questions={base}/elsewhere", f"data.validation.images={images}s"]
    with pytest.raises(ValueError, match="does not exist") as raised:
        learn(load_config(CONFIG, wrong), [])
    assert str(raised.value).splitlines() == [
        f"data.train.questions: {base}/elsewhere does not exist",
        f"data.validation.images: {images}s does not exist; did you mean {images}?",
    ]
    with pytest.raises(ValueError, match=r"^data\.validation\.images: .* does not exist; did you mean .*\?$"):
        evaluate_run(load_config(CONFIG, wrong), [CONFIG])


def test_images_that_a_run_is_also_scored_on_are_counted(tmp_path: Path) -> None:
    """Each image once, however many questions it has, and of a selection those that are in it."""
    base = base_with_scenes(tmp_path / "base")
    places: Any = [files(base, split) for split in ("train2014", "val2014")]
    train, validation = (load_records(**place) for place in places)
    assert shared_images_note(train, validation) is None
    images = list(dict.fromkeys(train["image_id"][:]))
    few = train.filter(lambda image: image in images[:3], input_columns="image_id")
    said = shared_images_note(train, concatenate_datasets([few, validation]).shuffle(seed=1))
    assert said is not None
    assert said.startswith("3 of the 15 images of data.validation are in data.train too: ")
    without = train.filter(lambda image: image not in images[:3], input_columns="image_id")
    assert shared_images_note(without, few) is None


def test_a_run_that_is_scored_on_its_own_images_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_with_scenes(tmp_path / "base")
    words = overrides(base, tmp_path / "run")
    said = "warning: 12 of the 12 images of data.validation are in data.train too"
    main([CONFIG, *words, "--check"])
    assert said not in capsys.readouterr().out
    words.append(f"data.validation={json.dumps(files(base, 'train2014'))}")
    main([CONFIG, *words, "--check"])
    assert said in capsys.readouterr().out
    main([CONFIG, *words, "evaluation.count=null"])
    assert said in capsys.readouterr().out


def test_locations_and_a_checkpoint_that_pads_need_the_configuration_to_say_so(tmp_path: Path) -> None:
    base = base_with_scenes(tmp_path / "base")
    (image, *_) = sorted((base / "data/images").iterdir())
    line = {"image": str(image), "prefix": "detect cat", "suffix": "<loc0000><loc0000><loc0512><loc0512> cat"}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(line))
    source = json.dumps({"jsonl": str(tmp_path / "boxes.jsonl"), "images": "/"})
    words = [*overrides(base, tmp_path / "run"), f"data.train={source}"]
    plain, padded = load_config(CONFIG, words), load_config(CONFIG, [*words, "image.aspect=pad"])
    processor = open_processor(base, padded)  # as where the checkpoint's own config.json says pad
    assert len(open_examples(padded, "train", processor).records) == 1
    with pytest.raises(ValueError, match=r"data\.train has locations such as <loc0000>, and .*base pads its images"):
        open_examples(plain, "train", processor)
    (tmp_path / "boxes.jsonl").write_text(json.dumps({**line, "suffix": "no box"}))
    assert len(open_examples(plain, "train", processor).records) == 1
