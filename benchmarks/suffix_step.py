"""One training step of rows with several answers: what each further one costs, and a preference pair beside two rows.

    python -m benchmarks.random_checkpoint --output /tmp/paligemma-3b-random
    python -m benchmarks.suffix_step --checkpoint /tmp/paligemma-3b-random --output benchmarks/RESULTS.md

A step: one image through tower and connector, forward, backward, AdamW on fp32 adapters (rank 16, all language
linears), gradients dropped; 13 prefix tokens, nothing is recomputed. Arms:

- one, four, ten: so many answers of 3 tokens in one row; four-rows: those of `four` in rows of their own, whose image
  is encoded once;
- pair: DPO of answers of 12 and 3 tokens in one row, the reference's log-probabilities known; pair-live: computed in
  the step; pair-rows: both answers in rows of their own with images of their own, and the reference computed in the
  step, which is how two rows and a live reference are trained elsewhere.

First a check: a pair has the same first loss in one row and in two, as have four answers; adapters are off their start.
Planned and measured are bytes without what libraries take (on a CPU what the process had before it opened the network).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import side_by_side
from benchmarks.arms import PREFIX_TOKENS, RANK, SUFFIX_TOKENS, take_step
from data import collate
from finetune import cli
from finetune.config.schema import PreferenceOptions
from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.lora.protocol import trained_parameters
from finetune.preflight.plan import CONTEXT, GIB, Planner
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.preferences import Preferences, answer_log_probs
from finetune.training.reference import Reference
from model import IGNORE_INDEX, PaliGemma, TokenBatch

NAME = "benchmarks.suffix_step"
LORA = LoRAConfig(rank=RANK, alpha=RANK)
CHOSEN_TOKENS = 12
KNOWN = -30.0  # a log-probability that stands for a kept one
ANSWERS = {  # of each arm its rows, and of each row the tokens of its answers
    "one": [[SUFFIX_TOKENS]],
    "four": [[SUFFIX_TOKENS] * 4],
    "ten": [[SUFFIX_TOKENS] * 10],
    "four-rows": [[SUFFIX_TOKENS]] * 4,
    "pair": [[CHOSEN_TOKENS, SUFFIX_TOKENS]],
    "pair-live": [[CHOSEN_TOKENS, SUFFIX_TOKENS]],
    "pair-rows": [[CHOSEN_TOKENS], [SUFFIX_TOKENS]],
}
SAME_LOSS = (("four", "four-rows"), ("pair-live", "pair-rows"))
SAME = 0.05  # of a loss, which bf16 rounds in each row otherwise
COLUMNS = {  # heading -> what was measured, and digits after the point
    "tokens": ("tokens", 0),
    "s/step": ("seconds", 3),
    "peak, GiB": ("peak", 3),
    "planned, GiB": ("planned", 3),
    "first loss": ("loss", 4),
}


def start_adapters(model: PaliGemma) -> None:
    """Random values, with which the network is not its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * parameter.shape[-1] ** -0.5)


