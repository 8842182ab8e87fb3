"""Training by rewards: the gradient is on average that of what is to be gained, and samples in one row are samples in
rows of their own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import PaliGemmaDataset, Processor, collate
from data.lengths import measure
from finetune import LoRAConfig, inject_lora
from finetune.config.schema import RewardOptions, TrainConfig
from finetune.lora.protocol import trained_parameters
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.objective import EXAMPLES
from finetune.training.reference import Reference
from finetune.training.rewards import REFERENCE, Rewards, advantages_of, with_samples
from finetune.training.step_inputs import Example
from model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from model.random_init import from_random
from tests import rounding, suffixes

BASE = Path(__file__).parents[2] / "assets/tiny-base"
# A vocabulary of <pad>, <eos>, <bos> and <image>, any of which may be written.
FOUR_TOKENS = PaliGemmaConfig(
    VisionConfig(16, 32, 1, 2, image_size=28), TextConfig(16, 32, 2, 2, 1, 8, vocab_size=4), image_token_id=3
)
PAD, EOS, BOS, IMAGE = 0, 1, 2, 3
# All answers of at most two tokens.
ANSWERS = [[EOS], *([first, second] for first in (PAD, BOS, IMAGE) for second in range(4))]


def adapted(model: PaliGemma, seed: int, **lora: Any) -> PaliGemma:
    """A network with adapters off their start, in fp64."""
    inject_lora(model, LoRAConfig(rank=2, **lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return rounding.in_dtype(model, torch.float64).train()


def of_four_tokens(seed: int) -> PaliGemma:
    torch.manual_seed(0)  # of the base, the same for all
    return adapted(PaliGemma(FOUR_TOKENS), seed)


def values(model: PaliGemma) -> Reference:
    return Reference({name: p.detach().clone() for name, p in trained_parameters(model).items()})


def prompt_of(name: str, texts: Sequence[int]) -> Example:
    """An example of the small vocabulary: four image tokens and a text."""
    ids = torch.tensor([IMAGE] * FOUR_TOKENS.num_image_tokens + [BOS, *texts])
    pixels = torch.linspace(-1, 1, 3 * 28 * 28, dtype=torch.float64).view(3, 28, 28)
    about = {"id": name, "image_id": "image", "pixel_values": pixels, "record": {"id": name}}
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), **about}


def worth_of_letters(answer: str, record: Mapping[str, Any]) -> float:
    """From 0 to 1, of any text."""
    return sum(map(ord, answer)) % 7 / 6


def digits(tokens: Sequence[int]) -> str:
    return "".join(map(str, tokens))


def accumulation(model: PaliGemma, objective: Rewards, plan: ExecutionPlan | None = None) -> GradientAccumulation:
    config, pad = TrainConfig(max_steps=1, batch_size=4, seed=3), model.config.pad_token_id
    together = partial(collate, pad_id=pad)
    return GradientAccumulation(model, trained_parameters(model), config, plan or ExecutionPlan(4), together, objective)


def gradients(model: PaliGemma) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trained_parameters(model).items() if p.grad is not None}


def exact_log_probs(model: PaliGemma, prompt: Example, answers: Sequence[Sequence[int]], temperature: float) -> Tensor:
    """Of each answer, [N], in a forward pass of its own."""
    found = []
    for batch, tokens in zip(
        suffixes.apart([prompt["input_ids"]], [list(map(torch.tensor, answers))]), answers, strict=True
    ):
        logits = model(**batch, pixel_values=prompt["pixel_values"][None]).logits / temperature  # (L, V)
        found.append(logits.log_softmax(dim=-1)[range(len(tokens)), tokens].sum())
    return torch.stack(found)


@pytest.mark.parametrize(
    "options", [RewardOptions(samples=2, kl=0.0), RewardOptions(samples=2, kl=0.3, temperature=0.7)]
)
def test_the_gradient_is_on_average_that_of_expected_reward_less_divergence(options: RewardOptions) -> None:
    """Exactly, over all pairs of answers that can be drawn, each as often as it is: of E[r] - kl * KL(p || p_ref), both
    sums over all answers.
    """
    model, reference = of_four_tokens(1), values(of_four_tokens(2))
    objective = Rewards(options, reference, worth_of_letters, digits, 2)
    prompt, made = prompt_of("a", [0, 0]), accumulation(model, objective)
    rewards = torch.tensor([worth_of_letters(digits(answer), {}) for answer in ANSWERS], dtype=torch.float64)
    with rounding.KeepFP64():
        log_p = exact_log_probs(model, prompt, ANSWERS, options.temperature)
        with reference.in_place(model):
            log_q = exact_log_probs(model, prompt, ANSWERS, options.temperature)
        p = log_p.exp()
        assert float(p.sum().detach()) == pytest.approx(1, abs=1e-12), "these are all answers"
        (p @ rewards - options.kl * (p @ (log_p - log_q))).backward()
        wanted = gradients(model)
        model.zero_grad()
        total = torch.zeros(())
        for one, other in itertools.product(range(len(ANSWERS)), repeat=2):
            row = with_samples(prompt, [ANSWERS[one], ANSWERS[other]], rewards[[one, other]].tolist())
            row[REFERENCE] = log_q[[one, other]]
            weight = float(p[one].detach() * p[other].detach())
            total = total + made.accumulate([row], 1 / weight, step=0)
    rounding.assert_exact({name: -grad for name, grad in gradients(model).items()}, wanted)
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-3


def test_answers_are_drawn_as_often_as_they_are_likely() -> None:
    """By a chi-square test of 4,000 draws: with 12 degrees of freedom 32.9 is exceeded once in a thousand times."""
    temperature, count = 6.0, 4000
    objective = Rewards(
        RewardOptions(samples=count, temperature=temperature), Reference(None), worth_of_letters, digits, 2
    )
    model, prompt = of_four_tokens(1), prompt_of("a", [0, 0])
    with rounding.KeepFP64(), torch.no_grad():
        expected = exact_log_probs(model.eval(), prompt, ANSWERS, temperature).exp() * count
        (drawn,) = objective.drawn(accumulation(model, objective), [prompt], None, step=0).values()
    counts = Counter(map(tuple, drawn))
    assert counts.keys() <= set(map(tuple, ANSWERS))
    seen = torch.tensor([counts[tuple(answer)] for answer in ANSWERS])
    assert float(((seen - expected) ** 2 / expected).sum()) < 32.9
    assert float(expected.min()) > 5


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Four questions on two images."""
    folder, rows = tmp_path_factory.mktemp("images"), []
    for number in range(4):
        path = folder / f"{number % 2}.png"
        Image.fromarray(np.full((8, 8, 3), 90 * (number % 2), np.uint8)).save(path)
        about = {"id": f"q{number}", "image": str(path), "image_id": f"i{number % 2}"}
        prefix = "answer en how many?" + " really?" * number
        rows.append({**about, "question": "", "prefix": prefix, "answers": ["3", "three"], "answer": "3"})
    return rows


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def prompts(records: list[dict[str, Any]], processor: Processor) -> list[Example]:
    return [PaliGemmaDataset(records, processor, "prompt")[index] for index in range(4)]


