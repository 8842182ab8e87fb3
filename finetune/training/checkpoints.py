"""Checkpoints to resume from: trained parameters, optimizer state and the Trainer's state, in safetensors and JSON.

A checkpoint is a directory `step-000100`, whole by its own manifest (system/atomic.py). The data's state is the step
itself, and dropout is keyed by it, so there is no random state to keep.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from finetune.system import distributed, sharding
from finetune.system.atomic import damage, delete_whole, recover, write_whole

TRAINED, OPTIMIZER_STATE = "trained.safetensors", "optimizer.safetensors"
STATE = "trainer_state.json"  # the Trainer's own name
SLACK = 2**20  # bytes beside the tensors: headers, the Trainer's state


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Whole tensors of a run, in host memory: parameters by name, and the optimizer's as `<parameter>/<name>`."""

    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather_state(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> TrainingState:
    """The state of a run, put together from the shards of all processes, which all call this; the first one has it."""
    state = {
        f"{name}/{key}": value
        for name, parameter in trained.items()
        for key, value in optimizer.state[parameter].items()
    }
    return TrainingState(gather_tensors(trained), gather_tensors(state))


def gather_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        whole = distributed.whole(tensor.detach())
        if distributed.is_main():
            found[name] = whole.cpu().contiguous()
    return found


def write_checkpoint(directory: Path, step: int, state: TrainingState, documents: Mapping[str, Any]) -> Path:
    """Write `directory/step-NNNNNN`, `documents` as JSON files by name; it is there whole or not at all.

    Raises:
        OSError: the disk is full; earlier checkpoints stand. NoSpaceError where that was seen before writing.
    """
    path = directory / f"step-{step:06d}"

    def fill(unfinished: Path) -> None:
        # A failed write of safetensors is its own kind of error; the operating system's says what it was.
        for name, tensors in ((TRAINED, state.parameters), (OPTIMIZER_STATE, state.optimizer)):
            (unfinished / name).write_bytes(save(tensors))
        for name, document in documents.items():
            (unfinished / name).write_text(json.dumps(document, indent=1), encoding="utf-8")

    size = sum(tensor.nbytes for tensor in (*state.parameters.values(), *state.optimizer.values()))
    write_whole(path, fill, size + SLACK, replace=True)
    return path


def read_parameters(path: Path, trained: Mapping[str, nn.Parameter]) -> None:
    """Fill the trained parameters from a checkpoint.

    Raises:
        ValueError: the checkpoint is of other parameters; names them.
    """
    stored = load_file(path / TRAINED)
    wrong = stored.keys() ^ trained.keys() or {n for n, p in trained.items() if p.shape != stored[n].shape}
    if wrong:
        raise ValueError(
            f"{path} is a checkpoint of other parameters ({len(wrong)} differ, e.g. {min(wrong)}): resume with the "
            "configuration it was made with, or start afresh in another output=..."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(sharding.sharded_as(stored[name], parameter))


def read_optimizer_state(path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state from a checkpoint."""
    for name, value in load_file(path / OPTIMIZER_STATE).items():
        parameter, key = name.rsplit("/", 1)
        # AdamW keeps its step counts on the CPU, on any device of the parameters.
        like = trained[parameter]
        optimizer.state[like][key] = value if value.ndim == 0 else sharding.sharded_as(value, like)


def step_of(checkpoint: Path) -> int:
    """How many optimizer steps its weights have seen."""
    return int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"])


def checkpoints(directory: Path) -> list[Path]:
    """What stands under a checkpoint's name in a run's directory of checkpoints, oldest first."""
    for leftover in directory.glob(".step-*"):
        recover(directory / leftover.name.split(".")[1])
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and why each newer one is not."""
    skipped: list[str] = []
    for path in reversed(checkpoints(directory)):
        if (reason := damage(path)) is None:
            return path, skipped
        skipped.append(f"{path}: {reason}")
    return None, skipped


def keep_newest(directory: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints; none while the newest of all is not as it was written."""
    found = checkpoints(directory)
    if found and damage(found[-1]) is None:
        for path in found[:-count]:
            delete_whole(path)
