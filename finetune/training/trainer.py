"""Training: the Hugging Face Trainer does the loop, this module supplies the step.

The loader hands over whole effective batches. `training_step` encodes the step's pictures, cuts the batch into
micro-batches and divides by the supervised tokens of the whole step, so that the gradient does not depend on the cut.
Of several processes each takes a part of the step, and the gradients are summed once: the step is the same one. Only
what is trained is saved and resumed, without pickle. The Trainer is used through its public seams; a contract test
fails when one of their signatures moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from finetune.config.schema import RunConfig
from finetune.lora.dropout import seed_of
from finetune.lora.protocol import check_gradients, set_dropout_seeds, trained_parameters
from finetune.system import distributed, workers
from finetune.system.device import first_line, free_memory, is_out_of_memory
from finetune.system.transfer import to_device
from finetune.training import checkpoints
from finetune.training.batch_sampler import Part, Steps
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.offload import Offload
from finetune.training.result import BEST_FILE, Best, Result, judge, last_step
from finetune.training.resume import judged_by
from model import IGNORE_INDEX, PaliGemma, PaliGemmaOutput, TokenBatch

Example = dict[str, Any]
Collate = Callable[[Sequence[Example]], dict[str, Tensor]]
Evaluate = Callable[[], dict[str, float]]
TEXTS = ("input_ids", "token_type_ids", "labels")  # of an example, what a micro-batch collates


class LoRATrainer(Trainer):
    """Trains whatever in `model` requires a gradient: adapters, or the whole network.

    Args:
        config: the run.
        model: on its device, adapters in place, the rest frozen.
        dataset: gives the example of a (record, visit) pair.
        steps: which pairs form which step.
        mode: how a step is cut, and what it computes again.
        collate: examples -> right-padded tensors.
        save_result: called with what is to be kept when an evaluation is the best so far, or at the end where nothing
            evaluates.
        evaluate: metrics of the model as it is, `accuracy` among them; None where the run has nothing to evaluate on.
        callbacks: what watches the run.
        checkpointed: whether checkpoints are written.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PaliGemma,
        dataset: Dataset[Example],
        steps: Steps,
        mode: ExecutionPlan,
        collate: Collate,
        save_result: Callable[[Result], None],
        evaluate: Evaluate | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        checkpointed: bool = True,
    ) -> None:
        arguments = training_arguments(config, steps.total, model.device, evaluate is not None, checkpointed)
        if arguments.n_gpu > 1:
            raise ValueError(
                f"{arguments.n_gpu} devices are visible, and this is one process: choose one with "
                "CUDA_VISIBLE_DEVICES=0, or use all with accelerate launch --multi_gpu train.py ..."
            )
        arguments.mixed_precision = "no"  # whatever a launcher says: model.dtype is what is computed in
        self.run, self.network, self.mode, self.collate = config, model, mode, collate
        self.steps, self.part = steps, Part(steps, distributed.rank(), distributed.count())
        self.save_result, self.evaluate_now, self.evaluated_step = save_result, evaluate, -1
        self.best: Result | None = None
        self.judged_by = judged_by(config) if evaluate else {}
        adapted = trained_parameters(model) or dict(model.named_parameters())
        self.trained = {name: parameter for name, parameter in adapted.items() if parameter.requires_grad}
        if config.model.dtype != "float32" and any(p.dtype != torch.float32 for p in self.trained.values()):
            raise ValueError(
                "lora=null trains the base weights themselves, and bfloat16 rounds small updates away: set "
                "model.dtype=float32"
            )
        self.offload = Offload(model.vision_tower, model.device) if mode.offload_vision else None
        model.language_model.model.set_recompute(mode.recompute_layers)
        super().__init__(
            model=WithoutConfig(model),
            args=arguments,
            train_dataset=dataset,
            eval_dataset=dataset if evaluate else None,  # asked for by the Trainer, read by nobody: see `evaluate`
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # `callbacks` show what there is to see

    # The data: whole effective batches, in the order of `steps`; of several processes, each has its part of them.

    def get_train_dataloader(self) -> DataLoader[Example]:
        assert self.train_dataset is not None
        return workers.loader(self.train_dataset, self.part, self.run.data.workers)

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:  # type: ignore[override]
        """Train to the end, from a checkpoint if there is one.

        Raises:
            ValueError: a worker process died or could not be started; and as `training_step`.
        """
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint)
        except BaseException as error:
            # An error that nobody catches holds the loop's frames, and these the workers, which ignore SIGTERM: the
            # process would wait for them at its exit without end.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, RuntimeError | OSError) and (message := workers.explain(error)):
                raise ValueError(message) from error
            raise

    # The step.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Gradients of one effective batch, micro-batch by micro-batch; returns its mean loss.

        `inputs` are its examples, or this process's part of them; gradients and loss are those of all. Where a device
        runs out of memory, and the cut was the plan's, its part is repeated in smaller micro-batches.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; the state before this step is kept.
            RuntimeError: in the first step, a trained parameter got no gradient.
            ValueError: an example cannot be made; or out of memory, and nothing smaller to try.
        """
        if error := next((example for example in inputs if isinstance(example, Exception)), None):
            if isinstance(error, MemoryError):
                raise ValueError("the machine has no memory left to prepare examples: lower data.workers") from error
            raise error
        model.train()
        tokens = int(distributed.total(supervised(inputs)))
        while True:
            try:
                total = self.cut_step(model, inputs, tokens)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            self.network.zero_grad()
            free_memory(self.args.device)
            self.mode = self.smaller(reason)
        distributed.all_reduce([total, *self.gradients()])
        self.check_finite(model, inputs, tokens, total)
        if self.state.global_step == self._initial_global_step:
            check_gradients(self.network)
        return total

    def cut_step(self, model: nn.Module, examples: list[Example], tokens: int) -> Tensor:
        """Gradients of these examples, of a step of so many supervised `tokens`; returns their part of its loss."""
        images = self.frozen_image_features(examples)
        total = torch.zeros((), device=self.args.device)
        for part in micro_batches(examples, self.mode.micro_batch):
            total += self.micro_step(model, part, images, tokens)
        return total

    def gradients(self) -> list[Tensor]:
        """Of what is trained. Which parameters have one depends on the network alone, not on the examples."""
        return [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]

    def smaller(self, reason: str) -> ExecutionPlan:
        """The mode to go on with after running out of memory: half of the micro-batch."""
        rows = self.mode.micro_batch
        if self.run.train.micro_batch != "auto" or rows == 1:
            raise ValueError(
                f"out of memory in step {self.state.global_step + 1} with micro-batches of {rows} ({reason}): set "
                "train.micro_batch=auto or less, train.recompute=auto or more, or close what else uses the device"
            )
        warnings.warn(
            f"out of memory in step {self.state.global_step + 1} ({reason}): repeated, and from here on cut into "
            f"micro-batches of {rows // 2} instead of {rows}",
            stacklevel=2,
        )
        return dataclasses.replace(self.mode, micro_batch=rows // 2)

    def check_finite(self, model: nn.Module, examples: list[Example], tokens: int, total: Tensor) -> None:
        """Stop before the optimizer where loss or gradients are not finite: keep the state before, say where it is."""
        norm = get_total_norm(self.gradients())
        if torch.stack((total, norm.to(total))).isfinite().all():
            return
        self.network.zero_grad()
        found = distributed.gather(self.first_not_finite(model, examples, tokens))
        everyone = "the sum over the step", [name for _, ids in found for name in ids]
        where, ids = next((place for place in found if place[0]), everyone)
        kept = "nothing was kept: the weights themselves are not finite"
        if all(bool(parameter.isfinite().all()) for parameter in self.trained.values()):
            self._save_checkpoint(model, None)
            kept = f"the state before it is in {self.run.output}/checkpoints"
        raise FloatingPointError(
            f"step {self.state.global_step + 1}: the loss is {total.item()}, the gradient's norm {norm.item()}; first "
            f"in {where}, of the examples {', '.join(ids)}; the step was not taken, and {kept}"
        )

    def first_not_finite(self, model: nn.Module, examples: list[Example], tokens: int) -> tuple[str | None, list[str]]:
        """Where the first value that is not finite appears, if one does, and the ids of the examples at work."""
        found: list[str] = []

        def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        hooks = [m.register_forward_hook(partial(look, name)) for name, m in self.network.named_modules() if name]
        images = self.frozen_image_features(examples)
        for part in micro_batches(examples, self.mode.micro_batch):
            self.micro_step(model, part, images, tokens)
            broken = [n for n, p in self.trained.items() if p.grad is not None and not p.grad.isfinite().all()]
            # The backward pass comes from the end: the last parameter's gradient is the first one.
            found += [f"the gradient of {name}" for name in reversed(broken)]
            if found:
                examples = part
                break
        for hook in hooks:
            hook.remove()
        self.network.zero_grad()
        return next(iter(found), None), [example["id"] for example in examples]

    def micro_step(
        self, model: nn.Module, part: Sequence[Example], images: ImageFeatures | None, tokens: int
    ) -> Tensor:
        """Forward and backward pass of a micro-batch; returns its part of the mean loss over a step's `tokens`.

        All that it needs is worked out on the host and moved in one copy: nothing in it waits for the device.
        """
        texts = self.collate([{name: example[name] for name in TEXTS} for example in part])
        batch = TokenBatch.of(self.network.config.image_token_id, **texts)
        inputs = {**batch.tensors(), "dropout": self.dropout_seeds([example["id"] for example in part])}
        if images is None:
            pixels = unique_images(part)
            rows = {name: row for row, name in enumerate(pixels)}
            inputs |= {"pixels": torch.stack(list(pixels.values())), "image_dropout": self.dropout_seeds(list(pixels))}
        else:
            rows = images.rows
        inputs["image_rows"] = torch.tensor([rows[example["image_id"]] for example in part])
        moved = to_device(inputs, self.args.device)
        set_dropout_seeds(self.network.language_model, moved["dropout"])
        if images is None:
            set_dropout_seeds(self.network.vision_tower, moved["image_dropout"])
            set_dropout_seeds(self.network.multi_modal_projector, moved["image_dropout"])
        encoded = self.network.encode_images(moved["pixels"]) if images is None else images.tokens
        batch = dataclasses.replace(batch, **{name: moved[name] for name in batch.tensors()})
        passed = {"batch": batch, "image_features": encoded[moved["image_rows"]]}
        loss = self.compute_loss(model, passed, num_items_in_batch=tokens)
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (output.loss, output) if return_outputs else output.loss

    def frozen_image_features(self, examples: Sequence[Example]) -> ImageFeatures | None:
        """Image tokens of each image of a step, once each and without a graph; None where vision is trained."""
        towers = (self.network.vision_tower, self.network.multi_modal_projector)
        if any(parameter.requires_grad for tower in towers for parameter in tower.parameters()):
            return None
        pixels, config, device = unique_images(examples), self.network.config, self.args.device
        shape = (len(pixels), config.vision.num_patches, config.text.hidden_size)
        tokens = torch.empty(shape, dtype=self.network.dtype, device=device)
        with torch.no_grad(), self.vision_on_device():
            parts = zip(
                cut(list(pixels.values()), self.mode.micro_batch), tokens.split(self.mode.micro_batch), strict=True
            )
            for part, room in parts:
                moved = to_device({"pixels": torch.stack(part)}, device)
                room.copy_(self.network.encode_images(moved["pixels"]))
        return ImageFeatures({name: row for row, name in enumerate(pixels)}, tokens)

    def vision_on_device(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the vision encoder is on the device, also where the plan keeps it in host memory."""
        return self.offload.on_device() if self.offload else contextlib.nullcontext()

    def dropout_seeds(self, names: Sequence[str]) -> Tensor:
        """i32 [B]: what the dropout of each row is drawn from: seed, step and record or image, nothing else."""
        seed, step = self.run.train.seed, self.state.global_step
        return torch.tensor([seed_of(seed, step, name) for name in names], dtype=torch.int32)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The network as it is: `training_step` sums the gradients of several processes itself."""
        return self.network

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        train = self.run.train
        betas = (train.beta1, train.beta2)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=train.learning_rate, betas=betas, weight_decay=train.weight_decay
        )
        return self.optimizer

    # Evaluation: loss and accuracy; the best step's weights are kept.

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Metrics under `eval_` names, logged; saves the model where they are the best so far (result.py)."""
        assert self.evaluate_now is not None, "the arguments ask for evaluation only where there is one"
        with self.vision_on_device():
            measured = self.evaluate_now()
        if (result := judge(self.state.global_step, measured, self.best)) is not None:
            self.keep(result)
        self.evaluated_step = self.state.global_step
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.network.train()
        return metrics

    def finish(self) -> None:
        """After training: evaluate, where the last step did not; with nothing to evaluate, keep the last state."""
        if self.evaluate_now is None:
            self.keep(last_step(self.state.global_step))
        elif self.evaluated_step != self.state.global_step:
            self.evaluate()

    def keep(self, result: Result) -> None:
        """Save the model as the result so far. A run whose result finds no room stops, also where `on_full_disk` lets
        it continue without checkpoints.
        """

        def save() -> None:
            try:
                self.save_result(result)
            except OSError as error:
                raise ValueError(
                    f"the result of step {result.step} could not be written, what is in place is whole: {error}\n"
                    "make room and start the same command again"
                ) from error

        distributed.on_main(save)
        self.best = result

    # Checkpoints: what is trained, the optimizer's moments, the Trainer's own state.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        distributed.on_main(self.write_checkpoint)

    def write_checkpoint(self) -> None:
        directory = Path(self.run.output) / "checkpoints"
        documents = {
            checkpoints.STATE: dataclasses.asdict(self.state),
            BEST_FILE: Best(self.best, self.judged_by).to_dict(),
        }
        try:
            checkpoints.write_checkpoint(
                directory, self.state.global_step, self.trained, self.bare_optimizer, documents
            )
        except OSError as error:
            message = f"no checkpoint of step {self.state.global_step} could be written, those before it stand: {error}"
            if self.run.train.on_full_disk == "stop":
                raise ValueError(f"{message}\nmake room and start the same command again") from error
            warnings.warn(message, stacklevel=2)
            return
        checkpoints.keep_newest(directory, self.run.train.keep_checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.read_parameters(Path(resume_from_checkpoint), self.trained)
        self.best = Best.read(Path(resume_from_checkpoint), self.judged_by).result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer state is the checkpoint's. All else is the configuration's: the learning rate is a function of
        it and of the step, and how often to log, evaluate and save is read from the Trainer's state.
        """
        if checkpoint is None:
            return
        checkpoints.read_moments(Path(checkpoint), self.trained, self.bare_optimizer)
        self.state.compute_steps(self.args, self.args.max_steps)
        step, schedule = self.state.global_step, self.schedule
        rates = [rate * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": step, "_last_lr": rates})
        for group, rate in zip(self.bare_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: order and dropout are functions of seed and step."""

    @property
    def bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `create_optimizer` made, without the wrapper of accelerate."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, torch.optim.Optimizer), "the optimizer exists from the start of training on"
        return optimizer

    @property
    def schedule(self) -> torch.optim.lr_scheduler.LambdaLR:
        assert isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR), "it exists from the start of training"
        return self.lr_scheduler


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """Image tokens [I, N, D] of a step's images, all in one buffer, and in which row those of an image id are."""

    rows: dict[str, int]
    tokens: Tensor


