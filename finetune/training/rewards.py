"""Training by rewards: of answers that the network draws itself, those that the metric of the task values more than the
others to the same prompt become more likely (REINFORCE with the metric as reward, arXiv 2302.08242).

In each step K answers y_1 ... y_K to every prompt are drawn from the network as it is, p. Of an answer

    r_k  is its reward, what the task says that it is worth, 0 to 1
    s_k  = r_k - kl * (log p(y_k) - log p_ref(y_k)), with a reference as in reference.py
    A_k  = s_k - the mean of the other K - 1 values of s, its advantage (RLOO, arXiv 2402.14740)

and the loss of an example is -1/K * sum A_k log p(y_k), with A_k as a constant. On average over the draws its gradient
is that of -(E[r] - kl * KL(p || p_ref)), exactly: the mean of the others does not depend on y_k, so that it takes
variance away and nothing else.

With a temperature T the answers are drawn from softmax(logits / T), and all of the above is of that distribution, as in
TRL's RLOOTrainer. An answer that was cut off has no `<eos>`, and its log-probability is that of the tokens it has. With
lora.dropout the answers are drawn without dropout, and log p in the loss has it: what is said of the gradient is then
not exact.

Axes: B examples, K samples of each, L supervised tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.config.schema import RewardOptions
from finetune.lora.dropout import seed_of
from finetune.system.transfer import to_device
from finetune.training.log_probs import answer_log_probs, log_probs_by_id, tokens_of
from finetune.training.objective import EXAMPLES, Loss
from finetune.training.reference import Reference
from finetune.training.step_inputs import Example, ImageFeatures, StepInputs, micro_batches
from model import IGNORE_INDEX, PaliGemma, TokenBatch

REWARDS, REFERENCE = "rewards", "reference"  # of an example: of its samples the rewards and log p_ref, f64 [K] each
Worth = Callable[[str, Mapping[str, Any]], float]  # (answer, record without its image) -> 0 to 1


def advantages_of(worth: Tensor) -> Tensor:
    """Of each sample by how much it is worth more than the mean of the others, [B, K] -> [B, K]; exactly 0 where all
    are worth the same.
    """
    differences = worth[:, :, None] - worth[:, None, :]  # (B, K, K)
    return differences.sum(dim=2) / (worth.shape[1] - 1)


def with_samples(example: Example, samples: Sequence[Sequence[int]], rewards: Sequence[float]) -> Example:
    """An example of a prompt alone, with the tokens that were drawn as its suffixes and labels, and their rewards."""
    prompt, drawn = example["input_ids"], torch.tensor([token for sample in samples for token in sample])
    numbers = [number for number, sample in enumerate(samples, start=1) for _ in sample]
    return {
        **example,
        "input_ids": torch.cat((prompt, drawn)),
        "token_type_ids": torch.cat((torch.zeros_like(prompt), torch.tensor(numbers))),
        "labels": torch.cat((torch.full_like(prompt, IGNORE_INDEX), drawn)),
        REWARDS: torch.tensor(rewards, dtype=torch.float64),
    }


@contextlib.contextmanager
def answering(network: PaliGemma) -> Iterator[None]:
    """Within this context the network is as it answers: without dropout and without a graph."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


@dataclasses.dataclass(eq=False)
class Rewards:
    """Learns from what the network's own answers are worth; its loss is the mean over the examples of a step.

    Attributes:
        worth: of an answer to a record.
        decode: the tokens of an answer -> its text.
        max_new_tokens: of an answer, `<eos>` included.
    """

    options: RewardOptions
    reference: Reference
    worth: Worth
    decode: Callable[[Sequence[int]], str]
    max_new_tokens: int
    may_be_silent: ClassVar[bool] = True  # where all answers to each prompt are worth the same

    def prepare(self, inputs: StepInputs, examples: Sequence[Example], step: int) -> list[Example]:
        """See `Objective.prepare`: with samples, their rewards, and how likely the reference takes them to be."""
        images = inputs.frozen_image_features(examples)  # the reference's too: nothing of them is trained
        with answering(inputs.network):
            drawn = self.drawn(inputs, examples, images, step)
        rows = [
            with_samples(example, samples, [self.worth(self.decode(tokens), example["record"]) for tokens in samples])
            for example in examples
            for samples in [drawn[example["id"]]]
        ]
        with self.reference.in_place(inputs.network):
            found = log_probs_by_id(inputs, rows, images, self.options.temperature)
        return [row | {REFERENCE: found[row["id"]]} for row in rows]

    def drawn(
        self, inputs: StepInputs, examples: Sequence[Example], images: ImageFeatures | None, step: int
    ) -> dict[str, list[list[int]]]:
        """The tokens of K answers to each example, by its id, `<eos>` included unless one was cut off. They depend on
        the network, train.seed, the step and the id, and not on the other examples.
        """
        network, count, found = inputs.network, self.options.samples, dict[str, list[list[int]]]()
        for prompts in micro_batches(examples, inputs.execution_plan.micro_batch):
            batch, image_features = inputs.inputs_of(prompts, images, step)
            new = network.generate_scored(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                token_type_ids=batch.token_type_ids,
                image_features=image_features,
                max_new_tokens=self.max_new_tokens,
                temperature=self.options.temperature,
                samples=count,
                seeds=[seed_of(inputs.seed, step, prompt["id"], k) for prompt in prompts for k in range(count)],
            )
            rows = [tokens for tokens, _ in new.rows(network.config.eos_token_id)]
            found |= {prompt["id"]: rows[number * count :][:count] for number, prompt in enumerate(prompts)}
        return found

    def total(self, examples: Sequence[Example]) -> float:
        """Examples."""
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
        logits = network.supervised_logits(batch, image_features)
        log_probs = answer_log_probs(logits, batch, tokens, self.options.temperature)
        rewards, reference = (torch.stack([row[name] for row in examples]) for name in (REWARDS, REFERENCE))
        return self.loss_of(log_probs, rewards, reference, tokens, total)

    def loss_of(self, log_probs: Tensor, rewards: Tensor, reference: Tensor, tokens: Tensor, total: float) -> Loss:
        """The loss, and further figures, of examples whose samples have these log-probabilities.

        Args:
            log_probs: [B, K], in nats, on the device.
            rewards, reference: [B, K], the rewards and the reference's log-probabilities, and tokens, i64 [B, K], how
                many tokens there are; anywhere.
        """
        known = {"rewards": rewards.cpu().to(log_probs.dtype), "reference": reference.cpu().to(log_probs.dtype)}
        moved = to_device(known | {"tokens": tokens}, log_probs.device)
        rewards, gains = moved["rewards"], log_probs.detach() - moved["reference"]
        advantages = advantages_of(rewards - self.options.kl * gains)
        losses = -(advantages * log_probs).mean(dim=1)  # (B,)
        figures = {
            EXAMPLES: torch.ones_like(losses),
            "reward": rewards.mean(dim=1),
            "kl": gains.sum(dim=1) / moved["tokens"].sum(dim=1),
            "same_reward": 100.0 * (rewards == rewards[:, :1]).all(dim=1),
            "sample_tokens": moved["tokens"].double().mean(dim=1),
        }
        return Loss(losses.sum() / total, {name: values.detach().sum().float() for name, values in figures.items()})

    def measure(self, inputs: StepInputs) -> dict[str, float]:
        """Nothing: answers to the validation examples are measured as in any run. See `Objective.measure`."""
        return {}
