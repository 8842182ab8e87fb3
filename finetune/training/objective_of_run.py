"""The objective of a run, made of its configuration: `train.objective` and what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from data import PaliGemmaDataset, Processor
from data.lengths import measure
from finetune.config.schema import RunConfig
from finetune.system import distributed
from finetune.system.console import show
from finetune.training.batch_sampler import BatchSampler
from finetune.training.examples import Examples, max_new_tokens
from finetune.training.objective import Objective, Supervised
from finetune.training.preferences import Preferences
from finetune.training.reference import REFERENCE_FILE, LogProbs, Reference, made_of
from finetune.training.rewards import Rewards, Worth
from finetune.training.trainer import LoRATrainer
from model import PaliGemma

if TYPE_CHECKING:
    from datasets import Dataset

AT_ONCE = 64  # pairs that are prepared together where there are no steps, at most


def require_built(config: RunConfig) -> None:
    """ValueError where the launcher asks for FSDP, and the objective compares the network with another one."""
    if config.train.objective != "supervised" and distributed.asks_for_fsdp():
        raise ValueError(
            f"train.objective={config.train.objective} under FSDP is not built: launch with --multi_gpu, where each "
            "process holds all of the network"
        )


def objective_of(
    config: RunConfig,
    model: PaliGemma,
    processor: Processor,
    examples: Examples,
    asked: Dataset | None,
    worth: Worth | None = None,
) -> Objective:
    """What the run minimises.

    Args:
        model: with the adapters in place that training starts with.
        examples: of data.train. asked: the validation records, if the run evaluates.
        worth: what an answer is worth, where training is by rewards.

    Raises:
        ValueError: the reference cannot be opened, or its log-probabilities are kept and those of something else.
    """
    if config.train.objective == "supervised":
        return Supervised()
    if config.lora and config.lora.start_from is None:
        show(
            f"warning: train.objective={config.train.objective} begins with a new adapter, and is for one that was "
            "trained on answers already: name it with lora.start_from"
        )
    reference, known = Reference.of(config, model), None
    if config.train.objective == "reward":
        assert worth is not None, "the run has looked what answers are worth"
        new_tokens = max_new_tokens(config, examples.lengths)
        return Rewards(config.reward, reference, worth, processor.decode, new_tokens)
    if config.preference.precompute:
        about = made_of(config, model, reference, processor, examples.records)
        known = LogProbs(Path(config.output, REFERENCE_FILE), about, examples.records["id"][:])
    pairs = None if asked is None else pairs_of(asked, processor)
    if asked is not None and pairs is None:
        show(
            "warning: data.validation has no pairs, so that only the answers to it are measured: to see how well pairs "
            "are told apart give it some too, or hold some out (data.validation: auto)"
        )
    count = 0 if pairs is None else len(pairs)
    validation = None if pairs is None else PaliGemmaDataset(pairs, processor, "pair")
    at_once = min(AT_ONCE, config.train.batch_size)  # the plan counts the images of a step
    return Preferences(config.preference, reference, known, validation, count, at_once)


def pairs_of(records: Dataset, processor: Processor) -> Dataset | None:
    """Those of the records that are pairs, and fit, with a line about others that do not; None where there are none."""
    pairs = records.select(pc.indices_nonzero(pc.not_equal(records.with_format("arrow")["rejected"], "")).to_pylist())
    invalid = measure(pairs, processor, "pair").invalid
    if invalid:
        first = next(iter(invalid.values()))
        show(f"data.validation: {len(invalid):,} pairs cannot be measured, such as {first.id}: {first.reason}")
        pairs = pairs.select([position for position in range(len(pairs)) if position not in invalid])
    return pairs if len(pairs) else None


def prepare(trainer: LoRATrainer, steps: BatchSampler, processes: int) -> None:
    """Compute what the objective needs before the first step, but for what was computed and kept before.

    processes: that prepare examples.
    """
    objective = trainer.accumulation.objective
    if isinstance(objective, Preferences) and objective.known is not None:
        drawn = sorted({record for step in steps for record, _ in step})
        if objective.known.lacks(drawn):
            show(f"first the reference's log-probabilities of {len(drawn):,} pairs: kept in {objective.known.file}")
        assert trainer.train_dataset is not None, "there is something to train on"
        try:
            objective.precompute(trainer.accumulation, trainer.train_dataset, drawn, processes)
        except OSError as error:
            raise ValueError(
                f"{objective.known.file} could not be written: {error}\nmake room and start the same command again"
            ) from error
