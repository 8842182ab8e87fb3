"""Training: the step does not depend on its cut, a resumed run is the uninterrupted one, and only adapters are kept."""

from __future__ import annotations

import inspect
import json
import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

from data import collate
from finetune import LoRAConfig, inject_lora
from finetune.config.schema import RunConfig, TrainConfig
from finetune.lora.protocol import check_gradients, trained_parameters
from finetune.system import atomic
from finetune.training.arguments import evaluation_interval
from finetune.training.batch_sampler import BatchSampler
from finetune.training.checkpoints import checkpoints, keep_newest, newest_whole
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.result import Result
from finetune.training.resume import find_checkpoint, start_run
from finetune.training.step_inputs import micro_batches
from finetune.training.tracking import callbacks_for
from finetune.training.trainer import LoRATrainer
from model import ConnectorConfig, PaliGemma
from model.convert import changed, convert
from tests import rounding, tiny
from tests.rounding import Computed

ADAPTERS = {"targets": ["language.*"], "rank": 4}
EVERYWHERE = {"targets": ["language.*", "vision.*"], "rank": 4, "modules_to_save": ["connector.linear"], "dropout": 0.3}


class Examples(Dataset[dict[str, Any]]):
    """Forty questions of different lengths on eight images."""

    def __init__(self) -> None:
        made = tiny.batch(tiny.CONFIG, [2 + i % 7 for i in range(40)], [1 + i % 3 for i in range(40)])
        pixels = made.pop("pixel_values")
        rows = list(tiny.rows_of(made))
        self.examples = [
            {name: tensor[0] for name, tensor in row.items() if name != "attention_mask"}
            | {"pixel_values": pixels[i % 8], "image_id": f"image {i % 8}", "id": str(i)}
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
    model = PaliGemma.from_pretrained(config.model.path, dtype=torch.float32)
    if config.lora:
        inject_lora(model, config.lora, config.train.seed)
    rounding.in_dtype(model, dtype).to(device)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    batch_sampler = BatchSampler((40,), config.train.batch_size, config.train.seed, config.train.max_steps or 1)
    keywords = {"save_result": lambda _: None, **keywords}
    size = config.train.micro_batch
    plan = keywords.pop("execution_plan", None) or ExecutionPlan(int(size))
    return LoRATrainer(config, model, Examples(), batch_sampler, plan, partial(collate, pad_id=0), **keywords)


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
    return [trainer.train_dataset[pair] for pair in trainer.batch_sampler[0]]  # type: ignore[index]


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
    first, second = (trainer.accumulation.dropout_seeds(["a", "b"], step).tolist() for step in (0, 1))
    assert len({*first, *second}) == 4
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


class Gradients(TrainerCallback):
    """What the optimizer is given in each step, and the norm that the trainer logs of it."""

    def __init__(self) -> None:
        self.given: list[dict[str, Tensor]] = []
        self.logged: list[float] = []
        self.trained: dict[str, torch.nn.Parameter] = {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.given.append({n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None})

    def on_log(self, *_: Any, **given: Any) -> None:
        self.logged += [given["logs"]["grad_norm"]] if "grad_norm" in given["logs"] else []


def test_the_optimizer_is_given_clipped_gradients_each_step_by_its_own_norm(base: Path, tmp_path: Path) -> None:
    """Against torch's own clipping of the same gradients; the norm that is logged is that before."""
    most = 0.05  # below the norm of every step
    config = run_config(base, tmp_path / "run", ADAPTERS, max_steps=3, micro_batch=3, max_grad_norm=most)
    watch = Gradients()
    trainer = off_its_start(trainer_of(config, torch.float64, callbacks=[watch]))
    watch.trained = trained_parameters(trainer.network)
    trainer.train()
    expected = gradients(config, dtype=torch.float64)
    norm = torch.nn.utils.get_total_norm(expected.values())
    rounding.assert_exact(watch.given[0], {n: gradient * most / (norm + 1e-6) for n, gradient in expected.items()})
    assert watch.logged[0] == pytest.approx(float(norm), rel=1e-6)
    assert len(set(watch.logged)) == len(watch.given) == 3
    for given, before in zip(watch.given, watch.logged, strict=True):
        after = torch.nn.utils.get_total_norm(given.values())
        assert float(after) == pytest.approx(most * before / (before + 1e-6), rel=1e-6)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(base: Path, tmp_path: Path) -> None:
    """Of four micro-batches, in fp64: what is left is that their losses are added up in fp32."""
    trainer = off_its_start(trainer_of(run_config(base, tmp_path, ADAPTERS, micro_batch=3), torch.float64))
    with rounding.KeepFP64():
        plain = trainer.network(**collate(first_step(trainer), 0)).loss
        trainer._initial_global_step = 0
        loss = trainer.training_step(trainer.network, first_step(trainer))
    assert plain.dtype == torch.float64
    assert abs(loss - plain) <= 4 * torch.finfo(torch.float32).eps * plain


def test_micro_batches_are_alike_in_length_and_keep_images_together() -> None:
    examples = Examples().examples
    cut = list(micro_batches(examples, 8))
    assert {str(example["id"]) for micro_batch in cut for example in micro_batch} == {str(e["id"]) for e in examples}
    assert [len(micro_batch) for micro_batch in cut] == [8] * 5
    assert sum(len({example["image_id"] for example in micro_batch}) for micro_batch in cut) <= 8 + len(cut)
    longest = [max(len(example["input_ids"]) for example in micro_batch) for micro_batch in cut]
    assert longest == sorted(longest, reverse=True)


def test_each_image_of_a_step_passes_the_tower_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = PaliGemma.vision_features

    def counted(self: PaliGemma, pixel_values: Tensor) -> list[Tensor]:
        encoded.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(PaliGemma, "vision_features", counted)
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
    tensors, documents = ["optimizer.safetensors", "trained.safetensors"], ["best.json", "trainer_state.json"]
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
    steps = BatchSampler((40,), 10, 0, 30)
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
    trainer = trainer_of(config, evaluate=evaluate, save_result=lambda _: events.append("saved"))
    trainer.train()
    trainer.finish()
    assert events == ["10", "saved", "30", "saved", "20"]
    assert trainer.best == Result(4, "best accuracy", "accuracy", 30.0, 1.0)


def evaluations(base: Path, output: Path, figures: dict[int, tuple[float, float]], **train: Any) -> LoRATrainer:
    """A trainer whose evaluation of step k gives accuracy and loss `figures[k]`, and what it kept in `kept`."""
    config = run_config(base, output, ADAPTERS, eval_every=1, save_every=1, keep_checkpoints=9, **train)
    trainer = trainer_of(config, save_result=lambda result: kept.append(result), evaluate=lambda: evaluate())
    kept: list[Result] = []
    trainer.kept = kept  # type: ignore[attr-defined]

    def evaluate() -> dict[str, float]:
        accuracy, loss = figures[trainer.state.global_step]
        return {"accuracy": accuracy, "loss": loss}

    return trainer


def kept_by(trainer: LoRATrainer) -> list[tuple[int, str]]:
    return [(result.step, result.why) for result in trainer.kept]  # type: ignore[attr-defined]


def test_where_accuracy_does_not_move_the_lower_loss_is_kept(base: Path, tmp_path: Path) -> None:
    """Captions: no answer is right to the letter, and the loss falls all the same."""
    losses = {1: (0.0, 4.4), 2: (0.0, 2.0), 3: (0.0, 3.0), 4: (0.0, 2.0), 5: (0.0, float("nan")), 6: (0.0, 2.1)}
    trainer = evaluations(base, tmp_path, losses)
    trainer.train()
    assert kept_by(trainer) == [
        (1, "best accuracy"),
        (2, "accuracy as at step 1, and a lower validation loss"),
        (4, "accuracy and validation loss as at step 2, and later"),
    ]


def test_a_better_accuracy_is_kept_with_any_loss(base: Path, tmp_path: Path) -> None:
    figures = {1: (0.0, 1.0), 2: (5.0, 9.0), 3: (4.0, 0.1), 4: (float("nan"), 0.1), 5: (5.0, 9.5), 6: (6.0, 10.0)}
    trainer = evaluations(base, tmp_path, figures)
    trainer.train()
    assert kept_by(trainer) == [(1, "best accuracy"), (2, "best accuracy"), (6, "best accuracy")]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_the_best_so_far_survives_being_resumed(base: Path, tmp_path: Path, stop: int) -> None:
    """Both figures of it: with the accuracy alone step 4 or 5 would be kept."""
    figures = {1: (0.0, 4.4), 2: (0.0, 2.0), 3: (0.0, 3.0), 4: (0.0, 2.5), 5: (0.0, 2.4), 6: (0.0, 1.9)}
    evaluations(base, tmp_path, figures).train()
    resumed = evaluations(base, tmp_path, figures)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoints/step-{stop:06d}"))
    assert kept_by(resumed) == [(6, "accuracy as at step 2, and a lower validation loss")]


def test_the_best_so_far_of_another_evaluation_does_not_count(base: Path, tmp_path: Path) -> None:
    """More questions were asked since: what few of them gave is no figure to beat."""
    figures = {1: (9.0, 1.0), 2: (90.0, 1.0)} | {step: (50.0 + step, 2.0) for step in (3, 4, 5, 6)}
    evaluations(base, tmp_path, figures).train()
    resumed = evaluations(base, tmp_path, figures)
    resumed.judged_by = {**resumed.judged_by, "evaluation": {"count": 7}}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints/step-000002"))
    assert [step for step, _ in kept_by(resumed)] == [3, 4, 5, 6]


@pytest.mark.parametrize("stop", [0, 3, 4])
def test_patience_ends_a_run_that_gets_no_better(base: Path, tmp_path: Path, stop: int) -> None:
    """Of accuracies 5, 9, 8, 9 with a higher loss, and 7, that of step 2 is the best: three in a row do not beat it.
    Resumed in between it stops at the same step.
    """
    figures = {1: (5.0, 1.0), 2: (9.0, 1.0), 3: (8.0, 1.0), 4: (9.0, 1.5), 5: (7.0, 0.1), 6: (99.0, 0.0)}
    checkpoint = None
    if stop:
        evaluations(base, tmp_path, figures, patience=9).train()
        checkpoint = str(tmp_path / f"checkpoints/step-{stop:06d}")
    trainer = evaluations(base, tmp_path, figures, patience=3)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.finish()
    assert trainer.state.global_step == 5
    assert trainer.best is not None
    assert trainer.best.step == 2


def test_what_is_only_as_good_does_not_renew_patience(base: Path, tmp_path: Path) -> None:
    """Nothing moves: the latest of equal steps is kept, and the run ends all the same."""
    trainer = evaluations(base, tmp_path, dict.fromkeys(range(1, 7), (0.0, 2.5)), patience=3)
    trainer.train()
    assert trainer.state.global_step == 4
    assert kept_by(trainer)[-1] == (4, "accuracy and validation loss as at step 3, and later")


def test_a_run_that_stops_early_saves_where_it_is(base: Path, tmp_path: Path) -> None:
    """So that it need not train those steps again to find that it is finished."""
    figures = {1: (5.0, 1.0), 2: (4.0, 1.0), 3: (4.0, 1.0)}
    trainer = evaluations(base, tmp_path, figures, patience=2)
    trainer.args.save_steps = 100
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000003"]


@pytest.mark.parametrize(
    ("records", "batch_size", "total", "given", "interval"),
    [
        (40, 10, 12, "auto", 4),  # an epoch
        (5, 10, 12, "auto", 1),
        (40, 10, 200, "auto", 10),  # an epoch is 4 steps: 50 evaluations would be too many
        (4000, 10, 50, "auto", 50),  # less than an epoch: at the end
        (40, 10, 12, 5, 5),
        (40, 10, 12, None, None),
    ],
)
def test_evaluations_are_an_epoch_apart(
    records: int, batch_size: int, total: int, given: Any, interval: int | None
) -> None:
    train = TrainConfig(max_steps=total, batch_size=batch_size, eval_every=given)
    assert evaluation_interval(train, BatchSampler((records,), batch_size, 0, total)) == interval


def test_without_evaluation_the_last_adapter_is_the_result(base: Path, tmp_path: Path) -> None:
    events: list[Result] = []
    trainer = trainer_of(run_config(base, tmp_path, ADAPTERS), save_result=events.append)
    trainer.train()
    assert events == []
    trainer.finish()
    assert events == [Result(6, "last step, nothing was evaluated")]


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
    with pytest.raises(RuntimeError, match=r"6 trained parameters.*q_proj\.lora_B"):
        check_gradients(model)


def test_a_connector_is_one_adapter_to_the_first_step(base: Path) -> None:
    """Norms before weights that start at zero have no gradient yet; a connector of which nothing has one is refused."""
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    convert(model, changed(model.config, ConnectorConfig("dense_dci")))
    inject_lora(model, LoRAConfig(targets=(), modules_to_save=("connector.*",)))
    model.encode_images(torch.rand(1, *model.config.pixel_shape)).sum().backward()
    norms = [p for name, p in trained_parameters(model).items() if "group_norms" in name]
    assert norms
    assert not any(p.grad.any() for p in norms if p.grad is not None)
    check_gradients(model)
    for parameter in trained_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match=r"8 trained parameters.*multi_modal_projector\.linear\.weight"):
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
    pairs = trainer.batch_sampler[2]
    poisoned = str(pairs[7][0])
    step = trainer.accumulation.micro_step

    def poison(micro_batch: Any, *arguments: Any) -> Tensor:
        loss = step(micro_batch, *arguments)
        if poisoned in [example["id"] for example in micro_batch]:
            trainer.network.get_parameter("language_model.model.layers.1.mlp.up_proj.lora_B").grad.fill_(torch.inf)  # type: ignore[union-attr]
        return loss

    trainer.accumulation.micro_step = poison  # type: ignore[method-assign, assignment]
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
def test_out_of_memory_the_step_is_repeated_in_smaller_micro_batches(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    config = run_config(base, tmp_path, {**ADAPTERS, "dropout": 0.3})
    expected = computed_gradients(config)
    step, calls = GradientAccumulation.micro_step, []

    def small(self: GradientAccumulation, micro_batch: Any, *arguments: Any) -> Tensor:
        calls.append(len(micro_batch))
        if len(micro_batch) > 2 and len(calls) > 1:  # the first one has added its gradients already
            raise error
        return step(self, micro_batch, *arguments)

    def in_little_memory(dtype: torch.dtype) -> dict[str, Tensor]:
        calls.clear()
        return gradients(auto, dtype=dtype, execution_plan=ExecutionPlan(4))

    monkeypatch.setattr(GradientAccumulation, "micro_step", small)
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
    write = atomic.sync

    def full(path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        write(path)

    monkeypatch.setattr(atomic, "sync", full)
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
        LoRATrainer(
            config,
            model,
            Examples(),
            BatchSampler((40,), 10, 0, 1),
            ExecutionPlan(1),
            partial(collate, pad_id=0),
            lambda _: None,
        )


@pytest.mark.parametrize("how", [{"recompute_layers": 2}, {"offload_vision": True}])
def test_recomputation_and_the_towers_leave_change_nothing(base: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    config = run_config(base, tmp_path, ADAPTERS)
    kept = gradients(config)
    changed = gradients(config, execution_plan=ExecutionPlan(10, **how))
    assert all(torch.equal(changed[name], gradient) for name, gradient in kept.items())


def test_warm_up_and_cosine(base: Path, tmp_path: Path) -> None:
    config = run_config(base, tmp_path, ADAPTERS, max_steps=20, warmup=0.2, batch_size=2, micro_batch=2)
    trainer_of(config, callbacks=callbacks_for(config, BatchSampler((40,), 2, 0, 20))).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] / 1e-2 for line in lines if "learning_rate" in line]
    # The rate of a step is logged after the schedule has moved on: the fourth line shows the peak.
    assert rates[0] < rates[1] < rates[2] < rates[3]
    assert max(rates) <= 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.02


def rates_of(output: Path) -> dict[int, float]:
    """The learning rate that was logged after each step: that of the step to come."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}


def trained_with_log(config: RunConfig, checkpoint: Path | None = None) -> LoRATrainer:
    """Trained from the start or a checkpoint; `used` holds the rate that each step was taken with."""
    assert config.train.max_steps is not None
    trainer = trainer_of(config, callbacks=callbacks_for(config, BatchSampler((40,), 10, 0, config.train.max_steps)))
    used: dict[int, float] = {}
    step = trainer.training_step

    def noted(*arguments: Any) -> Tensor:
        used[trainer.state.global_step + 1] = trainer.bare_optimizer.param_groups[0]["lr"]
        return step(*arguments)

    trainer.training_step = noted  # type: ignore[method-assign, assignment]
    trainer.used = used  # type: ignore[attr-defined]
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_that_is_extended_follows_the_schedule_of_its_new_length(
    base: Path, tmp_path: Path, schedule: str, stop: int
) -> None:
    """From its first new step on; warm-up, too, is a share of the new length."""
    course = {"schedule": schedule, "warmup": 0.25}
    trained_with_log(run_config(base, tmp_path / "run", ADAPTERS, save_every=1, keep_checkpoints=9, **course))
    checkpoint = tmp_path / f"run/checkpoints/step-{stop:06d}"
    resumed = trained_with_log(run_config(base, tmp_path / "run", ADAPTERS, max_steps=12, **course), checkpoint)
    straight = trained_with_log(run_config(base, tmp_path / "straight", ADAPTERS, max_steps=12, **course))
    used, expected = resumed.used, straight.used  # type: ignore[attr-defined]
    assert list(used) == list(range(stop + 1, 13))
    assert used == {step: expected[step] for step in used}
    assert used[stop + 1] > 0
    logged = rates_of(tmp_path / "straight")
    assert {step: logged[step] for step in used} == {step: rates_of(tmp_path / "run")[step] for step in used}


def test_a_resumed_run_learns_as_its_configuration_says_and_not_as_the_checkpoint_did(
    base: Path, tmp_path: Path
) -> None:
    """Learning rate, decay, course, and how often to log, evaluate and save; the checkpoint's are those of another."""
    config = run_config(base, tmp_path, ADAPTERS, save_every=2, log_every=4, weight_decay=0.0, beta1=0.9, beta2=0.999)
    trainer_of(config).train()
    now: dict[str, Any] = {"learning_rate": 3e-3, "schedule": "constant", "warmup": 0.0, "max_steps": 9}
    now |= {"weight_decay": 0.2, "beta1": 0.8, "beta2": 0.95, "save_every": 3, "log_every": 1, "eval_every": 2}
    changed = run_config(base, tmp_path, ADAPTERS, keep_checkpoints=9, **now)
    asked: list[int] = []

    def evaluate() -> dict[str, float]:
        asked.append(resumed.state.global_step)
        return {"accuracy": 1.0}

    callbacks = callbacks_for(changed, BatchSampler((40,), 10, 0, 9))
    resumed = trainer_of(changed, evaluate=evaluate, callbacks=callbacks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints/step-000004"))
    (group,) = resumed.bare_optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-3, 0.2, (0.8, 0.95))
    assert rates_of(tmp_path) == dict.fromkeys(range(5, 10), 3e-3)
    assert asked == [6, 8, 9]
    saved = {int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path / "checkpoints")}
    assert saved == {4, 6, 9}


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
    trainer = trainer_of(config, callbacks=callbacks_for(config, BatchSampler((40,), 10, 0, 6)))
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
    trainer_of(config, callbacks=callbacks_for(config, BatchSampler((40,), 10, 0, 6))).train()
    assert [step for step, logs in logged if "loss" in logs] == [1, 2, 3, 4, 5, 6]
    assert logged[-1] == (-1, {})


def test_a_resumed_run_continues_its_page_in_wandb(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    begun: list[dict[str, Any]] = []

    def init(**keywords: Any) -> None:
        begun.append(keywords)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, "init", init)
    for name, checkpoint in (("run", None), ("run", "step-000004"), ("other", None)):
        config = with_wandb(run_config(base, tmp_path / name, ADAPTERS, save_every=2), "offline")
        trainer = trainer_of(config, callbacks=callbacks_for(config, BatchSampler((40,), 10, 0, 6)))
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / name / "checkpoints" / checkpoint))
    first, again, other = (keywords["id"] for keywords in begun)
    assert first == again != other
    assert {keywords["resume"] for keywords in begun} == {"allow"}


