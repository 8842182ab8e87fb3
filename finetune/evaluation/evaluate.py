"""Answers generated and scored: the loss of the majority answer, and the metric of the task (tasks.py).

Every image passes the vision tower once for all its questions. Several processes share the images, and each has all
answers in the end; where they share sharded layers, too, they compute equally many batches, and tokens of answers in
each, some of which are dropped (finetune/system/sharding.py). Logits of a data set are never kept.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data import Processor, collate
from finetune.evaluation.answer import Answer
from finetune.evaluation.score import Score
from finetune.evaluation.tasks import Task
from finetune.evaluation.vqa_accuracy import write_results
from finetune.system import distributed, sharding
from finetune.system.device import first_line, free_memory, is_out_of_memory
from model import IGNORE_INDEX, PaliGemma
from model.progress import Progress, silent

METRICS_FILE, ANSWERS_FILE = "metrics.json", "answers.jsonl"
Record = Mapping[str, Any]
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one network answered, and how good that is."""

    generated: dict[str, Answer]
    task: Task
    score: Score
    max_new_tokens: int

    @property
    def answers(self) -> dict[str, str]:
        """The texts, by the id of the record."""
        return {name: answer.text for name, answer in self.generated.items()}

    @property
    def unfinished(self) -> int:
        """Answers that reached `max_new_tokens` without `<eos>`."""
        return sum(not answer.finished for answer in self.generated.values())

    def save(self, directory: Path, records: Iterable[Record], **facts: Any) -> None:
        """Write `results.json` in the official format, `answers.jsonl` with what was asked, expected and answered, and
        `metrics.json` with the score and `facts` about the run.
        """
        directory.mkdir(parents=True, exist_ok=True)
        write_results(directory / "results.json", self.answers)
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self.answered(records))
        (directory / ANSWERS_FILE).write_text("".join(lines), encoding="utf-8")
        generated = {"task": self.task.name, "unfinished": self.unfinished, "max_new_tokens": self.max_new_tokens}
        write_metrics(directory, self.score, **generated, **facts)

    def answered(self, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """The lines of `answers.jsonl`: `score` as the task values the answer, `confidence` as `Answer` has it."""
        for record in records:
            answer = self.generated[record["id"]]
            yield {
                "id": record["id"],
                "image_id": record["image_id"],
                "question": record["question"] or record["prefix"],
                "answer_type": record["answer_type"],
                "question_type": record["question_type"],
                "expected": list(record["answers"]),
                "answer": answer.text,
                "score": round(self.score.values[record["id"]], 2),
                "confidence": round(answer.confidence, 4),
                "finished": answer.finished,
            }


def write_metrics(directory: Path, score: Score, **facts: Any) -> None:
    """Write `metrics.json` with a score, and `facts` about what was scored."""
    directory.mkdir(parents=True, exist_ok=True)
    metrics = json.dumps({**score.to_dict(), **facts}, indent=2, ensure_ascii=False) + "\n"
    (directory / METRICS_FILE).write_text(metrics, encoding="utf-8")


def unfinished_note(unfinished: int, answers: int, max_new_tokens: int, where: str) -> str | None:
    """What a person should know of answers that were cut off, or None. where: what sets the limit."""
    if not unfinished:
        return None
    return (
        f"{unfinished:,} of {answers:,} answers did not end within {max_new_tokens} tokens and are cut off: if they "
        f"should be longer, raise {where}"
    )


def evaluate(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    task: Task,
    max_new_tokens: int,
    **settings: Any,
) -> Evaluation:
    """Answers to all records, scored by the task's metric; `settings` as in `generate_answers`."""
    answers = generate_answers(model, processor, records, max_new_tokens, **settings)
    return Evaluation(answers, task, task.score(answers, records), max_new_tokens)


def generate_answers(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Progress = silent,
    **sampling: Any,
) -> dict[str, Answer]:
    """The answer to each record by its id, in the records' order; `sampling` is passed on to `PaliGemma.generate`."""

    def answer(rows: list[Record], features: Tensor) -> dict[str, Answer]:
        texts = collate([processor.encode(row["prefix"]) for row in rows], processor.pad_id)
        inputs: dict[str, Any] = {name: texts[name].to(model.device) for name in ("input_ids", "attention_mask")}
        settings = {"max_new_tokens": max_new_tokens, "is_done": sharding.every_process, **sampling}
        new = model.generate_scored(**inputs, image_features=features, **settings)
        given = (answer_of(processor, ids, log_probs) for ids, log_probs in new.rows(processor.eos_id))
        return dict(zip((row["id"] for row in rows), given, strict=True))

    answers: dict[str, Answer] = {}
    for answered in in_batches(model, processor, records, batch_size, answer, progress):
        answers |= answered
    answers = {name: answer for shard in distributed.gather(answers) for name, answer in shard.items()}
    return {record["id"]: gathered(*answers[record["id"]]) for record in records}


def answer_of(processor: Processor, ids: list[int], log_probs: list[float]) -> Answer:
    """An answer of its tokens, `<eos>` among them unless it was cut off, and their log-probabilities."""
    tokens = zip(map(processor.token_text, ids), log_probs, strict=True)
    return Answer(processor.decode(ids), ids[-1] == processor.eos_id, statistics.fmean(log_probs), tuple(tokens))


def gathered(text: str, finished: bool, log_prob: float, tokens: Iterable[tuple[str, float]]) -> Answer:
    """An answer, which came as lists where another process made it."""
    return Answer(text, finished, log_prob, tuple((token, found) for token, found in tokens))


@torch.inference_mode()
def mean_loss(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    batch_size: int = 16,
    progress: Progress = silent,
) -> float:
    """Cross-entropy of the majority answers, in nats per token; records without an answer are left out."""
    answered = [position for position, record in enumerate(records) if record["answers"]]

    def lose(rows: list[Record], features: Tensor) -> tuple[float, int]:
        texts = collate([processor.encode(row["prefix"], row["answer"]) for row in rows], processor.pad_id)
        inputs = {name: tensor.to(model.device) for name, tensor in texts.items()}
        loss = model(**inputs, image_features=features, num_items_in_batch=1).loss
        return float(loss), int((texts["labels"] != IGNORE_INDEX).sum())

    losses = list(in_batches(model, processor, records, batch_size, lose, progress, answered))
    total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    total, tokens = distributed.total(total), int(distributed.total(tokens))
    return total / tokens if tokens else float("nan")


@torch.inference_mode()
def in_batches(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    batch_size: int,
    work: Callable[[list[Record], Tensor], Result],
    progress: Progress = silent,
    positions: Sequence[int] | None = None,
) -> Iterator[Result]:
    """What `work` makes of all records, or of those at `positions`, batch by batch: of their rows and the image tokens
    [B, N, D] of their images.

    Questions of one image are side by side, so that each image passes the vision encoder once. Of several processes
    each has its share of the images. A batch that runs out of memory is repeated in halves, as are all after it.
    """
    model.eval()
    ids = [record["image_id"] for record in records]
    ordered = sorted((ids[i], i) for i in (range(len(ids)) if positions is None else positions))
    images = list(dict.fromkeys(image_id for image_id, _ in ordered))
    mine = set(images[distributed.rank() :: distributed.count()])
    batches = Batches([i for image_id, i in ordered if image_id in mine], batch_size)
    features: dict[str, Tensor] = {}
    for batch in progress(batches, len(batches)):
        rows = [records[i] for i in batch or [0]]  # an empty batch: others have one, and sharded layers need all
        try:
            with sharding.same_memory(model.language_model.model):
                features = encode_new(model, processor, rows, features)
                result = work(rows, torch.stack([features[row["image_id"]] for row in rows]))
        except Exception as error:
            if not is_out_of_memory(error) or not batches.can_halve:
                raise
            reason = first_line(error)
        else:
            if batch:
                yield result
            continue
        features = {}
        free_memory(model.device)
        batches.halve(reason)


class Batches:
    """Indices in batches of `size`; one that was too large comes again, in halves.

    Processes that share sharded layers have equally many, of one size: the last ones may be empty.
    """

    def __init__(self, indices: list[int], size: int) -> None:
        self.indices, self.size, self.done, self.last = indices, size, 0, 0

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        while sharding.any_process(self.done < len(self.indices)):
            batch = self.indices[self.done : self.done + self.size]
            self.last = len(batch)
            self.done += len(batch)
            yield batch

    @property
    def largest(self) -> int:
        """The size of the batch at work, or of the largest one that a process may have."""
        return self.size if sharding.shards_layers() else self.last

    @property
    def can_halve(self) -> bool:
        return self.largest > 1

    def halve(self, reason: str) -> None:
        self.done -= self.last
        largest, self.size = self.largest, self.largest // 2
        warnings.warn(
            f"out of memory with {largest} questions at once ({reason}): repeated, and from here on {self.size} at "
            "once; a smaller evaluation.batch_size (--batch-size) saves the attempt",
            stacklevel=3,
        )


def encode_new(
    model: PaliGemma, processor: Processor, rows: list[Record], known: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Image tokens [N, D] of the rows' images, by id: those that are known, others encoded; no more are kept."""
    images = {row["image_id"]: row["image"] for row in rows}
    features = {name: known[name] for name in images if name in known}
    if new := [name for name in images if name not in features]:
        pixels = torch.stack([processor.pixels(images[name]) for name in new])
        features |= zip(new, model.encode_images(pixels.to(model.device)), strict=True)
    return features
