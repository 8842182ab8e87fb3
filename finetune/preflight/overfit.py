"""`train.py --overfit N`: whether a few examples can be learned at all.

A run that can learn anything memorises a handful of examples within a hundred steps, each of which takes all of them.
One that cannot has a learning rate, targets or examples that no amount of data will make up for.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data import PaliGemmaDataset, collate
from finetune.config.schema import RunConfig
from finetune.config.stages import runs_of, without_stages
from finetune.evaluation.evaluate import generate_answers
from finetune.preflight.run_plan import plan_run
from finetune.system.console import new_table, show
from finetune.training.batch_sampler import BatchSampler
from finetune.training.examples import in_turns, network_config, open_examples, open_processor
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.progress import ProgressBar
from finetune.training.resume import is_complete
from finetune.training.setup import adapt, open_model, require_starts, show_trained
from finetune.training.step_inputs import Collate, Example
from finetune.training.trainer import LoRATrainer
from model import PaliGemma, fetch

Answers = list[tuple[str, str, str]]  # question, expected answer, given answer

MAX_STEPS = 100
ANSWER_EVERY = 5  # steps


@dataclasses.dataclass(frozen=True)
class Overfit:
    """How it went: the loss of each step, and the answers that were given last."""

    losses: list[float]
    answers: Answers

    @property
    def right(self) -> int:
        return sum(expected == given for _, expected, given in self.answers)

    @property
    def learned(self) -> bool:
        """All answers are right, and the loss has halved: the network may have known the answers before."""
        return self.right == len(self.answers) and self.losses[-1] < self.losses[0] / 2

    @property
    def still_falls(self) -> bool:
        """Whether the loss of the last tenth of the steps is below that of the tenth before by 2% or more."""
        tenth = len(self.losses) // 10
        last, before = (statistics.fmean(self.losses[-n * tenth :][:tenth]) for n in (1, 2)) if tenth else (1.0, 1.0)
        return last < 0.98 * before


def overfit(config: RunConfig, count: int) -> None:
    """Train on the first `count` examples alone, those of several sources in turns, and show whether they were learned.
    Nothing is written. With the connector of the last stage, where that was trained; otherwise as the run would be
    without its stages.

    Raises:
        ValueError: they were not; says what to look at.
    """
    if config.stages and not is_complete(runs_of(config)[-2]):
        show(f"stage {config.stages[-1].name} is not trained: the connector is as stages would start with it")
        config = without_stages(config)
    if config.train.objective != "supervised":
        show(f"learned are right answers, of pairs the chosen ones; nothing is said of {config.train.objective} itself")
    config = overfit_config(config, count)
    directory = fetch(config.model.path, config.model.revision)
    require_starts(directory, config)
    processor = open_processor(directory, config)
    examples = open_examples(config, "train", processor)
    records = examples.valid
    if not 0 < count <= len(records):
        raise ValueError(f"--overfit {count}: expected 1 to {len(records):,}, the examples of data.train")
    plan = plan_run(config, network_config(directory, config), examples.longest).plan
    model = open_model(directory, config)
    records = records.select(in_turns(examples.sizes_of_valid, count))
    dataset = PaliGemmaDataset(records, processor, config.learned_answers, skipped=examples.skipped)
    adapt(model, config)
    show_trained(model)
    expected = [
        example["input_ids"][example["token_type_ids"] == 1] for example in map(dataset.__getitem__, range(count))
    ]

    def answer() -> Answers:
        given = generate_answers(model, processor, records, max(map(len, expected)), config.evaluation.batch_size)
        texts = (processor.decode(ids) for ids in expected)
        return list(zip(records["question"], texts, (one.text for one in given.values()), strict=True))

    found = train_until_learned(
        config, model, dataset, plan.execution, partial(collate, pad_id=processor.pad_id), answer
    )
    show_outcome(config, found)


def show_outcome(config: RunConfig, found: Overfit) -> None:
    """The answers as a table, and in a sentence whether they were learned; ValueError where they were not."""
    table = new_table("question", "expected", "answered")
    for row in found.answers:
        table.add_row(*row)
    show(table)
    outcome = (
        f"{found.right} of {len(found.answers)} answered as expected after {len(found.losses)} steps, loss "
        f"{found.losses[0]:.3f} -> {found.losses[-1]:.3f}"
    )
    if not found.learned:
        rate = config.train.learning_rate
        where = (
            f"The loss still falls: try a larger train.learning_rate, such as {5 * rate:g} (it is {rate:g})"
            if found.still_falls
            else f"Look at train.learning_rate ({rate:g}), at lora.targets (what is trained is said above), and with "
            "--inspect at the examples"
        )
        raise ValueError(f"the examples were not learned: {outcome}. {where}")
    show(f"it learns: {outcome}")


def overfit_config(run: RunConfig, count: int) -> RunConfig:
    """The run with the same `count` examples in each step: majority answers, of pairs the chosen ones, learned with a
    constant learning rate and no dropout.
    """
    train = run.train
    micro_batch = train.micro_batch if train.micro_batch == "auto" else min(train.micro_batch, count)
    size = {"epochs": None, "max_steps": MAX_STEPS, "batch_size": count, "micro_batch": micro_batch}
    schedule = {"schedule": "constant", "warmup": 0.05, "log_every": 1, "eval_every": None}
    schedule |= {"objective": "supervised", "reference": "start"}
    return run.model_copy(
        update={
            "data": run.data.model_copy(update={"answers": "majority", "workers": 0}),
            "lora": run.lora and dataclasses.replace(run.lora, dropout=0.0),
            "train": train.model_copy(update=size | schedule),
        }
    )


def train_until_learned(
    run: RunConfig,
    model: PaliGemma,
    dataset: Dataset[Example],
    execution: ExecutionPlan,
    collate: Collate,
    answer: Callable[[], Answers],
) -> Overfit:
    """Train on all examples of `dataset` in each step until they are answered as expected; nothing is saved.

    Args:
        run: as `overfit_config` makes it.
        model: with adapters in place.
        answer: lets the model answer.

    Raises:
        ValueError: loss or gradients became infinite.
    """
    count, stop = run.train.batch_size, StopWhenLearned(answer)
    with tempfile.TemporaryDirectory() as directory:
        run = run.model_copy(update={"output": directory})
        trainer = LoRATrainer(
            run,
            model,
            dataset,
            BatchSampler((count,), count, run.train.seed, MAX_STEPS),
            execution,
            collate,
            save_result=lambda _: None,
            callbacks=[ProgressBar(), stop],
            save_checkpoints=False,
        )
        stop.on_device = trainer.accumulation.vision_on_device
        try:
            trainer.train()
        except FloatingPointError as error:
            rate, where = run.train.learning_rate, str(error).partition("; the step was not taken")[0]
            raise ValueError(
                f"nothing can be learned like this: lower train.learning_rate ({rate}); {where}"
            ) from error
    return stop.found


class StopWhenLearned(TrainerCallback):
    """Lets the model answer every few steps, and stops the training when all answers are learned.

    on_device: within this context the whole network is on its device.
    """

    def __init__(self, answer: Callable[[], Answers]) -> None:
        self.answer, self.found = answer, Overfit([], [])
        self.on_device: Callable[[], AbstractContextManager[object]] = nullcontext

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self.found.losses.append(logs["loss"])
        if state.global_step % ANSWER_EVERY == 0:
            with self.on_device():
                self.found = Overfit(self.found.losses, self.answer())
            control.should_training_stop = self.found.learned
