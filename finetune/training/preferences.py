"""Training from pairs: the chosen answer is to gain on the rejected one, measured against a reference (DPO, arXiv
2305.18290).

A pair is one row with two suffixes, so that image and prompt are computed once for both, where two rows would compute
them twice. The reference is the same network (reference.py). Of an answer y, g(y) = log p(y) - log p_ref(y) is what it
gained, and beta * g(y) the reward that DPO takes it to have; the difference between both rewards is the margin.

Axes: B pairs, L supervised tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from finetune.config.schema import PreferenceOptions
from finetune.system import distributed, workers
from finetune.system.progress import progress
from finetune.system.transfer import to_device
from finetune.training.log_probs import answer_log_probs, log_probs_by_id, logits_of, tokens_of
from finetune.training.objective import EXAMPLES, Loss, require_examples
from finetune.training.reference import LogProbs, Reference
from finetune.training.step_inputs import Example, StepInputs, cut, micro_batches
from model import PaliGemma, TokenBatch

REFERENCE = "reference"  # of an example, the reference's log-probabilities of its two answers, f64 [2]
SAVED_EVERY = 16  # of those, between writings of the reference's log-probabilities


def pair_losses(gains: Tensor, tokens: Tensor, options: PreferenceOptions) -> Tensor:
    """The loss of each pair, [B], without the term of `rpo_alpha`.

    Args:
        gains: [B, 2], what chosen and rejected answer gained over the reference, in nats.
        tokens: [B, 2], how many tokens they have.
    """
    if options.loss == "ipo":  # of the mean over an answer's tokens, as the authors' results are
        chosen, rejected = (gains / tokens).unbind(dim=1)
        return (chosen - rejected - 1 / (2 * options.beta)) ** 2
    margin = options.beta * (gains[:, 0] - gains[:, 1])
    if options.loss == "hinge":
        return F.relu(1 - margin)
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -(1 - options.label_smoothing) * right - options.label_smoothing * wrong


@dataclasses.dataclass(eq=False)
class Preferences:
    """Learns to prefer the chosen answer of each pair; its loss is the mean over the pairs of a step.

    Attributes:
        known: the reference's log-probabilities; None: computed at every step, as those that are missing are, of a
            record that takes the place of one whose image breaks later.
        at_once: pairs that are prepared together where there are no steps.
        validation: pairs to measure, as many as `pairs_to_measure`.
    """

    options: PreferenceOptions
    reference: Reference
    known: LogProbs | None = None
    validation: Dataset[Example] | None = None
    pairs_to_measure: int = 0
    at_once: int = 64
    may_be_silent: ClassVar[bool] = False

    def prepare(self, inputs: StepInputs, examples: Sequence[Example], step: int) -> list[Example]:
        """See `Objective.prepare`: with the reference's log-probabilities."""
        known = {} if self.known is None else {one["id"]: self.known.get(one["id"]) for one in examples}
        found = {name: values for name, values in known.items() if values is not None}
        if unknown := [example for example in examples if example["id"] not in found]:
            found |= self.reference_log_probs(inputs, unknown)
        return [example | {REFERENCE: found[example["id"]]} for example in examples]

    def total(self, examples: Sequence[Example]) -> float:
        """Pairs."""
        return float(len(examples))

    def loss(
        self,
        network: PaliGemma,
        batch: TokenBatch,
        image_features: Tensor | None,
        examples: Sequence[Example],
        total: float,
    ) -> Loss:
        """See `Objective.loss`."""
        tokens = tokens_of(examples)
        log_probs = answer_log_probs(network.supervised_logits(batch, image_features), batch, tokens)
        return self.loss_of(log_probs, torch.stack([example[REFERENCE] for example in examples]), tokens, total)

    def loss_of(self, log_probs: Tensor, reference: Tensor, tokens: Tensor, total: float) -> Loss:
        """The loss, and further figures, of pairs with these log-probabilities.

        Args:
            log_probs: [B, 2], in nats, on the device.
            reference: [B, 2], those of the reference, and tokens, i64 [B, 2], how many each answer has; anywhere.
        """
        moved = to_device({"reference": reference.cpu().to(log_probs.dtype), "tokens": tokens}, log_probs.device)
        gains = log_probs - moved["reference"]
        losses = pair_losses(gains, moved["tokens"], self.options)
        if self.options.rpo_alpha:
            losses = losses - self.options.rpo_alpha * log_probs[:, 0] / moved["tokens"][:, 0]
        with torch.no_grad():
            rewards = self.options.beta * gains
            margins = rewards[:, 0] - rewards[:, 1]
            figures = {
                EXAMPLES: torch.ones_like(margins),
                "pair_accuracy": 100.0 * (margins > 0),
                "margin": margins,
                "reward_chosen": rewards[:, 0],
                "reward_rejected": rewards[:, 1],
            }
        return Loss(losses.sum() / total, {name: values.sum().float() for name, values in figures.items()})

    def reference_log_probs(self, inputs: StepInputs, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Log-probabilities f64 [2] that the reference gives the answers of pairs, by their ids, on the CPU."""
        with self.reference.in_place(inputs.network):
            return log_probs_by_id(inputs, examples, inputs.frozen_image_features(examples))

    def precompute(self, inputs: StepInputs, dataset: Dataset[Example], drawn: Sequence[int], processes: int) -> None:
        """Compute what is missing of the reference's log-probabilities, and write it down.

        Args:
            dataset: the pairs. drawn: the positions of those that the run takes.
            processes: that prepare examples.

        Raises:
            ValueError: they cannot be written, or an example cannot be made.
        """
        assert self.known is not None, "there is somewhere to keep them"
        # Always cut alike, so that a run which was stopped meanwhile goes on to the very same values.
        batches = [batch for batch in cut(drawn, self.at_once) if self.known.lacks(batch)]
        own = iter(batches[distributed.rank() :: distributed.count()])
        rounds = progress("reference's log-probabilities")(shares_of(dataset, batches, processes), len(batches))
        for number, examples in enumerate(rounds, start=1):
            computed = {name: values.tolist() for name, values in self.reference_log_probs(inputs, examples).items()}
            # Of a record that is skipped the place has what took it, so that it counts as computed.
            places = [*zip(next(own, []), examples, strict=True)]
            places += [(self.known.positions[example["id"]], example) for example in examples]
            mine = [(position, computed[example["id"]]) for position, example in places]
            for position, values in itertools.chain.from_iterable(distributed.gather(mine)):
                self.known.add(position, torch.tensor(values, dtype=torch.float64))
            if number % SAVED_EVERY == 0:
                distributed.on_main(self.known.save)
        if batches:
            distributed.on_main(self.known.save)

    @torch.no_grad()
    def measure(self, inputs: StepInputs) -> dict[str, float]:
        """See `Objective.measure`. How well the pairs of `validation` are told apart: means of the loss and of its
        further figures; and `kl`, how far the network is from the reference: KL(network || reference) over the whole
        vocabulary, in nats, at the tokens of chosen answers, on average over those.
        """
        if self.validation is None:
            return {}
        network, sums = inputs.network, dict[str, Tensor]()
        network.eval()
        batches = list(cut(range(self.pairs_to_measure), self.at_once))
        for examples in shares_of(self.validation, batches, processes=0):
            images = inputs.frozen_image_features(examples)
            for rows in micro_batches(examples, inputs.execution_plan.micro_batch):
                logits, batch = logits_of(inputs, rows, images)
                with self.reference.in_place(network):
                    reference_logits, _ = logits_of(inputs, rows, images)
                tokens = tokens_of(rows)
                log_probs, reference = (answer_log_probs(of, batch, tokens) for of in (logits, reference_logits))
                loss = self.loss_of(log_probs, reference, tokens, total=1)
                found = {**loss.figures, "loss": loss.value, "kl": divergence(logits, reference_logits, tokens)}
                found["tokens"] = tokens[:, 0].sum().to(logits.device)
                sums |= {name: sums.get(name, 0) + value.float() for name, value in found.items()}
        of = distributed.totals({name: float(value) for name, value in sums.items()})
        tokens_in_all, pairs = of.pop("tokens"), of.pop(EXAMPLES)
        return {name: value / (tokens_in_all if name == "kl" else pairs) for name, value in of.items()}


def divergence(logits: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """KL(network || reference) in nats, [], summed over the tokens of the chosen answers.

    logits, reference: [L, V], of both answers of pairs, with so many `tokens`, i64 [B, 2].
    """
    total = torch.zeros((), device=logits.device)
    answers = zip(*(of.split(tokens.flatten().tolist()) for of in (logits, reference)), strict=True)
    for number, (here, there) in enumerate(answers):  # one at a time: these are large
        if number % 2 == 0:
            log_here, log_there = (F.log_softmax(of.float(), dim=-1) for of in (here, there))
            total += F.kl_div(log_there, log_here, reduction="sum", log_target=True)
    return total


def shares_of(dataset: Dataset[Example], batches: Sequence[Sequence[int]], processes: int) -> Iterator[list[Example]]:
    """This process's share of the examples at these positions, batch by batch: every process has as many batches, of
    which the last one may be empty. ValueError where an example cannot be made.
    """
    rank, count = distributed.rank(), distributed.count()
    keys = [[(position, 0) for position in batch] for batch in batches[rank::count]]
    for examples in workers.loader(dataset, keys, processes):
        require_examples(examples)
        yield list(examples)
    yield from ([] for _ in range(-(-len(batches) // count) - len(keys)))
