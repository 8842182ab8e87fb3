"""Training: the step is one whatever its cut, a resumed run is the uninterrupted one, and only adapters are kept."""

from __future__ import annotations

import inspect
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from data import collate
from finetune import LoRAConfig, durable, inject_lora
from finetune.checkpoints import checkpoints, keep_newest, newest_whole
from finetune.config import RunConfig
from finetune.lora import trained_parameters
from finetune.plan import Mode
from finetune.resume import find_checkpoint, start_run
from finetune.steps import Steps
from finetune.tracking import callbacks_for
from finetune.trainer import LoRATrainer, check_gradients, micro_batches
from model import PaliGemma
from tests import rounding, tiny
from tests.rounding import Computed

ADAPTERS = {"targets": ["language.*"], "rank": 4}
EVERYWHERE = {"targets": ["language.*", "vision.*"], "rank": 4, "train_in_full": ["connector.linear"], "dropout": 0.3}


class Examples(Dataset[dict[str, Any]]):
    """Forty questions of different lengths on eight pictures."""

    def __init__(self) -> None:
        made = tiny.batch(tiny.CONFIG, [2 + i % 7 for i in range(40)], [1 + i % 3 for i in range(40)])
        pixels = made.pop("pixel_values")
        rows = list(tiny.rows_of(made))
        self.examples = [
            {name: tensor[0] for name, tensor in row.items() if name != "attention_mask"}
            | {"pixel_values": pixels[i % 8], "image_id": f"picture {i % 8}", "id": str(i)}
            for i, row in enumerate(rows)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        return self.examples[pair[0]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))


def run_config(base: Path, output: Path, lora: dict[str, Any] | None, **train: Any) -> RunConfig:
    settings = {"max_steps": 6, "batch_size": 10, "micro_batch": 10, "learning_rate": 1e-2, "log_every": 1, **train}
    return RunConfig.model_validate(
        {
            "model": {"path": str(base), "dtype": "float32", "device": "cpu"},
            "data": {"train": {"jsonl": "unused.jsonl"}, "validation": {"jsonl": "unused.jsonl"}, "workers": 0},
            "lora": lora,
            "train": settings,
            "output": str(output),
        }
    )


def trainer_of(
    config: RunConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **keywords: Any
) -> LoRATrainer:
    model = PaliGemma.from_pretrained(config.model.path, dtype=dtype).to(device)
    if config.lora:
        inject_lora(model, config.lora, config.train.seed)
        model.to(dtype)  # in fp64 the adapters too
    Path(config.output).mkdir(parents=True, exist_ok=True)
    steps = Steps(40, config.train.batch_size, config.train.seed, config.train.max_steps or 1)
    keywords = {"save_result": lambda: None, **keywords}
    size = config.train.micro_batch
    mode = keywords.pop("mode", None) or Mode(int(size))
    return LoRATrainer(config, model, Examples(), steps, mode, partial(collate, pad_id=0), **keywords)


def gradients(config: RunConfig, **keywords: Any) -> dict[str, Tensor]:
    """The gradients of the first step, from adapters that are off their start."""
    return gradients_of(off_its_start(trainer_of(config, **keywords)))


def computed_gradients(config: RunConfig, **keywords: Any) -> Computed:
    """`gradients` in fp64 and in fp32."""
    return rounding.computed(lambda dtype: gradients(config, dtype=dtype, **keywords))


def off_its_start(trainer: LoRATrainer) -> LoRATrainer:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(trainer.network).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainer


def gradients_of(trainer: LoRATrainer) -> dict[str, Tensor]:
    """The gradients of the first step."""
    trainer._initial_global_step = 0
    trainer.training_step(trainer.network, first_step(trainer))
    return {name: p.grad for name, p in trained_parameters(trainer.network).items() if p.grad is not None}


def first_step(trainer: LoRATrainer) -> list[dict[str, Any]]:
    return [trainer.train_dataset[pair] for pair in trainer.steps[0]]  # type: ignore[index]


@pytest.mark.parametrize("lora", [ADAPTERS, EVERYWHERE], ids=["language", "everywhere, with dropout"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7])
def test_the_gradient_does_not_depend_on_the_cut(
    base: Path, tmp_path: Path, lora: dict[str, Any], micro_batch: int
) -> None:
    whole = computed_gradients(run_config(base, tmp_path, lora))
    cut = computed_gradients(run_config(base, tmp_path, lora, micro_batch=micro_batch))
    rounding.assert_same(cut, whole)


