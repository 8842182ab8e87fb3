"""A source as a configuration names it -> records: the official VQA files, or a person's own JSON lines."""

from typing import Literal

import datasets

from data.jsonl import load_jsonl
from data.vqav2 import load_vqav2


def load_records(
    *,
    questions: str | None = None,
    annotations: str | None = None,
    images: str | None = None,
    jsonl: str | None = None,
    fraction: float | None = None,
    count: int | None = None,
    sample_by: Literal["image", "question"] = "image",
    prompt: str = "answer en {question}",
    seed: int = 0,
) -> datasets.Dataset:
    """Records (data/records.py) of one source; which arguments mean what, say `load_vqav2` and `load_jsonl`."""
    if jsonl is not None:
        return load_jsonl(jsonl, images=images, fraction=fraction, count=count, sample_by=sample_by, seed=seed)
    if questions is None:
        raise ValueError("a source needs questions (with annotations and images), or jsonl")
    return load_vqav2(
        questions, annotations, images, prompt=prompt, fraction=fraction, count=count, sample_by=sample_by, seed=seed
    )
