"""Answers generated and scored: the loss of the majority answer, and the official VQA accuracy.

Every picture passes the vision tower once for all its questions. Logits of a data set are never kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import PaliGemmaDataset, Processor, collate
from finetune.vqa_accuracy import VQAScore, score, write_results
from model import IGNORE_INDEX, PaliGemma

Record = Mapping[str, Any]
Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (batches, how many) -> the same, shown


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one network answered, and how good that is."""

    answers: dict[str, str]
    score: VQAScore

    def save(self, directory: Path, **facts: Any) -> None:
        """Write `results.json` in the official format and `metrics.json` with the score and `facts` about the run."""
        directory.mkdir(parents=True, exist_ok=True)
        write_results(directory / "results.json", self.answers)
        metrics = json.dumps({**self.score.to_dict(), **facts}, indent=2, ensure_ascii=False) + "\n"
        (directory / "metrics.json").write_text(metrics, encoding="utf-8")


def silent(batches: Iterable[Any], total: int) -> Iterable[Any]:
    return batches


def evaluate(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    batch_size: int = 16,
    max_new_tokens: int = 16,
    progress: Progress = silent,
) -> Evaluation:
    """Greedy answers to all records, scored by the official metric."""
    answers = generate_answers(model, processor, records, batch_size, max_new_tokens, progress=progress)
    return Evaluation(answers, score(answers, records))


@torch.inference_mode()
def generate_answers(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    batch_size: int = 16,
    max_new_tokens: int = 16,
    progress: Progress = silent,
    **sampling: Any,
) -> dict[str, str]:
    """The answer to each record by its id, in the records' order; `sampling` is passed on to `PaliGemma.generate`."""
    model.eval()
    answers: dict[str, str] = {}
    batches = list(by_image(records, batch_size))
    features: dict[str, Tensor] = {}
    for batch in progress(batches, len(batches)):
        rows = [records[i] for i in batch]
        features = encode_new(model, processor, rows, features)
        texts = collate([processor.encode(row["prefix"]) for row in rows], processor.pad_id)
        new = model.generate(
            input_ids=texts["input_ids"].to(model.device),
            attention_mask=texts["attention_mask"].to(model.device),
            image_features=torch.stack([features[row["image_id"]] for row in rows]),
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        for row, tokens in zip(rows, new.tolist(), strict=True):
            answers[row["id"]] = processor.decode(tokens)
    return {record["id"]: answers[record["id"]] for record in records}


def by_image(records: Sequence[Record], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches, questions of one image side by side."""
    order = sorted(range(len(records)), key=lambda i: (records[i]["image_id"], i))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def encode_new(
    model: PaliGemma, processor: Processor, rows: Sequence[Record], known: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Image tokens [N, D] by image id: those of the last batch are kept, for an image may go on in this one."""
    images = {row["image_id"]: row["image"] for row in rows}
    new = [image_id for image_id in images if image_id not in known]
    if new:
        pixels = torch.stack([processor.pixels(images[image_id]) for image_id in new])
        encoded = model.encode_images(pixels.to(model.device))
        known = {**known, **dict(zip(new, encoded, strict=True))}
    return {image_id: known[image_id] for image_id in images}


@torch.inference_mode()
def mean_loss(model: PaliGemma, processor: Processor, records: Sequence[Record], batch_size: int = 16) -> float:
    """Cross-entropy of the majority answers, in nats per token; records without an answer are left out."""
    model.eval()
    answered = [record for record in records if record["answer"]]
    if not answered:
        return float("nan")
    examples = PaliGemmaDataset(answered, processor, answers="majority")
    total, tokens = 0.0, 0
    for batch in by_image(answered, batch_size):
        made = collate([examples[i] for i in batch], processor.pad_id)
        count = int((made["labels"] != IGNORE_INDEX).sum())
        loss = model(**{name: tensor.to(model.device) for name, tensor in made.items()}, num_items_in_batch=count).loss
        total, tokens = total + loss.item() * count, tokens + count
    return total / tokens