def test_dropout_is_active_and_keyed_by_seed_step_and_record(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(run_config(base, tmp_path, EVERYWHERE))
    first = trainer.dropout_keys(["a", "b"]).tolist()
    trainer.state.global_step = 1
    assert len({*first, *trainer.dropout_keys(["a", "b"]).tolist()}) == 4
    with_dropout = gradients(run_config(base, tmp_path, EVERYWHERE))
    other_seed = gradients(run_config(base, tmp_path, EVERYWHERE, seed=1))
    without = gradients(run_config(base, tmp_path, {**EVERYWHERE, "dropout": 0.0}))
    name = "language_model.model.layers.0.mlp.up_proj.lora_B"
    assert not torch.equal(with_dropout[name], without[name])
    assert not torch.equal(with_dropout[name], other_seed[name])


def test_the_gradient_is_that_of_the_mean_over_the_steps_tokens(base: Path, tmp_path: Path) -> None:
    """Against one plain forward and backward pass of the whole batch."""
    config = run_config(base, tmp_path, ADAPTERS, micro_batch=3)

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        trainer = off_its_start(trainer_of(config, dtype))
        trainer.network(**collate(first_step(trainer), 0)).loss.backward()
        return {name: p.grad for name, p in trained_parameters(trainer.network).items() if p.grad is not None}

    rounding.assert_same(computed_gradients(config), rounding.computed(plain))


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(base: Path, tmp_path: Path) -> None:
    """Of four micro-batches, in fp64: what is left is that their losses are added up in fp32."""
    trainer = off_its_start(trainer_of(run_config(base, tmp_path, ADAPTERS, micro_batch=3), torch.float64))
    with rounding.KeepFP64():
        plain = trainer.network(**collate(first_step(trainer), 0)).loss
        trainer._initial_global_step = 0
        loss = trainer.training_step(trainer.network, first_step(trainer))
    assert plain.dtype == torch.float64
    assert abs(loss - plain) <= 4 * torch.finfo(torch.float32).eps * plain


def test_micro_batches_are_alike_in_length_and_keep_pictures_together() -> None:
    examples = Examples().examples
    parts = list(micro_batches(examples, 8))
    assert {str(example["id"]) for part in parts for example in part} == {str(e["id"]) for e in examples}
    assert [len(part) for part in parts] == [8] * 5
    assert sum(len({example["image_id"] for example in part}) for part in parts) <= 8 + len(parts)
    longest = [max(len(example["input_ids"]) for example in part) for part in parts]
    assert longest == sorted(longest, reverse=True)


def test_each_picture_of_a_step_passes_the_tower_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = PaliGemma.encode_images

    def counted(self: PaliGemma, pixel_values: Tensor) -> Tensor:
        encoded.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(PaliGemma, "encode_images", counted)
    trainer = trainer_of(run_config(base, tmp_path, ADAPTERS, micro_batch=2))
    trainer._initial_global_step = 0
    examples = [trainer.train_dataset[(i, 0)] for i in range(20)]  # type: ignore[index]
    trainer.training_step(trainer.network, examples)
    assert sum(encoded) == 8


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("lora", [EVERYWHERE, None], ids=["adapters", "in full"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    base: Path, tmp_path: Path, stop: int, lora: dict[str, Any] | None
) -> None:
    straight = trainer_of(run_config(base, tmp_path / "straight", lora))
    straight.train()
    config = run_config(base, tmp_path / "cut", lora, save_every=2, keep_checkpoints=9)
    first = trainer_of(config)
    first.train()
    checkpoint = tmp_path / f"cut/checkpoints/step-{stop:06d}"
    resumed = trainer_of(config)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for name, parameter in straight.trained.items():
        assert torch.equal(parameter, first.trained[name])
        assert torch.equal(parameter, resumed.trained[name]), name


def test_checkpoints_hold_what_is_trained_without_pickle_and_the_newest_stay(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(run_config(base, tmp_path, ADAPTERS, save_every=1, keep_checkpoints=2))
    trainer.train()
    found = checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step-000005", "step-000006"]
    files = sorted(path.name for path in found[-1].iterdir())
    tensors, documents = ["optimizer.safetensors", "trained.safetensors"], ["scheduler.json", "trainer_state.json"]
    assert files == sorted(["manifest.json", *tensors, *documents])
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jsonl"}
    assert (found[-1] / "trained.safetensors").stat().st_size < 200_000


def test_a_checkpoint_of_other_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    trainer_of(run_config(base, tmp_path / "a", ADAPTERS, save_every=2)).train()
    other = trainer_of(run_config(base, tmp_path / "b", {**ADAPTERS, "rank": 5}))
    with pytest.raises(ValueError, match="checkpoint of other parameters"):
        other.train(resume_from_checkpoint=str(tmp_path / "a/checkpoints/step-000006"))


def test_training_lowers_the_loss_and_logs_every_step(base: Path, tmp_path: Path) -> None:
    config = run_config(base, tmp_path, ADAPTERS, max_steps=30)
    steps = Steps(40, 10, 0, 30)
    trainer_of(config, callbacks=callbacks_for(config, steps)).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (lines[3]["step"], lines[3]["epoch"]) == (4, 1.0)


def test_the_best_adapter_by_accuracy_is_kept(base: Path, tmp_path: Path) -> None:
    accuracies = iter([10.0, 30.0, 20.0])
    events: list[str] = []

    def evaluate() -> dict[str, float]:
        accuracy = next(accuracies)
        events.append(f"{accuracy:.0f}")
        return {"loss": 1.0, "accuracy": accuracy}

    config = run_config(base, tmp_path, ADAPTERS, eval_every=2)
    trainer = trainer_of(config, evaluate=evaluate, save_result=lambda: events.append("saved"))
    trainer.train()
    trainer.finish()
    assert events == ["10", "saved", "30", "saved", "20"]
    assert trainer.state.best_metric == 30.0


def test_without_evaluation_the_last_adapter_is_the_result(base: Path, tmp_path: Path) -> None:
    events: list[str] = []
    trainer = trainer_of(run_config(base, tmp_path, ADAPTERS), save_result=lambda: events.append("saved"))
    trainer.train()
    assert events == []
    trainer.finish()
    assert events == ["saved"]


def test_a_last_step_without_evaluation_is_evaluated_at_the_end(base: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def evaluate() -> dict[str, float]:
        calls.append(len(calls))
        return {"accuracy": float(len(calls))}

    trainer = trainer_of(run_config(base, tmp_path, ADAPTERS, eval_every=4), evaluate=evaluate)
    trainer.train()
    trainer.finish()
    assert len(calls) == 2


def test_an_adapter_without_gradient_stops_the_first_step(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(run_config(base, tmp_path, ADAPTERS))
    adapter = trainer.network.get_submodule("language_model.model.layers.1.mlp.up_proj")
    adapter.forward = lambda x: torch.nn.functional.linear(x, adapter.weight)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"2 trained parameters got no gradient.*layers\.1\.mlp\.up_proj\.lora_A"):
        trainer.train()


def test_an_adapter_whose_gradient_is_zero_stops_the_first_step(base: Path) -> None:
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    inject_lora(model, LoRAConfig(rank=4, targets=("language.q_proj",)))
    for parameter in trained_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match=r"3 trained parameters.*q_proj\.lora_B"):
        check_gradients(model)


def test_a_loss_that_is_not_finite_stops_before_the_update(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(run_config(base, tmp_path, ADAPTERS))
    with torch.no_grad():
        trainer.network.get_parameter("language_model.model.layers.1.post_attention_layernorm.weight").fill_(torch.nan)
    before = {name: parameter.clone() for name, parameter in trainer.trained.items()}
    where = r"step 1: the loss is nan.* first in language_model\.model\.layers\.1\.post_attention_layernorm, of"
    with pytest.raises(FloatingPointError, match=where):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.trained.items())


def test_a_gradient_that_is_not_finite_keeps_the_state_before_it(base: Path, tmp_path: Path) -> None:
    """The loss is fine, one example's gradient is not: it is named, and the step before can be resumed from."""
    config = run_config(base, tmp_path, ADAPTERS, micro_batch=5)
    trainer = trainer_of(config)
    pairs = trainer.steps[2]
    poisoned = str(pairs[7][0])
    step = trainer.micro_step

    def poison(model: Any, part: Any, *arguments: Any) -> Tensor:
        loss = step(model, part, *arguments)
        if poisoned in [example["id"] for example in part]:
            trainer.network.get_parameter("language_model.model.layers.1.mlp.up_proj.lora_B").grad.fill_(torch.inf)  # type: ignore[union-attr]
        return loss

    trainer.micro_step = poison  # type: ignore[method-assign, assignment]
    with pytest.raises(
        FloatingPointError, match=r"step 3: .* norm inf; first in the gradient of .*layers\.1\.mlp"
    ) as e:
        trainer.train()
    named = str(e.value).split("of the examples ")[1].split(";")[0].split(", ")
    assert poisoned in named
    assert len(named) == 5
    resumed = trainer_of(config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints/step-000002"))
    straight = trainer_of(run_config(base, tmp_path / "straight", ADAPTERS, micro_batch=5))
    straight.train()
    assert all(torch.equal(p, straight.trained[name]) for name, p in resumed.trained.items())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmuch more text"), r"CUDA out of memory\."),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "CUDA error: CUBLAS.*"),
        (MemoryError(), "MemoryError"),
    ],
    ids=["allocator", "another call", "cuBLAS", "Python"],
)
def test_out_of_memory_the_step_is_repeated_in_smaller_parts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    config = run_config(base, tmp_path, {**ADAPTERS, "dropout": 0.3})
    expected = computed_gradients(config)
    step, calls = LoRATrainer.micro_step, []

    def small(self: LoRATrainer, model: Any, part: Any, *arguments: Any) -> Tensor:
        calls.append(len(part))
        if len(part) > 2 and len(calls) > 1:  # the first part has added its gradients already
            raise error
        return step(self, model, part, *arguments)

    def in_little_memory(dtype: torch.dtype) -> dict[str, Tensor]:
        calls.clear()
        return gradients(auto, dtype=dtype, mode=Mode(4))

    monkeypatch.setattr(LoRATrainer, "micro_step", small)
    auto = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": "auto"})})
    with pytest.warns(UserWarning, match=rf"step 1 \({said}\): repeated.*micro-batches of 2 instead of 4"):
        found = rounding.computed(in_little_memory)
    assert calls == [4, 4, 2, 2, 2, 2, 2]
    rounding.assert_same(found, expected)
    calls.clear()
    with pytest.raises(ValueError, match=r"out of memory in step 1 with micro-batches of 5 .* train.micro_batch=auto"):
        gradients(run_config(base, tmp_path, ADAPTERS, micro_batch=5))


@pytest.mark.parametrize("on_full_disk", ["stop", "go_on"])
def test_on_a_full_disk_the_checkpoints_before_stand(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_full_disk: str
) -> None:
    config = run_config(base, tmp_path, ADAPTERS, save_every=2, on_full_disk=on_full_disk)
    trainer = trainer_of(config)
    write = durable.sync

    def full(path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        write(path)

    monkeypatch.setattr(durable, "sync", full)
    message = "no checkpoint of step 4 could be written, those before it stand: .*No space left"
    if on_full_disk == "stop":
        with pytest.raises(ValueError, match=message):
            trainer.train()
    else:
        with pytest.warns(UserWarning, match=message):
            trainer.train()
    names = ["step-000002"] + ["step-000006"] * (on_full_disk == "go_on")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert newest_whole(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / names[-1], [])


def test_only_a_whole_checkpoint_is_gone_on_from_and_supersedes_others(base: Path, tmp_path: Path) -> None:
    config = run_config(base, tmp_path, ADAPTERS, save_every=2, keep_checkpoints=9)
    trainer_of(config).train()
    start_run(config)
    directory = tmp_path / "checkpoints"
    weights = directory / "step-000006/trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (directory / "step-000004/manifest.json").unlink()
    found, notes = find_checkpoint(config, "auto")
    assert found == directory / "step-000002"
    assert [re.sub(".*/", "", note) for note in notes] == [
        "step-000006: trained.safetensors is not what was written (its sha256 differs)",
        "step-000004: manifest.json is missing",
    ]
    keep_newest(directory, 1)
    assert len(checkpoints(directory)) == 3  # the newest is not whole: nothing gives way to it
    with pytest.raises(ValueError, match=r"step-000006: trained\.safetensors is not what"):
        find_checkpoint(config, str(directory / "step-000006"))
    (directory / "step-000002/manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no checkpoint that is whole"):
        find_checkpoint(config, "auto")


def test_what_changes_the_result_must_be_accepted(base: Path, tmp_path: Path) -> None:
    config = run_config(base, tmp_path, ADAPTERS, save_every=2)
    trainer_of(config).train()
    start_run(config)
    other = run_config(base, tmp_path, ADAPTERS, save_every=3, micro_batch=2, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"another result.*\n  train.learning_rate: was 0.01, is 0.001$"):
        find_checkpoint(other, "auto")
    found, notes = find_checkpoint(other, "auto", accept_changes=True)
    assert found == tmp_path / "checkpoints/step-000006"
    assert notes == [
        "changed since, accepted: train.learning_rate: was 0.01, is 0.001",
        "changed since, the same result up to rounding: train.micro_batch: was 10, is 2",
    ]
    (tmp_path / "new/adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match="adapter exists, without checkpoints"):
        find_checkpoint(run_config(base, tmp_path / "new", ADAPTERS), "auto")


def test_training_bfloat16_weights_themselves_is_refused(base: Path, tmp_path: Path) -> None:
    config = run_config(base, tmp_path, None)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    model = PaliGemma.from_pretrained(base, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"model\.dtype=float32"):
        LoRATrainer(config, model, Examples(), Steps(40, 10, 0, 1), Mode(1), partial(collate, pad_id=0), lambda: None)


@pytest.mark.parametrize("how", [{"recompute_layers": 2}, {"recompute_gate_up": True}, {"offload_vision": True}])
def test_recomputation_and_the_towers_leave_change_nothing(base: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    config = run_config(base, tmp_path, ADAPTERS)
    kept = gradients(config)
    changed = gradients(config, mode=Mode(10, **how))
    assert all(torch.equal(changed[name], gradient) for name, gradient in kept.items())


def test_warm_up_and_cosine(base: Path, tmp_path: Path) -> None:
    config = run_config(base, tmp_path, ADAPTERS, max_steps=20, warmup=0.2, batch_size=2, micro_batch=2)
    trainer_of(config, callbacks=callbacks_for(config, Steps(40, 2, 0, 20))).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] / 1e-2 for line in lines if "learning_rate" in line]
    # The rate of a step is logged after the schedule has moved on: the fourth line shows the peak.
    assert rates[0] < rates[1] < rates[2] < rates[3]
    assert max(rates) <= 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.02


def with_wandb(config: RunConfig, mode: str) -> RunConfig:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb": mode})})


def test_wandb_that_fails_is_said_once_and_does_not_end_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    config = with_wandb(run_config(base, tmp_path, ADAPTERS), "online")
    trainer = trainer_of(config, callbacks=callbacks_for(config, Steps(40, 10, 0, 6)))
    trainer.train()
    assert trainer.state.global_step == 6
    assert capsys.readouterr().err.count("wandb: starting failed (ConnectionError: no route to host)") == 1


def test_wandb_gets_config_and_logs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, logs: dict[str, float], step: int) -> None:
            logged.append((step, logs))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**keywords: Any) -> Run:
        assert keywords["mode"] == "offline"
        assert keywords["config"]["lora"]["rank"] == 4
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    config = with_wandb(run_config(base, tmp_path, ADAPTERS), "offline")
    trainer_of(config, callbacks=callbacks_for(config, Steps(40, 10, 0, 6))).train()
    assert [step for step, logs in logged if "loss" in logs] == [1, 2, 3, 4, 5, 6]
    assert logged[-1] == (-1, {})


SEAMS: dict[str, list[str]] = {
    "get_train_dataloader": ["self"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "_wrap_model": ["self", "model", "training", "dataloader"],
    "create_optimizer": ["self", "model"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
}


def test_the_trainer_asks_its_arguments_whether_to_move_the_model(base: Path, tmp_path: Path) -> None:
    """The documented seam by which an offloaded vision encoder stays away: a property of TrainingArguments."""
    assert isinstance(inspect.getattr_static(TrainingArguments, "place_model_on_device"), property)
    assert trainer_of(run_config(base, tmp_path, ADAPTERS)).place_model_on_device is False


@pytest.mark.parametrize("name", SEAMS)
def test_the_trainers_seams_are_where_they_were(name: str) -> None:
    """A new release of transformers that moves one of them fails here, not in somebody's night."""
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == SEAMS[name]


def test_the_trainer_does_not_use_several_devices_by_itself(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0, or use all with accelerate launch --multi_gpu"):
        trainer_of(run_config(base, tmp_path, ADAPTERS))
