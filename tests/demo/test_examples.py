"""Questions to begin with: of the run's own validation set, as its prompt asks them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.synthetic import scenes
from finetune.config.load import dump_config, load_config
from finetune.demo.examples import Example, example, examples_of, read_examples, write_examples
from tests.demo.conftest import ROOT
from tests.images import encoded


def make_run(directory: Path, validation: dict[str, str], **data: str) -> Path:
    """A directory with the configuration of a run."""
    files = {"train": validation, "validation": validation} | data
    overrides = [f"data={json.dumps(files)}", f"output={directory}"]
    directory.mkdir()
    config = load_config(ROOT / "configs/quickstart.yaml", overrides)
    (directory / "config.yaml").write_text(dump_config(config))
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    scenes.write(tmp_path / "data", scenes=12, seed=2, split="val2014")
    files = {
        "questions": f"{tmp_path}/data/v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": f"{tmp_path}/data/v2_mscoco_val2014_annotations.json",
        "images": f"{tmp_path}/data/images",
    }
    return make_run(tmp_path / "run", files)


def test_examples_are_of_different_images_of_the_validation_set(run: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    found = examples_of(run, count=5)
    assert len(found) == len({one.image for one in found}) == 5
    questions = json.loads((run.parent / "data/v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    asked = {(int(one["image_id"]), one["question"]) for one in questions}
    assert all((int(one.image.stem.rsplit("_", 1)[1]), one.question) in asked for one in found)
    assert {one.prompt for one in found} == {"answer en {question}"}
    assert found == examples_of(run, count=5) != examples_of(run, count=5, seed=1)
    assert len(examples_of(run, count=100)) == 12
    assert sorted(path.name for path in run.iterdir()) == before


def test_questions_about_no_image_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    rows = [{"prefix": "2 + 2 =", "suffix": "4"}, {"image": "a.png", "prefix": "caption en", "suffix": "black"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files: Any = {"jsonl": f"{tmp_path}/rows.jsonl", "text_rows": True}
    assert [one.question for one in examples_of(make_run(tmp_path / "run", files))] == ["caption en"]


def test_a_prefix_that_is_no_question_is_asked_as_it_is(tmp_path: Path) -> None:
    assert example(tmp_path, "how many?", "answer en how many?", "answer en {question}").question == "how many?"
    assert example(tmp_path, "", "caption en", "answer en {question}") == Example(tmp_path, "caption en", "{question}")
    scenes.write(tmp_path / "data", scenes=3, seed=2, split="val2014")
    run = make_run(tmp_path / "run", {"jsonl": f"{tmp_path}/data/captions_val2014.jsonl"})
    found = examples_of(run)
    assert found
    assert all(one.question.startswith("caption en") and one.prompt == "{question}" for one in found)


def test_there_are_none_of_a_run_without_validation_records(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    text = re.sub(r"  validation:.*?(?=  prompt:)", "  validation: null\n", text, flags=re.S)
    (run / "config.yaml").write_text(re.sub(r"eval_every: \d+", "eval_every: null", text))
    assert examples_of(run) == []


def test_there_are_none_without_a_run_or_its_images(run: Path, tmp_path: Path) -> None:
    assert examples_of(tmp_path) == []
    for image in (tmp_path / "data/images").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="image"):
        examples_of(run)


def test_what_is_written_is_read(run: Path, tmp_path: Path) -> None:
    found = examples_of(run, count=3)
    write_examples(found, tmp_path / "examples")
    read = read_examples(tmp_path / "examples")
    assert [(one.question, one.prompt) for one in read] == [(one.question, one.prompt) for one in found]
    assert [one.image.read_bytes() for one in read] == [one.image.read_bytes() for one in found]
    (tmp_path / "examples/examples.json").write_text("{}x")
    with pytest.raises(ValueError, match=r"examples\.json cannot be read .*: export the page again"):
        read_examples(tmp_path / "examples")
