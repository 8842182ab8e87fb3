"""A run whose images are bytes in Parquet: trained, interrupted, resumed, evaluated, reported, shown in the demo."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import evaluate
import train
from finetune.config.load import load_config
from finetune.demo.examples import examples_of
from finetune.report.result_page import write_report
from finetune.run import callbacks_for, learn
from finetune.training.checkpoints import checkpoints
from tests.test_scripts import base_with_scenes, digest, overrides

CONFIG = "configs/quickstart.yaml"


def parquet_of(folder: Path, split: str, output: Path) -> Path:
    """The scenes' captions, with the bytes of their images."""
    lines = [json.loads(line) for line in (folder / f"captions_{split}.jsonl").read_text().splitlines()]
    rows = [line | {"image": {"bytes": (folder / line["image"]).read_bytes(), "path": None}} for line in lines]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False)).to_parquet(output)
    return output


class Interrupted(Exception):  # noqa: N818
    """What stops a run after its first checkpoint."""


class Interrupt(TrainerCallback):
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        raise Interrupted


def test_a_run_on_parquet_from_its_start_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_with_scenes(tmp_path / "base")
    (tmp_path / "train").mkdir()
    parquet_of(base / "data", "train2014", tmp_path / "train" / "0.parquet")
    held_out = parquet_of(base / "data", "val2014", tmp_path / "validation.parquet")

    def words(name: str) -> list[str]:
        source = {"train": {"parquet": f"{tmp_path}/train"}, "validation": {"parquet": str(held_out), "count": 20}}
        more = [f"data={json.dumps(source | {'workers': 0})}", "train.save_every=2"]
        return overrides(base, tmp_path / name, *more)

    learn(load_config(CONFIG, words("whole")), [])
    with monkeypatch.context() as stopping:
        real = callbacks_for
        stopping.setattr("finetune.run.callbacks_for", lambda *given: [*real(*given), Interrupt()])
        with pytest.raises(Interrupted):
            learn(load_config(CONFIG, words("run")), [])
    assert [one.name for one in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]

    # Another file among those of the folder, or another content, is another run.
    kept = (tmp_path / "train" / "0.parquet").read_bytes()
    added = parquet_of(base / "data", "val2014", tmp_path / "train" / "1.parquet")
    with pytest.raises(ValueError, match=r"data\.train\.parquet: the content"):
        learn(load_config(CONFIG, words("run")), [])
    added.unlink()
    parquet_of(base / "data", "val2014", tmp_path / "train" / "0.parquet")
    with pytest.raises(ValueError, match=r"data\.train\.parquet: the content"):
        learn(load_config(CONFIG, words("run")), [])
    (tmp_path / "train" / "0.parquet").write_bytes(kept)
    learn(load_config(CONFIG, words("run")), [])
    whole, resumed = (digest(tmp_path / name / "adapter") for name in ("whole", "run"))
    assert resumed["adapter_model.safetensors"] == whole["adapter_model.safetensors"]

    evaluate.main([CONFIG, *words("run")])
    answers = (tmp_path / "run/eval/adapter/answers.jsonl").read_text().splitlines()
    assert len(answers) == 20
    images = {json.loads(line)["image_id"] for line in answers}
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= len(images)
    report = json.loads((write_report(load_config(CONFIG, words("run"))) / "report.json").read_text())
    assert report["scores"]["adapter"]["questions"] == 20
    assert str(tmp_path) not in json.dumps(report["configuration"]["data"])
    found = examples_of(tmp_path / "run")
    assert [Image.open(one.image).size for one in found] == [(112, 112)] * len(found)
    assert {one.image.suffix for one in found} == {".jpeg"}
    assert found == examples_of(tmp_path / "run")

    parquet_of(base / "data", "train2014", held_out)  # other questions: the figures there are not overwritten
    with pytest.raises(ValueError, match=r"holds figures of something else \(parquet differ\)"):
        evaluate.main([CONFIG, *words("run")])


def test_images_of_validation_that_are_trained_on_are_counted_by_their_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_with_scenes(tmp_path / "base")
    one = parquet_of(base / "data", "train2014", tmp_path / "one.parquet")
    other = parquet_of(base / "data", "val2014", tmp_path / "other.parquet")
    copy = parquet_of(base / "data", "train2014", tmp_path / "copy.parquet")
    for validation, said in ((other, False), (copy, True)):
        source = {"train": {"parquet": str(one)}, "validation": {"parquet": str(validation)}}
        train.main([CONFIG, *overrides(base, tmp_path / "run"), f"data={json.dumps(source)}", "--check"])
        warning = "12 of the 12 images of data.validation are in data.train too"
        assert (warning in capsys.readouterr().out) == said