def network(seed: int = 1, targets: tuple[str, ...] = ("language.*", "connector.*")) -> PaliGemma:
    return adapted(from_random(BASE, 0), seed, targets=targets)


@pytest.mark.parametrize("plan", [ExecutionPlan(4), ExecutionPlan(1, recompute_layers=2)], ids=str)
@pytest.mark.parametrize(
    "options", [RewardOptions(samples=3), RewardOptions(samples=2, kl=0.4, temperature=1.3)], ids=repr
)
def test_loss_and_gradient_are_those_of_the_samples_in_rows_of_their_own(
    prompts: list[Example], processor: Processor, options: RewardOptions, plan: ExecutionPlan
) -> None:
    model, other = network(), network(seed=2)
    objective = Rewards(options, values(other), worth_of_letters, processor.decode, 4)
    with rounding.KeepFP64():
        made = accumulation(model, objective, plan)
        prepared = objective.prepare(made, prompts, step=5)
        loss = made.accumulate(prepared, objective.total(prepared), step=5)
        ours, figures = gradients(model), made.figures
        model.zero_grad()
        losses, seen = [], []
        for prompt, row in zip(prompts, prepared, strict=True):
            prompt = {**prompt, "pixel_values": prompt["pixel_values"].double()}
            of_sample = [row["input_ids"][row["token_type_ids"] == k].tolist() for k in range(1, options.samples + 1)]
            own = exact_log_probs(model, prompt, of_sample, options.temperature)
            with torch.no_grad():
                known = exact_log_probs(other, prompt, of_sample, options.temperature)
            rewards = [worth_of_letters(processor.decode(tokens), {}) for tokens in of_sample]
            worth = [r - options.kl * float(gain) for r, gain in zip(rewards, own.detach() - known, strict=True)]
            for k, log_prob in enumerate(own):
                others = [value for number, value in enumerate(worth) if number != k]
                losses.append(-(worth[k] - sum(others) / len(others)) * log_prob / options.samples)
            length = sum(map(len, of_sample))
            seen.append(
                (sum(rewards) / len(rewards), float((own.detach() - known).sum()) / length, length / options.samples)
            )
        expected = torch.stack(losses).sum() / len(prompts)
        expected.backward()
    rounding.assert_exact(ours, gradients(model))
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, wanted in zip(("reward", "kl", "sample_tokens"), np.mean(seen, axis=0), strict=True):
        assert float(figures[name] / figures[EXAMPLES]) == pytest.approx(wanted, rel=1e-5)


