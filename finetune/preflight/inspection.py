"""What the network is about to be taught, looked at before hours are spent: rows as it sees them, leaks, and the data.

An answer leaks where editing it changes what the network predicts before it. Then training looks perfect, and the
trained network is useless. Not here: showing it (finetune/report/inspection_page.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from data import PaliGemmaDataset, Processor, collate
from data.dataset import Answers
from data.invalid import SkippedRecords
from finetune.config.schema import RunConfig
from finetune.preflight.data_checks import Check, answer_checks, duplicate_checks, length_checks, prompt_check
from finetune.preflight.plan import GIB
from finetune.system.device import pick_device, pick_dtype
from finetune.training.examples import (
    network_config,
    open_examples,
    open_processor,
    open_records,
    require_paths,
    skipped_records,
)
from finetune.training.setup import open_model, plan_steps
from finetune.training.step_inputs import has_image
from model import IGNORE_INDEX, PaliGemma, PaliGemmaConfig, fetch
from model.convert import convert
from model.layers import prefix_lm_mask

MOST = 8  # examples that are looked at
CHEAP = GIB  # bytes of weights that are read on a CPU for the leak test

# What to do where a row is not put together as PaliGemma was trained: by check.
ADVICE = {
    "image tokens": "copy config.json, tokenizer.json and the processor's file from one checkpoint",
    "<bos>": "copy config.json, tokenizer.json and the processor's file from one checkpoint",
    "token types": "do not train: report it with this page",
    "labels": "do not train: report it with this page",
    "<eos>": "copy config.json and tokenizer.json from one checkpoint",
    "leak": "do not train: report it with this page",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """The first examples of a run as one batch, those of text alone last, and what was found in them and in all of the
    data.

    Attributes:
        examples: as `PaliGemmaDataset` gives them, row by row those of the batch.
        batch: collated without pixels, i64 [B, S].
        attention: bool [B, S, S], queries by keys, as the network masks them.
    """

    examples: Sequence[Mapping[str, Any]]
    batch: Mapping[str, Tensor]
    attention: Tensor
    processor: Processor
    dimensions: PaliGemmaConfig
    checks: Sequence[Check]


def inspect_examples(config: RunConfig) -> Inspection:
    """The first distinct examples of the run's first step, and the checks of them and of all records. Nothing is
    written.

    Raises:
        ValueError: checkpoint or data cannot be read.
    """
    require_paths(config, "train", "validation")
    directory = fetch(config.model.path, config.model.revision, weights=False)
    dimensions, processor = network_config(directory, config), open_processor(directory, config)
    opened = open_examples(config, "train", processor, skipped_records(config, "train", listed=False))
    # Answers that the network will draw cannot be shown: those that they are compared with are, each in its turn.
    learned: Answers = "rotate" if config.learned_answers == "prompt" else config.learned_answers
    dataset = PaliGemmaDataset(opened.records, processor, learned, config.train.seed, opened.skipped)
    found: dict[str, dict[str, Any]] = {}
    for pair in plan_steps(config, opened.sizes)[0]:
        if len(found) < MOST:
            found.setdefault((example := dataset[pair])["id"], example)
    kinds = [[one for one in found.values() if has_image(one) == of_images] for of_images in (True, False)]
    examples = [example for kind in kinds for example in kind]
    batch = collate([without_pixels(example) for example in examples], processor.pad_id)
    leaks, how = leaking_rows(config, dimensions, [collate(kind, processor.pad_id) for kind in kinds if kind])
    validation = None
    if config.data.validation is not None:
        validation = open_records(config, "validation", SkippedRecords(share=math.inf))
    records = opened.valid
    checks = [
        *batch_checks(dimensions, batch, leaks, how, len(kinds[0])),
        *length_checks(opened.lengths, len(opened.skipped.reasons), processor),
        prompt_check(records),
        *answer_checks(records, learned, processor),
        *duplicate_checks(records, validation),
    ]
    attention = prefix_lm_mask(batch["attention_mask"], batch["token_type_ids"])[:, 0]
    return Inspection(examples, batch, attention, processor, dimensions, checks)


def without_pixels(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in example.items() if name != "pixel_values"}


def batch_checks(
    config: PaliGemmaConfig, batch: Mapping[str, Tensor], leaks: Sequence[int], how: str, with_images: int | None = None
) -> list[Check]:
    """What is wrong with a collated batch, by check.

    Args:
        leaks: the rows that leak. how: this was found out.
        with_images: how many rows, the first ones, have an image; None: all.
    """
    rows = range(len(batch["input_ids"]))
    of_images = len(rows) if with_images is None else with_images
    each = ({name: tensor[row] for name, tensor in batch.items()} for row in rows)
    wrong = [structure_of(config, one, row < of_images) for row, one in enumerate(each)]
    checks = []
    for name, right in right_of(config).items():
        found = [f"row {row} has {wrong[row][name]}" for row in rows if name in wrong[row]]
        checks.append(Check(name, "fail", ", ".join(found), ADVICE[name]) if found else Check(name, "pass", right))
    if leaks:
        said = ", ".join(f"the answer of row {row} leaks into the prefix" for row in leaks)
        return [*checks, Check("leak", "fail", f"{said} ({how})", ADVICE["leak"])]
    return [*checks, Check("leak", "pass", f"no answer leaks into what comes before it ({how})")]


def right_of(config: PaliGemmaConfig) -> dict[str, str]:
    """What every row has, by check."""
    return {
        "image tokens": f"an image has {config.num_image_tokens} at the start of its row, and there are no others",
        "<bos>": "each row has exactly one, after the image tokens",
        "token types": "0 for the prefix, then 1 for the suffix, 2 for a second one",
        "labels": "the suffix, and the suffix alone",
        "<eos>": "every label ends in it",
    }


def structure_of(config: PaliGemmaConfig, row: Mapping[str, Tensor], has_image: bool = True) -> dict[str, str]:
    """What one right-padded row [S] has that it should not, by check: image tokens, bos, token types, labels, eos."""
    length = int(row["attention_mask"].sum())
    ids, types, labels = (row[name][:length].tolist() for name in ("input_ids", "token_type_ids", "labels"))
    expected = config.num_image_tokens * has_image
    supervised = [label != IGNORE_INDEX for label in labels]
    ends = {label for label, kind, after in zip(labels, types, [*types[1:], 0], strict=True) if kind and kind != after}
    checks = {
        "image tokens": (
            f"{ids.count(config.image_token_id)} image tokens, expected {expected} at the start",
            ids[:expected] == [config.image_token_id] * expected and ids.count(config.image_token_id) == expected,
        ),
        "<bos>": (
            f"{ids.count(config.bos_token_id)} <bos>, expected one after the image tokens",
            ids.count(config.bos_token_id) == 1 and ids[expected : expected + 1] == [config.bos_token_id],
        ),
        "token types": (
            "token types that are not 0 for the prefix, then 1 for the suffix, 2 for a second one",
            types == sorted(types) and types[-1] > 0,
        ),
        "labels": (
            "labels that are not the suffix, and the suffix alone",
            supervised == [kind > 0 for kind in types]
            and all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True)),
        ),
        "<eos>": (
            "an answer that does not end in <eos>, so that the network would never stop",
            ends == {config.eos_token_id},
        ),
    }
    return {name: found for name, (found, is_right) in checks.items() if not is_right}


def leaking_rows(
    config: RunConfig, dimensions: PaliGemmaConfig, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[int], str]:
    """The rows of batches that leak, counted from the first row of the first one, and how that was found out: with the
    network itself, unless reading its weights and computing with them takes minutes.
    """

    def rows_of(leaks: Callable[[Mapping[str, Tensor]], list[int]]) -> list[int]:
        starts = accumulate((len(batch["input_ids"]) for batch in batches), initial=0)
        return [start + row for start, batch in zip(starts, batches, strict=False) for row in leaks(batch)]

    device = pick_device(config.model.device)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PaliGemma(dimensions).parameters())
    if device.type == "cpu" and count * pick_dtype(config.model.dtype, device).itemsize > CHEAP:
        return rows_of(leaks_by_mask), "by the attention mask alone: the network is large, and this is a CPU"
    model = open_model(fetch(config.model.path, config.model.revision), config)
    convert(model, dimensions)
    moved = rows_of(lambda batch: leaks_of(model, {name: t.to(model.device) for name, t in batch.items()}))
    return moved, "the first token of each answer was changed, and the network's states compared"


def leaks_by_mask(batch: Mapping[str, Tensor]) -> list[int]:
    """Rows in which a position sees a supervised token that comes after it, or one of another suffix. Where none does,
    no position learns of one over several layers either: the first step on such a way would be one of these.
    """
    types, real = batch["token_type_ids"], batch["attention_mask"].bool()
    seen = prefix_lm_mask(batch["attention_mask"], types)[:, 0]  # (B, S, S)
    positions = torch.arange(types.shape[1])
    hidden = (positions[None, :] > positions[:, None]) | (types[:, :, None] != types[:, None, :])  # (B, S, S)
    leak = seen & hidden & (batch["labels"] != IGNORE_INDEX)[:, None, :] & real[:, :, None]
    leaking: list[int] = leak.any(dim=(1, 2)).nonzero()[:, 0].tolist()
    return leaking


@torch.inference_mode()
def leaks_of(model: PaliGemma, batch: Mapping[str, Tensor]) -> list[int]:
    """Rows in which an edit of the first supervised token moves a prediction made before it, or in another suffix.

    Args:
        batch: right-padded `input_ids`, `attention_mask`, `token_type_ids`, `labels` i64 [B, S] and, of rows
            with images, `pixel_values`.
    """
    model.eval()
    supervised = (batch["labels"] != IGNORE_INDEX) & (batch["input_ids"] != model.config.image_token_id)
    first = supervised.long().argmax(dim=1)  # (B,)
    rows = torch.arange(len(first), device=first.device)
    edited = batch["input_ids"].clone()
    special = max(model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    edited[rows, first] = torch.where(edited[rows, first] == special + 1, special + 2, special + 1)
    features = model.encode_images(batch["pixel_values"]) if has_image(batch) else None
    before, after = (
        model.hidden_states(ids, features, batch["attention_mask"], batch["token_type_ids"])
        for ids in (batch["input_ids"], edited)
    )
    moved = (before != after).any(dim=-1)  # (B, S)
    types = batch["token_type_ids"]
    apart = (types != types[rows, first][:, None]) & batch["attention_mask"].bool()
    hidden = apart | (torch.arange(moved.shape[1], device=first.device) < first[:, None])
    leaking: list[int] = (moved & hidden).any(dim=1).nonzero()[:, 0].tolist()
    return leaking