class WithoutConfig(nn.Module):
    """What the Trainer holds: the network, but for the `config` that the Trainer would write into."""

    def __init__(self, network: PaliGemma) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> PaliGemmaOutput:
        output: PaliGemmaOutput = self.network(**inputs)
        return output


class Arguments(TrainingArguments):
    """The Trainer's arguments, but that the Trainer leaves the model where it is: by itself it would bring an offloaded
    vision encoder back to the device.
    """

    @property
    def place_model_on_device(self) -> bool:
        return False


def training_arguments(
    config: RunConfig, total: int, device: torch.device, evaluates: bool, checkpointed: bool
) -> TrainingArguments:
    """The Trainer's arguments: what it does itself is the schedule, clipping, and when to log, evaluate and save."""
    train = config.train
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    return Arguments(
        output_dir=config.output,
        max_steps=total,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedules[train.schedule],
        warmup_steps=round(train.warmup * total),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if checkpointed else "no",
        save_steps=train.save_every,
        eval_strategy="steps" if evaluates and train.eval_every else "no",
        eval_steps=train.eval_every,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def micro_batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """An effective batch in parts of at most `size`: alike in length, questions of one picture side by side."""
    longest: dict[str, int] = {}
    for example in examples:
        longest[example["image_id"]] = max(longest.get(example["image_id"], 0), len(example["input_ids"]))
    ordered = sorted(examples, key=lambda e: (-longest[e["image_id"]], e["image_id"], -len(e["input_ids"])))
    return cut(ordered, size)


def supervised(examples: Sequence[Example]) -> int:
    """Supervised tokens of a step, by which its loss is divided."""
    return sum(int((example["labels"] != IGNORE_INDEX).sum()) for example in examples)


def cut(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def unique_images(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pixels by image id, each picture once."""
    return {example["image_id"]: example["pixel_values"] for example in examples}