def drawn(prompts: Sequence[Example], size: int, step: int, processor: Processor) -> dict[str, list[list[int]]]:
    objective = Rewards(RewardOptions(samples=2), Reference(None), worth_of_letters, processor.decode, 4)
    with rounding.KeepFP64():
        prepared = objective.prepare(accumulation(network(), objective, ExecutionPlan(size)), prompts, step)
    return {row["id"]: [row["input_ids"][row["token_type_ids"] == k].tolist() for k in (1, 2)] for row in prepared}


def test_draws_depend_on_seed_step_and_record_alone(prompts: list[Example], processor: Processor) -> None:
    """Not on micro-batches, nor on who shares the step: of two processes each draws what one would."""
    whole = drawn(prompts, 4, 7, processor)
    assert drawn(prompts[::-1], 1, 7, processor) == whole
    assert drawn(prompts[::2], 4, 7, processor) | drawn(prompts[1::2], 3, 7, processor) == whole
    assert drawn(prompts, 4, 8, processor) != whole
    assert len({digits(sample) for samples in whole.values() for sample in samples}) == 8


def test_a_step_is_drawn_without_dropout_and_leaves_the_network_training(
    prompts: list[Example], processor: Processor
) -> None:
    model = adapted(from_random(BASE, 0), 1, targets=("language.*", "connector.*"), dropout=0.5)
    objective = Rewards(RewardOptions(samples=2), Reference(None), worth_of_letters, processor.decode, 4)
    with rounding.KeepFP64():
        prepared = objective.prepare(accumulation(model, objective), prompts, 7)
    assert model.training
    ids = [row["input_ids"][row["token_type_ids"] > 0].tolist() for row in prepared]
    assert ids == [list(itertools.chain(*samples)) for samples in drawn(prompts, 4, 7, processor).values()]


def test_answers_worth_the_same_teach_nothing() -> None:
    """Whatever their worth: it is not a matter of rounding. And an advantage is what it is above the mean of others."""
    worth = torch.tensor([[0.3, 0.3, 0.3, 0.3], [1.0, 0.0, 0.5, 0.5]])
    assert not advantages_of(worth)[0].any()
    assert advantages_of(worth)[1].tolist() == pytest.approx([2 / 3, -2 / 3, 0, 0])
    objective = Rewards(RewardOptions(kl=0.0), Reference(None), worth_of_letters, digits, 2)
    log_probs = torch.full((2, 4), -1.5, requires_grad=True)
    tokens = torch.tensor([[2, 2, 2, 2], [1, 1, 2, 2]])
    loss = objective.loss_of(log_probs, worth, torch.full((2, 4), -2.0), tokens, total=2)
    loss.value.backward()
    assert log_probs.grad is not None
    assert not log_probs.grad[0].any()
    assert log_probs.grad[1].tolist() == pytest.approx([-1 / 12, 1 / 12, 0, 0])
    assert {name: float(figure) / 2 for name, figure in loss.figures.items()} == pytest.approx(
        {EXAMPLES: 1, "reward": 0.4, "kl": (0.25 + 1 / 3) / 2, "same_reward": 50, "sample_tokens": 1.75}
    )


def test_an_example_is_its_prompt_and_its_record(records: list[dict[str, Any]], processor: Processor) -> None:
    example = PaliGemmaDataset(records, processor, "prompt")[2, 1]
    assert torch.equal(example["input_ids"], processor.encode(records[2]["prefix"])["input_ids"])
    assert "labels" not in example
    assert example["record"] == {name: value for name, value in records[2].items() if name != "image"}


def test_lengths_leave_room_for_all_samples(records: list[dict[str, Any]], processor: Processor) -> None:
    """Beside the longest prompt; and say how long an answer may be."""
    found = measure(records, processor, "prompt")
    longest = found.sampled(samples=4, new_tokens=9).longest
    assert longest.supervised == 36
    assert longest.text == len(processor.prompt_ids(records[3]["prefix"])) + 36
    assert longest.answer == found.longest_answer == len(processor.answer_ids("three"))
    assert found.sampled(4, 9).mean_supervised == 4 * measure(records, processor, "rotate").mean_supervised
