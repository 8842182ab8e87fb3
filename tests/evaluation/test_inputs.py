"""Figures belong to their inputs, and are not overwritten by those of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.evaluation.evaluate import METRICS_FILE
from finetune.evaluation.inputs import INPUTS_KEY, file_digests, first, inputs_of_run, require_same_inputs
from finetune.training.resume import contents
from tests.images import IMAGE


def test_a_changed_file_is_a_changed_input(tmp_path: Path) -> None:
    """Only files that exist are compared: whoever opens a missing one reports it."""
    file = tmp_path / "questions.json"
    file.write_text("1")
    before = file_digests(questions=str(file), annotations=None, jsonl=str(tmp_path / "missing"))
    assert before.keys() == {"questions"}
    require_same_inputs(tmp_path, before)  # no figures yet
    (tmp_path / METRICS_FILE).write_text(json.dumps({INPUTS_KEY: before}))
    require_same_inputs(tmp_path, before)
    file.write_text("2")
    with pytest.raises(ValueError, match=r"holds figures of something else \(questions differ\): .*--output"):
        require_same_inputs(tmp_path, file_digests(questions=str(file)))
    with pytest.raises(ValueError, match=r"\(limit differ\)"):
        require_same_inputs(tmp_path, before | {"limit": 3})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"made_of": 1'])
def test_figures_without_inputs_may_be_overwritten(tmp_path: Path, content: str) -> None:
    """metrics.json of an earlier version, or an unreadable one."""
    (tmp_path / METRICS_FILE).write_text(content)
    require_same_inputs(tmp_path, {"limit": 1})


def test_a_limit_beyond_the_records_takes_all_of_them() -> None:
    datasets = pytest.importorskip("datasets")
    records = datasets.Dataset.from_dict({"id": ["a", "b", "c"]})
    assert [list(first(records, limit)["id"]) for limit in (None, 2, 9)] == [
        ["a", "b", "c"],
        ["a", "b"],
        ["a", "b", "c"],
    ]


def test_a_new_image_in_the_folder_of_a_class_is_another_input_and_other_data(tmp_path: Path) -> None:
    """Such a folder has no file that names its images: their names are what the examples depend on."""
    for name in ("cats/a.jpg", "dogs/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(IMAGE)
    path = tmp_path / "run.yaml"
    source = f"{{folder: {tmp_path}}}"
    path.write_text(f"{{model: {{path: x}}, data: {{train: {source}, validation: {source}}}, train: {{max_steps: 1}}}}")
    config = load_config(path, [f"output={tmp_path}/run"])
    before = inputs_of_run(config, None), contents(config)
    assert (inputs_of_run(config, None), contents(config)) == before
    (tmp_path / "cats/c.jpg").write_bytes(IMAGE)
    after = inputs_of_run(config, None), contents(config)
    assert after[0]["folder"] != before[0]["folder"]
    assert [key for key in before[1] if before[1][key] != after[1][key]] == [
        "data.train.folder",
        "data.validation.folder",
    ]


def test_a_source_is_told_from_the_other_inputs_whatever_it_is_called(tmp_path: Path) -> None:
    """One called prompt would else be hidden by the prompt, and its change would overwrite figures."""
    (tmp_path / "a.jsonl").write_text("1")
    sources = f"[{{jsonl: {tmp_path}/a.jsonl, name: prompt}}, {{jsonl: {tmp_path}/a.jsonl, name: limit}}]"
    path = tmp_path / "run.yaml"
    path.write_text(
        f"{{model: {{path: x}}, data: {{train: {sources}, validation: {sources}}}, train: {{max_steps: 1}}}}"
    )
    config = load_config(path, [f"output={tmp_path}/run"])
    before = inputs_of_run(config, 3)
    (tmp_path / "a.jsonl").write_text("2")
    after = inputs_of_run(config, 3)
    assert {name for name in before if before[name] != after[name]} == {"source prompt", "source limit"}
    assert (after["prompt"], after["limit"]) == ("answer en {question}", 3)
