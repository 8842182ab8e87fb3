"""What a person is told of where training starts, and of what the decoder gets of an image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import RunConfig
from finetune.config.stages import runs_of
from finetune.training.batch_sampler import BatchSampler
from finetune.training.setup import image_note, shortness_note, start_note
from model import ConnectorConfig, PaliGemma
from model.convert import changed, convert

BASE = Path(__file__).parents[2] / "assets/tiny-base"
ADVICE = "Advised is a stage that trains it alone first: stages: [{name: align, max_steps: ...}]"
ALIGN = [{"name": "align", "max_steps": 3}]


def run_config(connector: str | None, path: Path = BASE, options: Any = None, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(path), "connector": connector},
            "connector": options or {},
            "data": {"train": {"jsonl": "unused.jsonl"}},
            "train": {"max_steps": 2, "batch_size": 2},
            "output": "runs/unused",
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("connector", "options", "reason"),
    [
        ("resampler", {}, "the layers of a resampler are drawn"),
        ("pixel_shuffle", {}, "begins as the mean of what the projector makes of its patches"),
        *((kind, {"start": "random"}, "connector.start is random") for kind in ("linear", "mlp", "dense_dci")),
    ],
)
def test_a_start_away_from_the_pretrained_network_is_told(connector: str, options: dict[str, Any], reason: str) -> None:
    """With the advice to train the connector first, unless that is done, in one way or another."""
    note = start_note(run_config(connector, options=options))
    assert note is not None
    assert note.startswith("training cannot start at the pretrained network: ")
    assert reason in note
    assert note.endswith(ADVICE)
    assert start_note(run_config(connector, options=options, stages=ALIGN)) is None
    assert start_note(run_config(connector, options={**options, "start_from": "runs/aligned"})) is None
    assert start_note(run_config(connector, options=options, lora={"start_from": "runs/aligned"})) is None
    whole = start_note(run_config(connector, options=options, lora=None))
    assert whole is not None
    assert reason in whole
    assert "stages" not in whole


def test_a_stage_is_not_advised_to_a_stage_or_after_one() -> None:
    runs = runs_of(run_config("resampler", stages=ALIGN))
    assert len(runs) == 2
    assert [start_note(run) for run in runs] == [None, None]


@pytest.mark.parametrize("connector", [None, "linear", "mlp", "dense_sci", "dense_dci"])
def test_a_start_at_the_pretrained_network_needs_no_word(connector: str | None) -> None:
    assert start_note(run_config(connector)) is None


def test_the_checkpoints_own_connector_needs_no_word(tmp_path: Path) -> None:
    model = PaliGemma.from_pretrained(BASE)
    convert(model, changed(model.config, ConnectorConfig("resampler", latents=4, depth=1)))
    model.save_pretrained(tmp_path)
    assert start_note(run_config("resampler", tmp_path, {"latents": 4, "depth": 1})) is None
    assert start_note(run_config("resampler", BASE, {"latents": 4, "depth": 1})) is not None


def test_image_tokens_are_told_with_what_they_are_made_of() -> None:
    config = PaliGemma.from_pretrained(BASE).config
    resampled = changed(config, ConnectorConfig("resampler", latents=4, depth=1), tiles=4, aspect="pad")
    assert image_note(config) == "16 tokens an image, by the connector linear and images of 56 pixels, squash"
    assert image_note(resampled) == (
        "20 tokens an image, by the connector resampler (4, 1) and images of 56 pixels, pad, tiles 4"
    )


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (BatchSampler((10,), 20, 0, 60), "a step of train.batch_size=20 is more than the 10 examples of data.train"),
        (BatchSampler((100,), 20, 0, 10), "the run has 10 steps, .* such as 4, makes more steps"),
        (BatchSampler((100, 100), 4, 0, 60, (1e9, 1e-9)), "^data.train.1 is never drawn in the 240 examples"),
        (BatchSampler((1, 900, 1), 4, 0, 60), "^data.train.0 and data.train.2 are never drawn in the 240 examples"),
        (BatchSampler((100, 100), 4, 0, 60, (1, 100)), None),
        (BatchSampler((100,), 4, 0, 60), None),
    ],
)
def test_what_a_run_is_too_short_for_is_told(steps: BatchSampler, said: str | None) -> None:
    note = shortness_note(steps)
    assert re.search(said, note or "") if said else note is None