def make_rows(model: PaliGemma, answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch of random tokens: every row has the same prefix, and the next of the same answers."""
    config, generator = model.config, torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[int]:
        return torch.randint(3, min(config.image_token_id, 256_000), (count,), generator=generator).tolist()

    prefix, examples = [config.image_token_id] * config.num_image_tokens + drawn(PREFIX_TOKENS), []
    for row in answers:
        texts = [drawn(tokens) for tokens in row]
        types = [number for number, text in enumerate(texts, start=1) for _ in text]
        ids = prefix + [token for text in texts for token in text]
        labels = [IGNORE_INDEX] * len(prefix) + ids[len(prefix) :]
        example = {"input_ids": ids, "token_type_ids": [0] * len(prefix) + types, "labels": labels}
        examples.append({name: torch.tensor(values) for name, values in example.items()})
    return collate(examples, config.pad_token_id)


def answers_loss(model: PaliGemma, batch: TokenBatch, pixels: Tensor) -> Tensor:
    """Cross-entropy of all answers to one image."""
    with torch.no_grad():
        features = model.encode_images(pixels)
    result = model(batch=batch, image_features=features.expand(len(batch.input_ids), -1, -1)).loss
    assert isinstance(result, Tensor), "the batch has labels"
    return result


def pair_loss(model: PaliGemma, batch: TokenBatch, pixels: Tensor, live: bool) -> Tensor:
    """DPO of one pair, in a row of its own or in two, each of which has its image."""
    rows, reference = len(batch.input_ids), Reference(None)
    objective, tokens = Preferences(PreferenceOptions(), reference), torch.tensor([[CHOSEN_TOKENS, SUFFIX_TOKENS]])

    def log_probs() -> Tensor:
        with torch.no_grad():
            features = model.encode_images(pixels.expand(rows, *pixels.shape[1:]))
        return answer_log_probs(model.supervised_logits(batch, features), batch, tokens)

    known = torch.full((1, 2), KNOWN)
    if live:
        with reference.in_place(model):
            known = log_probs()
    return objective.loss_of(log_probs(), known, tokens, total=1).value


LOSSES: dict[str, Callable[[PaliGemma, TokenBatch, Tensor], Tensor]] = {
    **dict.fromkeys(("one", "four", "ten", "four-rows"), answers_loss),
    "pair": functools.partial(pair_loss, live=False),
    **dict.fromkeys(("pair-live", "pair-rows"), functools.partial(pair_loss, live=True)),
}


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a step of one arm measures."""
    device, dtype = side_by_side.start(arguments)
    before = 0.0 if device.type == "cuda" else side_by_side.status_gib("VmRSS")
    model = PaliGemma.from_pretrained(arguments.case, dtype, device)
    inject_lora(model, LORA)
    start_adapters(model)
    texts = make_rows(model.train(), ANSWERS[arguments.arm])
    batch = TokenBatch.of(model.config.image_token_id, **texts).to(device)
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(1, *model.config.pixel_shape, generator=generator) * 2 - 1).to(device, dtype)

    def loss(_: dict[str, Tensor]) -> Tensor:
        return LOSSES[arguments.arm](model, batch, pixels)

    step = take_step((trained_parameters(model), loss))
    since = side_by_side.reset_peak(device)
    measured = step({}, True)
    seconds = side_by_side.timed(lambda: step({}, False), arguments.steps, device)
    peaks = side_by_side.peaks(device)
    return {
        "seconds": seconds,
        "peak": peaks.get("reserved", peaks.get("rss", 0.0)) - before,
        "planned": planned(model, arguments.arm, dtype, device),
        "tokens": int(texts["attention_mask"].sum()),
        "since": since,
        **peaks,
        **measured,
    }


def planned(model: PaliGemma, arm: str, dtype: torch.dtype, device: torch.device) -> float:
    """GiB of the step by the plan, without the libraries' own memory."""
    rows = ANSWERS[arm]
    most = max(map(sum, rows))
    tokens = model.config.num_image_tokens + PREFIX_TOKENS + most
    planner = Planner(model.config, LORA, dtype, tokens, most, len(rows), device)
    return (planner.plan(ExecutionPlan(len(rows)), 0).total - CONTEXT) / GIB


def other_losses(results: side_by_side.Results) -> list[str]:
    """Arms that should have the same first loss, and differ by more than `SAME`."""
    losses = {arm: found[0]["loss"] for arm, found in results.items() if found and "loss" in found[0]}
    wrong = []
    for one, other in SAME_LOSS:
        if one in losses and other in losses and abs(losses[one] - losses[other]) > SAME * abs(losses[one]):
            wrong.append(f"{other}: first loss {losses[other]} instead of {losses[one]}")
    return wrong


def table(results: side_by_side.Results) -> str:
    """A row an arm, median (smallest..largest) of the rounds; the ratios are to `one`."""
    body = [["arm", *COLUMNS, "time to one", "peak to one"]]
    for arm, found in results.items():
        fitted = [entry for entry in found if "seconds" in entry]
        cells = [side_by_side.spread([entry[key] for entry in fitted], digits) for key, digits in COLUMNS.values()]
        beside = [(entry, first) for entry, first in zip(found, results["one"], strict=True) if "seconds" in entry]
        for key in ("seconds", "peak"):
            cells.append(side_by_side.spread([entry[key] / first[key] for entry, first in beside], 2))
        body.append([arm, *cells])
    return side_by_side.rows(body)


def main(argv: Sequence[str]) -> None:
    parser = side_by_side.parser(NAME, __doc__)
    if (arguments := side_by_side.parse(parser, argv, tuple(ANSWERS), run_arm)) is None:
        return
    with side_by_side.workplace(arguments) as (_, checkpoint):
        results = side_by_side.by_turns(NAME, tuple(ANSWERS), checkpoint, arguments)
    side_by_side.refuse(other_losses(results))
    since = sorted({entry["since"] for found in results.values() for entry in found if "since" in entry})
    note = f"{arguments.dtype}. Peak since {' or '.join(since)}."
    side_by_side.report(NAME, argv, arguments.output, [table(results), note])


if __name__ == "__main__":
    cli.run(main)
