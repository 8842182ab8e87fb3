"""Answers generated, or chosen among candidates, and scored: the loss of the majority answer, and the metric of the
task (tasks.py).

Every image passes the vision tower once for all its questions (batches.py). Several processes share the records, and
each has all answers in the end; where they share sharded layers, too, they compute equally many tokens of answers in
each batch, some of which are dropped (finetune/system/sharding.py). Logits of a data set are never kept.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Processor, collate
from finetune.evaluation.answer import Answer
from finetune.evaluation.batches import in_batches
from finetune.evaluation.candidates import GENERATED, Candidates, most_likely
from finetune.evaluation.mixture import SEPARATOR
from finetune.evaluation.score import Score
from finetune.evaluation.tasks import Task, is_right
from finetune.evaluation.vqa_accuracy import write_results
from finetune.system import distributed, sharding
from model import IGNORE_INDEX, PaliGemma
from model.progress import Progress, silent

METRICS_FILE, ANSWERS_FILE = "metrics.json", "answers.jsonl"
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one network answered, and how good that is."""

    given: dict[str, Answer]
    task: Task
    score: Score
    max_new_tokens: int
    candidates: Candidates = GENERATED
    labels: Mapping[str, Answer] = dataclasses.field(default_factory=dict)
    """The most likely label of records whose task asks for it, by their id."""

    @property
    def answers(self) -> dict[str, str]:
        """The texts, by the id of the record."""
        return {name: answer.text for name, answer in self.given.items()}

    @property
    def unfinished(self) -> int:
        """Answers that reached `max_new_tokens` without `<eos>`."""
        return sum(not answer.finished for answer in self.given.values())

    def save(self, directory: Path, records: Iterable[Record], **facts: Any) -> None:
        """Write `results.json` in the official format, `answers.jsonl` with what was asked, expected and answered, and
        `metrics.json` with the score and `facts` about the run.
        """
        directory.mkdir(parents=True, exist_ok=True)
        write_results(directory / "results.json", self.answers)
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self.answered(records))
        (directory / ANSWERS_FILE).write_text("".join(lines), encoding="utf-8")
        made = {"task": self.task.name, "unfinished": self.unfinished}
        chosen = {"candidates": list(self.candidates.answers)}
        made |= chosen if self.candidates.answers else {"max_new_tokens": self.max_new_tokens}
        write_metrics(directory, self.score, **made, **facts)

    def answered(self, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """The lines of `answers.jsonl`: `score` as the task values the answer, `confidence` as `Answer` has it; where
        candidates or labels were scored, `candidates` has the most likely ones.
        """
        for record in records:
            answer = self.given[record["id"]]
            listed = self.labels.get(record["id"], answer).listed
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
                **({"candidates": listed} if listed else {}),
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
    candidates: Candidates = GENERATED,
    **settings: Any,
) -> Evaluation:
    """Answers to all records, scored by the task's metric; `settings` as in `generate_answers`."""
    if candidates.answers:
        answers = choose_answers(model, processor, records, candidates.answers, **settings)
    else:
        answers = generate_answers(model, processor, records, max_new_tokens, **settings)
    score, labels = task.score(answers, records), dict[str, Answer]()
    for source, texts in candidates.labels.items():
        some = [i for i, record in enumerate(records) if not source or record["id"].startswith(source + SEPARATOR)]
        if some:
            chosen = choose_answers(model, processor, records, texts, positions=some, **settings)
            right = statistics.fmean(is_right(chosen[records[i]["id"]].text, records[i]) for i in some)
            score, labels = score.with_other("accuracy among labels", 100 * right, source), labels | chosen
    return Evaluation(answers, task, score, max_new_tokens, candidates, labels)


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

    def answer(rows: list[Record], features: Tensor | None) -> dict[str, Answer]:
        texts = collate([processor.encode(row["prefix"], image=features is not None) for row in rows], processor.pad_id)
        inputs: dict[str, Any] = {name: texts[name].to(model.device) for name in ("input_ids", "attention_mask")}
        settings = {"max_new_tokens": max_new_tokens, "is_done": sharding.every_process, **sampling}
        new = model.generate_scored(**inputs, image_features=features, **settings)
        given = (answer_of(processor, ids, log_probs) for ids, log_probs in new.rows(processor.eos_id))
        return dict(zip((row["id"] for row in rows), given, strict=True))

    return in_order(in_batches(model, processor, records, batch_size, answer, progress), records)


def choose_answers(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    candidates: Sequence[str],
    batch_size: int = 16,
    progress: Progress = silent,
    positions: Sequence[int] | None = None,
) -> dict[str, Answer]:
    """The most likely of the candidates for each record, or for those at `positions`, by its id, in the records' order.

    Raises:
        ValueError: a candidate holds what no answer may hold, such as a special token.
    """
    tokens = [processor.answer_ids(text) for text in candidates]

    def choose(rows: list[Record], features: Tensor | None) -> dict[str, Answer]:
        texts = collate([processor.encode(row["prefix"], image=features is not None) for row in rows], processor.pad_id)
        asked, mask = texts["input_ids"], texts["attention_mask"]
        scores = model.score(asked, [tokens] * len(rows), attention_mask=mask, image_features=features)
        pairs = zip(scores.log_probs, scores.tokens, strict=True)
        chosen = (most_likely(candidates, log_probs.cpu(), counts) for log_probs, counts in pairs)
        return dict(zip((row["id"] for row in rows), chosen, strict=True))

    return in_order(in_batches(model, processor, records, batch_size, choose, progress, positions), records)


def in_order(batches: Iterable[dict[str, Answer]], records: Sequence[Record]) -> dict[str, Answer]:
    """The answers of all batches and processes by the ids of their records, in the records' order."""
    mine = {name: answer for batch in batches for name, answer in batch.items()}
    answers = {name: answer for shard in distributed.gather(mine) for name, answer in shard.items()}
    ids = (record["id"] for record in records)
    return {name: gathered(*answers[name]) for name in ids if name in answers}


def answer_of(processor: Processor, ids: list[int], log_probs: list[float]) -> Answer:
    """An answer of its tokens, `<eos>` among them unless it was cut off, and their log-probabilities."""
    tokens = zip(map(processor.token_text, ids), log_probs, strict=True)
    return Answer(processor.decode(ids), ids[-1] == processor.eos_id, statistics.fmean(log_probs), tuple(tokens))


def gathered(
    text: str,
    finished: bool,
    log_prob: float,
    tokens: Iterable[tuple[str, float]],
    candidates: Iterable[tuple[str, float]],
) -> Answer:
    """An answer, which came as lists where another process made it."""
    pairs = (tuple((piece, found) for piece, found in some) for some in (tokens, candidates))
    return Answer(text, finished, log_prob, *pairs)


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

    def lose(rows: list[Record], features: Tensor | None) -> tuple[float, int]:
        encoded = [processor.encode(row["prefix"], row["answer"], features is not None) for row in rows]
        texts = collate(encoded, processor.pad_id)
        inputs = {name: tensor.to(model.device) for name, tensor in texts.items()}
        loss = model(**inputs, image_features=features, num_items_in_batch=1).loss
        return float(loss), int((texts["labels"] != IGNORE_INDEX).sum())

    losses = list(in_batches(model, processor, records, batch_size, lose, progress, answered))
    total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    total, tokens = distributed.total(total), int(distributed.total(tokens))
    return total / tokens if tokens else float("nan")
