"""Training: the Hugging Face Trainer does the loop, this module supplies the step.

The loader hands over whole effective batches. `training_step` accumulates the gradient of one, micro-batch by
micro-batch (gradient_accumulation.py). Of several processes each takes a shard of the batch, and the gradients are
summed once: the step is the same one. Why the project sums them itself: accelerate's data parallel (torch's DDP)
averages the gradients of the processes at each backward pass, while this loss is divided by what the examples of
the whole step count, and the processes may cut their shards into different numbers of micro-batches.

Only what is trained is saved and resumed, without pickle. The Trainer is used through its public seams; a contract test
fails when one of their signatures moves.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from finetune.config.schema import RunConfig
from finetune.lora.protocol import check_gradients, trained_parameters
from finetune.system import distributed, sharding, workers
from finetune.training import checkpoints
from finetune.training.arguments import training_arguments
from finetune.training.batch_sampler import BatchSampler, RankShard
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.not_finite import first_not_finite
from finetune.training.objective import EXAMPLES, Objective, require_examples
from finetune.training.optimizer import clip_gradients, make_optimizer, set_schedule, total_norm, without_wrapper
from finetune.training.result import BEST_FILE, Best, Result, judge, last_step
from finetune.training.resume import judged_by
from finetune.training.step_inputs import Collate, Example, has_image
from model import PaliGemma, PaliGemmaOutput

Evaluate = Callable[[], dict[str, float]]

# The Trainer's own words, with its own names, for what `find_checkpoint` says of a resumed run with other settings.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "trainer_state.json" not in record.getMessage()
)


class LoRATrainer(Trainer):
    """Trains whatever in `model` requires a gradient: adapters, or the whole network.

    Args:
        config: the run.
        model: on its device, adapters in place, the rest frozen.
        dataset: gives the example of a (record, epoch) pair.
        batch_sampler: which pairs form which step.
        execution_plan: how a step is cut, and what is recomputed.
        collate: examples -> right-padded tensors.
        save_result: called with what is to be kept when an evaluation is the best so far, or at the end where nothing
            evaluates.
        evaluate: metrics of the model as it is, `metric` among them; None where the run has nothing to evaluate on.
        metric: the one that steps are compared by; larger is better.
        callbacks: what watches the run.
        save_checkpoints: whether checkpoints are written.
        objective: what is minimised; by default the answers' cross-entropy.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PaliGemma,
        dataset: Dataset[Example],
        batch_sampler: BatchSampler,
        execution_plan: ExecutionPlan,
        collate: Collate,
        save_result: Callable[[Result], None],
        evaluate: Evaluate | None = None,
        metric: str = "accuracy",
        callbacks: Sequence[TrainerCallback] = (),
        save_checkpoints: bool = True,
        objective: Objective | None = None,
    ) -> None:
        arguments = training_arguments(config, batch_sampler, model.device, evaluate is not None, save_checkpoints)
        self.run, self.network, self.batch_sampler = config, model, batch_sampler
        self.rank_shard = RankShard(batch_sampler, distributed.rank(), distributed.count())
        self.save_result, self.evaluate_now, self.evaluated_step = save_result, evaluate, -1
        self.best: Result | None = None
        self.metric = metric
        self.gradient_norm = torch.zeros(())  # of the last step, before clipping
        # Whether what is trained of the decoder, and before it, has yet to be seen with a gradient.
        self.awaits_decoder, self.awaits_image = True, False
        self.judged_by = judged_by(config) if evaluate else {}
        adapted = trained_parameters(model) or dict(model.named_parameters())
        self.trained = {name: parameter for name, parameter in adapted.items() if parameter.requires_grad}
        if config.model.dtype != "float32" and any(p.dtype != torch.float32 for p in self.trained.values()):
            raise ValueError(
                "lora=null trains the base weights themselves, and bfloat16 rounds small updates away: set "
                "model.dtype=float32"
            )
        self.accumulation = GradientAccumulation(model, self.trained, config.train, execution_plan, collate, objective)
        self.figures: dict[str, Tensor] = {}  # of the objective, summed over the examples since the last log
        super().__init__(
            model=WithoutConfig(model),
            args=arguments,
            train_dataset=dataset,
            eval_dataset=dataset if evaluate else None,  # asked for by the Trainer, read by nobody: see `evaluate`
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # `callbacks` show what there is to see

    # The step.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Gradients of one effective batch; returns its mean loss.

        `inputs` are its examples, or this process's shard of them; gradients and loss are those of all.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; the state before this step is kept.
            RuntimeError: in the first step, or the first one with an image, a trained parameter got no gradient; of an
                objective that may be silent, in the first one that is not.
            ValueError: an example cannot be made; or out of memory, and nothing smaller to try.
        """
        require_examples(inputs)
        model.train()
        step, objective = self.state.global_step, self.accumulation.objective
        examples = self.accumulation.in_memory(partial(objective.prepare, self.accumulation, inputs, step), step)
        total = distributed.total(objective.total(examples))
        loss = self.accumulation.accumulate_in_memory(examples, total, step)
        if (self.awaits_decoder or self.awaits_image) and not self.is_silent:
            # Where rows may be silent, those with images may be, beside others of text alone that are not.
            seen = (all if objective.may_be_silent else any)(map(has_image, inputs))
            self.awaits_image = not check_gradients(self.network, seen, self.awaits_decoder)
            self.awaits_decoder = False
        distributed.all_reduce([loss, *self.accumulation.unsummed_gradients()])
        self.check_finite(model, examples, total, loss)
        self.figures |= {name: self.figures.get(name, 0) + value for name, value in self.accumulation.figures.items()}
        return loss

    @property
    def is_silent(self) -> bool:
        """Whether no example of the step, in any process, gives a gradient, and the objective may be like that."""
        if not self.accumulation.objective.may_be_silent:
            return False
        return not distributed.total(float(total_norm(self.accumulation.gradients())))

    def check_finite(self, model: nn.Module, examples: list[Example], total: float, loss: Tensor) -> None:
        """Stop before the optimizer where loss or gradients are not finite: keep the state before, say where it is."""
        self.gradient_norm = norm = total_norm(self.accumulation.gradients())
        if torch.stack((loss, norm.to(loss))).isfinite().all():
            return
        self.network.zero_grad()
        step = self.state.global_step
        found = distributed.gather(first_not_finite(self.accumulation, examples, total, step))
        everyone = "the sum over the step", [name for _, ids in found for name in ids]
        where, ids = next((place for place in found if place[0]), everyone)
        kept = "nothing was kept: the weights themselves are not finite"
        finite = all(bool(sharding.local(parameter).isfinite().all()) for parameter in self.trained.values())
        if all(distributed.gather(finite)):
            self._save_checkpoint(model, None)
            kept = f"the state before it is in {self.run.output}/checkpoints"
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss.item()}, the gradient's norm {norm.item()}; first in {where}, of the "
            f"examples {', '.join(ids)}; the step was not taken, and {kept}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; beside a training loss stand the objective's figures since the last one, each the mean over
        the examples.
        """
        if "loss" in logs and self.figures:
            found = distributed.totals({name: float(value) for name, value in self.figures.items()})
            count = found.pop(EXAMPLES)
            logs |= {name: value / count for name, value in found.items()}
            self.figures = {}
        super().log(logs, start_time)

    # What the Trainer's loop asks for: batches, the network, the optimizer.

    def get_train_dataloader(self) -> DataLoader[Example]:
        """Whole effective batches, in the order of the sampler; of several processes, each has its shard of them."""
        assert self.train_dataset is not None
        return workers.loader(self.train_dataset, self.rank_shard, self.run.data.workers)

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

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The network as it is: `training_step` sums the gradients of several processes itself."""
        return self.network

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(self.trained, self.run)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip to `train.max_grad_norm`; returns the norm before, which `check_finite` has computed."""
        clip_gradients(self.trained.values(), self.run.train.max_grad_norm, self.gradient_norm)
        return self.gradient_norm

    @property
    def bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `create_optimizer` made."""
        return without_wrapper(self.optimizer)

    # Evaluation: loss and the metric of the task; the best step's weights are kept.

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Metrics under `eval_` names, logged; saves the model where they are the best so far (result.py)."""
        assert self.evaluate_now is not None, "the arguments ask for evaluation only where there is one"
        with self.accumulation.vision_on_device():
            measured = self.evaluate_now() | self.accumulation.objective.measure(self.accumulation)
        if (result := judge(self.state.global_step, measured, self.metric, self.best)) is not None:
            self.keep(result)
        self.evaluated_step = self.state.global_step
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_past_its_best:
            self.control.should_training_stop = self.control.should_save = True
        self.network.train()
        return metrics

    @property
    def is_past_its_best(self) -> bool:
        """Whether this step was evaluated, and as many evaluations as `train.patience` allows brought nothing better
        than the one before them.
        """
        patience, is_evaluated = self.run.train.patience, self.evaluated_step == self.state.global_step
        if patience is None or self.best is None or not self.args.eval_steps or not is_evaluated:
            return False
        best = self.best.better_since or self.best.step
        return self.state.global_step - best >= patience * self.args.eval_steps

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

        with sharding.whole_parameters(self.network):
            distributed.on_main(save)
        self.best = result

    # Checkpoints: what is trained, the optimizer's state, the Trainer's own state.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state = checkpoints.gather_state(self.trained, self.bare_optimizer)
        distributed.on_main(partial(self.write_checkpoint, state))

    def write_checkpoint(self, state: checkpoints.TrainingState) -> None:
        """Write the state of this step, and delete what is older than `train.keep_checkpoints`."""
        directory, step = Path(self.run.output) / "checkpoints", self.state.global_step
        documents = {
            checkpoints.STATE: dataclasses.asdict(self.state),
            BEST_FILE: Best(self.best, self.judged_by).to_dict(),
        }
        try:
            checkpoints.write_checkpoint(directory, step, state, documents)
        except OSError as error:
            message = f"no checkpoint of step {step} could be written, those before it stand: {error}"
            if self.run.train.on_full_disk == "stop":
                raise ValueError(f"{message}\nmake room and start the same command again") from error
            warnings.warn(message, stacklevel=2)
            return
        checkpoints.keep_newest(directory, self.run.train.keep_checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.read_parameters(Path(resume_from_checkpoint), self.trained)
        self.best = Best.read(Path(resume_from_checkpoint), self.judged_by).result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's state is the checkpoint's. All else is the configuration's: the learning rate is a function
        of it and of the step, and how often to log, evaluate and save is read from the Trainer's state.
        """
        if checkpoint is None:
            return
        checkpoints.read_optimizer_state(Path(checkpoint), self.trained, self.bare_optimizer)
        self.state.compute_steps(self.args, self.args.max_steps)
        set_schedule(self.lr_scheduler, self.bare_optimizer, self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: order and dropout are functions of seed and step."""


class WithoutConfig(nn.Module):
    """What the Trainer holds: the network, but for the `config` that the Trainer would write into."""

    def __init__(self, network: PaliGemma) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> PaliGemmaOutput:
        output: PaliGemmaOutput = self.network(**inputs)
        return output