def test_wandb_itself_takes_a_resumed_run_for_the_same(base: Path, tmp_path: Path) -> None:
    """Offline: two directories to upload, of one run."""
    for checkpoint in (None, str(tmp_path / "checkpoints/step-000004")):
        config = with_wandb(run_config(base, tmp_path, ADAPTERS, save_every=2), "offline")
        trainer_of(config, callbacks=callbacks_for(config, BatchSampler((40,), 10, 0, 6))).train(
            resume_from_checkpoint=checkpoint
        )
    made = [path.name.split("-") for path in (tmp_path / "wandb").glob("offline-run-*")]
    # offline-run-TIME-ID, and behind it a number where two begin in one second.
    assert len(made) == 2
    assert {name[3] for name in made} == {(tmp_path / "wandb_id").read_text().strip()}


SEAMS: dict[str, list[str]] = {
    "get_train_dataloader": ["self"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_wrap_model": ["self", "model", "training", "dataloader"],
    "create_optimizer": ["self", "model"],
    "_clip_grad_norm": ["self", "model"],
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


def test_what_changed_is_not_said_a_second_time_in_the_trainers_own_names(caplog: pytest.LogCaptureFixture) -> None:
    state: Any = SimpleNamespace(logging_steps=1, eval_steps=1, save_steps=20, train_batch_size=4)
    arguments: Any = SimpleNamespace(
        logging_steps=1, eval_steps=1, save_steps=100, per_device_train_batch_size=4, n_gpu=1
    )
    logger = logging.getLogger("transformers.trainer_utils")
    logger.addHandler(caplog.handler)
    try:
        compare_trainer_and_checkpoint_args(arguments, state)
        logger.warning("something else")
    finally:
        logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"something else"}
