"""Runs on COCO's boxes and captions: judged by their own metrics, from training to the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import evaluate
import train
from data.synthetic.figures import SHAPES, outline, rng_of
from data.synthetic.scenes import CANVAS, caption_of, make_scene
from finetune.config.load import load_config
from finetune.run import learn
from tests.test_scripts import base_with_scenes, overrides

CONFIG = "configs/quickstart.yaml"


def coco_of(base: Path, split: str, seed: int, captions: bool) -> Path:
    """The first scenes' figures, or what is in them, as COCO's JSON."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(6):
        scene, id = make_scene(rng_of(split, seed, index, "scene")), seed * 1_000_000 + index + 1
        name = f"images/COCO_{split}_{id:012d}.jpg"
        images.append({"id": id, "file_name": name, "width": CANVAS, "height": CANVAS})
        if captions:
            _, told = caption_of(scene, None, None)
            annotations += [
                {"id": id, "image_id": id, "caption": told},
                {"id": -id, "image_id": id, "caption": "shapes"},
            ]
        for figure in () if captions else scene:
            across, down = ((min(places), max(places)) for places in zip(*outline(figure), strict=True))
            box = [across[0], down[0], across[1] - across[0], down[1] - down[0]]
            category = SHAPES.index(figure.shape)
            annotations.append({"id": len(annotations), "image_id": id, "category_id": category, "bbox": box})
    file = base / "data" / f"{split}.json"
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def words_of(tmp_path: Path, captions: bool) -> list[str]:
    base = base_with_scenes(tmp_path / "base")
    files = {
        name: {"coco": str(coco_of(base, split, seed, captions))}
        for name, split, seed in (("train", "train2014", 1), ("validation", "val2014", 2))
    }
    few = "train={max_steps: 2, batch_size: 4, micro_batch: 4, learning_rate: 1e-2, log_every: 1, eval_every: 1}"
    return [CONFIG, *overrides(base, tmp_path / "run", f"data={json.dumps(files | {'workers': 0})}", few)]


def test_a_run_is_judged_by_the_metric_of_its_task(tmp_path: Path) -> None:
    """Chosen step, figures, answers and page; the task is told by the file."""
    words = words_of(tmp_path, captions=False)
    train.main(words)
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(line["eval_map"] for line in logged if "eval_map" in line)
    assert (result["metric"], result["metric_value"]) == ("map", best)
    evaluate.main([*words, "--arm", "adapter"])
    metrics = json.loads((run / "eval/adapter/metrics.json").read_text())
    assert (metrics["metric"], metrics["task"], metrics["unit"]) == ("mAP at IoU 0.5:0.95", "detect", "percent")
    lines = [json.loads(line) for line in (run / "eval/adapter/answers.jsonl").read_text().splitlines()]
    assert len(lines) == metrics["questions"] == metrics["images"] == 6
    assert metrics["by_label"].keys() <= set(SHAPES)
    page = (run / "report.html").read_text()
    said = f"Its answers to 6 validation questions have mAP at IoU 0.5:0.95 of {metrics['overall']:.2f}% (95%"
    assert said in page
    assert "<h2>By label</h2>" in page


@pytest.mark.parametrize("captions", [False, True])
def test_a_missing_package_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captions: bool
) -> None:
    """Also where nothing would be evaluated before the end."""
    words = [*words_of(tmp_path, captions), "train.eval_every=null"]
    package = "pycocoevalcap.cider.cider" if captions else "pycocotools.cocoeval"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package.partition('.')[0]}: pip install"):
        learn(load_config(words[0], words[1:]), words)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("finetune.evaluation.run.records_of_run", lambda *_, **__: pytest.fail("images were decoded"))
    with pytest.raises(ValueError, match=f"needs {package.partition('.')[0]}: pip install"):
        evaluate.main([*words, "--arm", "base"])


def test_texts_that_hold_no_boxes_are_named_before_anything_is_trained(tmp_path: Path) -> None:
    words = [*words_of(tmp_path, captions=True), "data.validation.task=detect"]
    with pytest.raises(ValueError, match="has 2 different right answers, and boxes are scored against one"):
        learn(load_config(words[0], words[1:]), words)
    assert not (tmp_path / "run/config.yaml").exists()
    with pytest.raises(ValueError, match=r"data\.validation: the record '\d+' has 2 different right answers"):
        train.main([*words, "--check"])
    lines = ["--jsonl", str(tmp_path / "base/data/captions_val2014.jsonl"), "--task", "detect"]
    with pytest.raises(ValueError, match=r"none of the \d+ records to be scored has a box in its right answer"):
        evaluate.main(["--model", str(tmp_path / "base"), *lines, "--device", "cpu", "--dtype", "float32"])
