"""The processes of a run, where a launcher started several: which of them writes, and how they share what each has.

`accelerate launch` and `torchrun` start them and tell each through its environment which one it is. With one process
nothing here does anything. Numbers are summed as tensors, all else is passed on as JSON, never as pickle. Not here:
starting processes. Sharding layers over them is in sharding.py.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from finetune.system.workers import is_death

TIMEOUT = datetime.timedelta(minutes=30)  # to wait for the others: longer than writing the largest checkpoint takes

PATIENCE = 10.0  # seconds, before it is said that others are waited for
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate takes these, too, for a WORLD_SIZE


_fsdp = False  # whether the launcher asks for FSDP


class ElsewhereError(Exception):
    """The run ends, for a reason that another of its processes has."""


def init(device: torch.device, can_shard: bool = False) -> None:
    """Meet the other processes of the run, if there are any; on cards, "cuda" is this process's own from here on.

    can_shard: whether the script shards a network where the launcher asks for FSDP; `asks_for_fsdp` tells it.

    Raises:
        ValueError: the environment is not that of a launcher, the launcher asks for what is not built, or `device` is
            one card for all processes.
    """
    global _fsdp
    require_launcher()
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    _fsdp = take_over_fsdp(can_shard) and several
    if not several:
        return
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true":
            raise ValueError(
                f"the launcher asks for {name}, which is not built here: launch with --multi_gpu, where each process "
                "holds all of the network, or with configs/accelerate/fsdp.yaml, which shards its decoder"
            )
    if device.index is not None:
        raise ValueError(f"{device} is one card for {os.environ['WORLD_SIZE']} processes: name it cuda, or auto")
    from accelerate import PartialState

    with saying_who_is_awaited():
        PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
        gather("here")  # none continues, perhaps to its end, before the others are there


def take_over_fsdp(can_shard: bool) -> bool:
    """Whether the launcher asks for FSDP. Its wish leaves the environment: accelerate would fulfil it once more.

    Raises:
        ValueError: the script does not shard, or this is not FSDP2 of torch 2.13.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false") != "true":
        return False
    version, torch_version = os.environ.get("FSDP_VERSION", "1"), tuple(map(int, torch.__version__.split(".")[:2]))
    if not can_shard:
        raise ValueError(
            "the launcher asks for FSDP, and only train.py shards a network: launch this script with --multi_gpu, "
            "where each process holds all of it, or in one process"
        )
    if version != "2" or torch_version < (2, 13):
        raise ValueError(
            f"the launcher asks for FSDP {version} with torch {torch.__version__}; expected FSDP 2 (fsdp_version: 2, "
            "as in configs/accelerate/fsdp.yaml) and torch 2.13"
        )
    return True


def asks_for_fsdp() -> bool:
    """Whether the run has several processes and its launcher asks for FSDP."""
    return _fsdp


def require_launcher() -> None:
    """That the environment names this process as a launcher does, or not at all.

    Raises:
        ValueError: it does so incompletely, or as one that cannot be: left over from something else.
    """
    told = {name: os.environ[name] for name in (*LAUNCHER, *MPI) if name in os.environ}
    named = {name: value for name, value in told.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name in LAUNCHER if name not in told]
    if not named or named.get("WORLD_SIZE") == "1":
        return
    if not all(value.isascii() and value.isdigit() for value in named.values()):
        wrong = "which are not whole numbers"
    elif missing:
        wrong = f"but no {', '.join(missing)}"
    elif int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        wrong = "which counts processes from 0 and has none of this number"
    else:
        return
    raise ValueError(
        f"the environment has {', '.join(f'{name}={value}' for name, value in named.items())}, {wrong}: left over from "
        f"another program? To train in one process: unset {' '.join(named)}; in several: accelerate launch --multi_gpu "
        "train.py ..."
    )


@contextlib.contextmanager
def saying_who_is_awaited() -> Iterator[None]:
    """After a while without the other processes, say what is waited for."""
    count, place = os.environ["WORLD_SIZE"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    message = (
        f"process {os.environ['RANK']} of {count}, counted from 0, has waited for the others at {place} for "
        f"{PATIENCE:.0f} s, and does so for {TIMEOUT} at most. If there are none: unset {' '.join(LAUNCHER)}"
    )
    timer = threading.Timer(PATIENCE, lambda: print(message, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def count() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, counted from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints: the first one."""
    return rank() == 0


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the processes, in place; all have as many, of the same shapes."""
    if count() > 1:
        with others():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a shard, put together; all of them call this. Any other tensor as it is."""
    # A DTensor is known by its method: importing its class takes longer than most scripts need it.
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with others():
        gathered: Tensor = tensor.full_tensor()
    return gathered


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order, for all of them; by way of JSON, in which paths become text."""
    if count() == 1:
        return [value]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    text = torch.tensor(list(json.dumps(value, default=str).encode()), dtype=torch.uint8, device=device)
    sizes = torch.zeros(count(), dtype=torch.int64, device=device)
    sizes[rank()] = len(text)
    all_reduce([sizes])
    texts = [torch.empty(int(sizes.max()), dtype=torch.uint8, device=device) for _ in range(count())]
    with others():
        dist.all_gather(texts, pad(text, (0, len(texts[0]) - len(text))))
    return [json.loads(bytes(text[:size].tolist())) for text, size in zip(texts, sizes.tolist(), strict=True)]


def total(number: float) -> float:
    """The sum of a number over the processes."""
    return sum(gather(number))


def totals(numbers: Mapping[str, float]) -> dict[str, float]:
    """The sums of named numbers over the processes; a name that a process lacks counts 0 there."""
    shares = gather(dict(numbers))
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) for name in names}


def on_main(call: Callable[[], Any]) -> Any:
    """Call in the first process alone; what it gives is for all of them, as JSON where there are several.

    Raises:
        ElsewhereError: in the others, when the call failed; in the first process, its own error.
    """
    if count() == 1:
        return call()
    given, error = None, None
    if is_main():
        try:
            given = call()
        except Exception as caught:  # of any kind: the others must not wait for it
            error = caught
    failed, given = gather([error is not None, given])[0]
    if error is not None:
        raise error
    if failed:
        raise ElsewhereError("the first process of the run failed, and says why")
    return given


def destroy() -> None:
    """Leave the process group, at the end."""
    if count() > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def others() -> Iterator[None]:
    """Around what needs all processes: one that is gone is an ElsewhereError here."""
    try:
        yield
    except RuntimeError as error:
        if is_death(error):  # of a worker of this process, noticed while it waits for the others
            raise
        raise ElsewhereError(
            "another process of the run has ended, so this one does; what was saved stands, the same command resumes"
        ) from error
