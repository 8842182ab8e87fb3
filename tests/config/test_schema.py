"""What a file of the fewest keys means, and which keys a resumed run may change."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import data.sources
from finetune.config.load import ConfigError, load_config
from finetune.config.schema import RunConfig
from finetune.config.section import Effect
from finetune.config.source import SPLITTING, TABLES
from finetune.lora.linear import LoRAConfig
from tests.config.minimal import keys

DEFAULTS = """\
model: {path: google/paligemma-3b-pt-224, revision: null, weights: pretrained, dtype: bfloat16, quantize: null,
        connector: null, device: auto}
image: {size: null, aspect: null, tiles: null}
connector: {learning_rate: null, start: pretrained, start_from: null, latents: 64, depth: 3, factor: 2, seed: null}
data:
  train:
    {name: null, weight: null, questions: q.json, annotations: a.json,
     images: coco, jsonl: null, columns: null, text_rows: false, task: auto, split: null,
     fraction: null, count: null, sample_by: image, csv: null, tsv: null, messages: null, folder: null, coco: null,
     parquet: null, disk: null, hub: null, subset: null, revision: null}
  validation: null
  prompt: answer en {question}
  answers: rotate
  max_text_tokens: auto
  truncate_answers: false
  on_error: fail
  skip_at_most: 0.01
  workers: 2
train:
  {objective: supervised, reference: start, epochs: null, max_steps: 100, batch_size: 64,
   micro_batch: auto, recompute: auto, learning_rate: 1e-4,
   schedule: cosine, warmup: 0.05, weight_decay: 0, beta1: 0.9, beta2: 0.999, max_grad_norm: 1, seed: 0,
   log_every: 10, save_every: 100,
   eval_every: auto, patience: null, keep_checkpoints: 2, on_full_disk: stop}
preference: {loss: sigmoid, beta: 0.1, label_smoothing: 0, rpo_alpha: 0, precompute: true}
reward: {samples: 4, temperature: 1.0, kl: 0.05}
stages: []
memory: {budget_gib: null}
evaluation: {count: 512, batch_size: 16, max_new_tokens: auto}
output: runs/one
tracking: {wandb: off, project: paligemma-lora, name: null, tensorboard: false}
"""


def test_a_minimal_file_takes_the_defaults(path: Path) -> None:
    minimal = load_config(path)
    path.write_text(DEFAULTS)
    assert minimal == load_config(path)
    assert minimal.lora == LoRAConfig()
    assert sorted(keys(yaml.safe_load(DEFAULTS))) == sorted(keys(minimal.model_dump(exclude={"lora"})))


def test_which_keys_may_change_in_a_run_that_is_resumed(path: Path) -> None:
    config = load_config(path, ["data.validation.jsonl=v.jsonl"])
    found = {
        effect: {key for key in keys(config.model_dump()) if RunConfig.effect_of(key) == effect} for effect in Effect
    }
    assert found[Effect.NOTHING] == {
        *("data.on_error", "data.skip_at_most", "data.workers", "output"),
        *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.on_full_disk"),
        *("tracking.wandb", "tracking.project", "tracking.name", "tracking.tensorboard"),
    }
    assert found[Effect.NUMERICS] == {
        *("model.device", "train.micro_batch", "train.recompute", "memory.budget_gib", "evaluation.batch_size"),
        "preference.precompute",
    }
    assert {"lora", "lora.rank", "train.seed", "data.train.count", "data.validation.jsonl"} <= found[Effect.RESULT]


@pytest.mark.parametrize("key", TABLES)
def test_every_source_has_a_key(path: Path, key: str) -> None:
    given = f"data.train={{{key}: in/x, images: photos, columns: {{suffix: label}}, count: 3}}"
    source = load_config(path, [given]).data.only("train")
    assert source.paths == {"images": "photos", key: "in/x"}
    assert source.title == "x"
    if key not in SPLITTING:
        with pytest.raises(ConfigError, match=rf"data\.train\.split: it is for the official .*, not for {key}"):
            load_config(path, [given, "data.train.split=train2014"])
    other = next(name for name in TABLES if name != key)
    with pytest.raises(ConfigError, match=rf"expected either questions, .*, or one of .*\b{key}\b"):
        load_config(path, [given, f"data.train.{other}=y"])


@pytest.mark.parametrize("key", [*TABLES, "questions"])
def test_rows_of_text_are_for_sources_that_may_have_some(path: Path, key: str) -> None:
    source = {"questions": "questions: q, annotations: a, images: i"}.get(key, f"{key}: x")
    given = f"data.train={{{source}, text_rows: true}}"
    if key not in ("questions", "coco"):
        assert load_config(path, [given]).data.only("train").text_rows
        return
    with pytest.raises(ConfigError, match=rf"data\.train\.text_rows: every row of {key} has an image: leave it out"):
        load_config(path, [given])


def test_the_keys_are_those_of_the_readers() -> None:
    assert set(TABLES) == set(data.sources.TABLES)


def test_a_configuration_cannot_be_changed(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 1
