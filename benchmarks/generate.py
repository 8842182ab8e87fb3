"""Answering beside the library's `generate`: eight questions of different lengths on two images, greedy.

    python -m benchmarks.generate --checkpoint DIR --output benchmarks/RESULTS.md

Five questions belong to the first image and three to the second. Ours encodes each image once and pads on the
right; the library encodes the image of every row and pads on the left. Both make exactly `--new-tokens` tokens.
First the gate: the same tokens in fp32, on two layers of each tower.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import side_by_side
from finetune import cli
from model import PaliGemma, PaliGemmaConfig

NAME = "benchmarks.generate"
IMAGE_OF_ROW = (0, 0, 0, 0, 0, 1, 1, 1)
PROMPT_LENGTHS = (8, 9, 11, 13, 14, 16, 18, 20)
NO_TOKEN = 2**20  # an end that is never reached: in no vocabulary
Generate = Callable[[dict[str, Tensor], int], Tensor]  # batch and number of new tokens -> new tokens i64 [B, T]


def ours(case: Path, dtype: torch.dtype, device: torch.device) -> Generate:
    return ours_on(PaliGemma.from_pretrained(case / "checkpoint", dtype=dtype, device=device))


def ours_on(model: PaliGemma) -> Generate:
    """Each image is encoded once; the model's config is changed: no token ends an answer."""
    model.config = dataclasses.replace(model.config, eos_token_id=NO_TOKEN)

    def run(batch: dict[str, Tensor], count: int) -> Tensor:
        with torch.inference_mode():
            features = model.encode_images(batch["pixel_values"])[batch["image_index"]]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return model.generate(input_ids=ids, attention_mask=mask, image_features=features, max_new_tokens=count)

    return run


def library(case: Path, dtype: torch.dtype, device: torch.device) -> Generate:
    return library_on(side_by_side.library_model(case / "checkpoint", dtype, device).eval())


def library_on(model: Any) -> Generate:
    def run(batch: dict[str, Tensor], count: int) -> Tensor:
        ids, mask = batch["left_padded_ids"], batch["attention_mask"].flip(1)
        tokens: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=torch.zeros_like(ids),
            pixel_values=batch["pixel_values"][batch["image_index"]],
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return tokens[:, ids.shape[1] :]

    return run


ARMS = {"ours": ours, "library": library}


def make_batch(config: PaliGemmaConfig) -> dict[str, Tensor]:
    """Random prompts, padded on the right and once more on the left; images, and the image of each row."""
    generator = torch.Generator().manual_seed(0)
    images, count = config.num_image_tokens, len(PROMPT_LENGTHS)
    ids = torch.full((count, images + max(PROMPT_LENGTHS)), config.pad_token_id)
    mask, left = torch.zeros_like(ids), ids.clone()
    for row, length in enumerate(PROMPT_LENGTHS):
        words = torch.randint(3, min(config.image_token_id, 256_000), (length,), generator=generator)
        prompt = torch.cat((torch.full((images,), config.image_token_id), words))
        ids[row, : len(prompt)] = left[row, -len(prompt) :] = prompt
        mask[row, : len(prompt)] = 1
    pixels = torch.rand(max(IMAGE_OF_ROW) + 1, *config.pixel_shape, generator=generator) * 2 - 1
    made = {"input_ids": ids, "attention_mask": mask, "left_padded_ids": left}
    return made | {"pixel_values": pixels, "image_index": torch.tensor(IMAGE_OF_ROW)}


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = side_by_side.start(arguments)
    generate = ARMS[arguments.arm](arguments.case, dtype, device)
    batch = side_by_side.read_batch(arguments.case, device)
    since = side_by_side.reset_peak(device)
    tokens = generate(batch, arguments.new_tokens).tolist()
    seconds = side_by_side.timed(lambda: generate(batch, arguments.new_tokens), arguments.steps, device)
    return {"seconds": seconds, **side_by_side.peaks(device), "tokens": tokens, "since": since}


def gate(case: Path, arguments: argparse.Namespace, *more: str) -> list[str]:
    """Every row that the two answer differently, in fp32."""
    exactly = side_by_side.exactly(arguments)
    mine, other = (side_by_side.fresh(NAME, arm, case, exactly, *more)["tokens"] for arm in ARMS)
    pairs = enumerate(zip(mine, other, strict=True))
    return [f"row {row}: ours {a}, library {b}" for row, (a, b) in pairs if a != b]


def main(argv: Sequence[str]) -> None:
    parser = side_by_side.parser(NAME, __doc__)
    parser.add_argument("--new-tokens", type="positive", default=4, help="tokens to generate (default: %(default)s)")
    if (arguments := side_by_side.parse(parser, argv, list(ARMS), run_arm)) is None:
        return
    more = ("--new-tokens", str(arguments.new_tokens))
    with side_by_side.workplace(arguments) as (place, checkpoint):
        batch = make_batch(PaliGemmaConfig.from_directory(checkpoint))
        shallow = side_by_side.write_shallow(checkpoint, place / "layers")
        case = side_by_side.write_case(place / "gate", shallow, batch)
        side_by_side.refuse(gate(case, arguments, *more))
        case = side_by_side.write_case(place / "case", checkpoint, batch)
        results = side_by_side.by_turns(NAME, list(ARMS), case, arguments, *more)
    weighed = {"s/batch": "seconds", **side_by_side.MEMORY[torch.device(arguments.device).type]}
    answers = [entries[0].get("tokens", []) for entries in results.values()]
    same = sum(a == b for a, b in zip(*answers, strict=False))
    parts = side_by_side.compared(results, weighed, {})
    parts.append(
        f"8 questions on 2 images, {arguments.new_tokens} new tokens. Gate passed: the same tokens in fp32; in "
        f"{arguments.dtype} {same} of 8 rows are the same."
    )
    side_by_side.report(NAME, argv, arguments.output, parts)


if __name__ == "__main__":
    cli.run(main)
