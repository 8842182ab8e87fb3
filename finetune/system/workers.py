"""The worker processes that prepare examples, and what a run says when they cannot.

A batch comes back through a pipe as plain bytes. As tensors it would go through shared memory, of which a container has
64 MB, under a file handle for each tensor, of which a process may have 1,024: a step of 64 examples takes 38 MB and 256
handles. A worker that cannot send what it made ends, for the training process would wait for that batch without end.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # to stop a run


def loader(examples: Dataset[Any], batches: Iterable[Any], workers: int) -> DataLoader[Any]:
    """Batches as lists of examples, prepared by so many processes; 0: by this one."""
    return DataLoader(
        WithErrors(examples),
        batch_sampler=batches,
        collate_fn=Batch,
        num_workers=workers,
        worker_init_fn=begin,
    )


class WithErrors(Dataset[Any]):
    """Examples, or instead of one the error that it cannot be made: raised in a worker it would become a traceback."""

    def __init__(self, examples: Dataset[Any]) -> None:
        self.examples = examples

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.examples[key]
        except (ValueError, OSError, MemoryError) as error:
            return error


class Batch(list[Any]):
    """A list of examples whose tensors are pickled as arrays, by value; an image of several examples once."""

    def __reduce__(self) -> tuple[Any, ...]:
        images: dict[str, np.ndarray] = {}  # an array that is met again is pickled as a reference to the first

        def packed(example: Any) -> Any:
            if not isinstance(example, dict):
                return example
            arrays = {name: value.numpy() for name, value in example.items() if isinstance(value, Tensor)}
            if "pixel_values" in arrays:
                arrays["pixel_values"] = images.setdefault(example["image_id"], arrays["pixel_values"])
            return example | arrays

        return unpacked, ([packed(example) for example in self],)


def unpacked(examples: list[Any]) -> Batch:
    """The batch that was packed, with tensors."""

    def restored(example: Any) -> Any:
        if not isinstance(example, dict):
            return example
        return {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in example.items()}

    return Batch(map(restored, examples))


def begin(_worker: int) -> None:
    """In a worker, before its first batch. Ctrl-C reaches all processes of a terminal, and a launcher signals groups of
    them: the training process decides.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def end(error: Exception, _batch: Any) -> None:
    """A batch could not be sent. By default that is printed, and the batch is missing from then on."""
    print(f"a worker process could not send its examples: {error!r}", file=sys.stderr, flush=True)
    os._exit(1)


def explain(error: RuntimeError | OSError) -> str | None:
    """What to tell a person where an error says that a worker died or could not be started; None of other errors."""
    if is_death(error):
        what = "a worker process that prepares examples has ended, often because the machine is out of memory"
    elif isinstance(error, OSError) and any(
        "multiprocessing" in place.filename for place in traceback.extract_tb(error.__traceback__)
    ):
        what = "the worker processes that prepare examples cannot be started"
    else:
        return None
    return (
        f"{what} ({str(error).splitlines()[0]}): lower data.workers; with 0 the training process prepares them itself. "
        "The same command resumes from the last checkpoint"
    )


def is_death(error: BaseException) -> bool:
    """Whether this is the error that torch raises, wherever the training process then is, when a worker has died."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
