"""Layers sharded over the processes of a run (FSDP2: torch's `fully_shard`), and what keeps the processes in lockstep.

Each process holds a shard of every layer, and gathers a whole layer while it computes with it. `fully_shard` is called
here and not by accelerate, which shards on cards only, and shards all of a network: images are encoded and embeddings
read outside the network's forward, where their weights would not be gathered.

A process gathers a layer together with all others, so all must run the layers equally often. `meet` is how they agree:
on the number of micro-batches or of generated tokens, and on running out of memory. They meet before every gathering
too: that a process is out of memory is then known before any other waits for its shard. They meet on the CPU (gloo), so
no device is waited for. Without sharded layers nothing here does anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.system import distributed
from finetune.system.device import is_out_of_memory

_group: dist.ProcessGroup | None = None  # in which processes with sharded layers meet
_gathered = False  # whether a layer was gathered yet: before, torch has nothing to reset


class OutOfMemoryElsewhereError(MemoryError):
    """Another process of the run is out of memory, in the computation that this one is in, too."""


def shard(root: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Shard every parameter of `layers` over the processes, in their order; `root` runs them, and its other parameters
    stay whole. Gradients of sharded parameters are summed over the processes, as `distributed.all_reduce` sums others.
    """
    global _group
    _group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT)
    mesh = init_device_mesh(device.type, (distributed.count(),))
    for layer in layers:
        sharded = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # by default torch takes the mean
        sharded.set_force_sum_reduction_for_comms(True)
        # torch's classes of these have no public name.
        sharded.set_custom_all_gather(AllGather())  # type: ignore[arg-type]
        sharded.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]
    others = {parameter for parameter in root.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(root, mesh=mesh, ignored_params=others)


def require_gradient_of_input(root: nn.Module) -> None:
    """Let what `root` is given require a gradient in training, also where it depends on nothing that is trained.
    Otherwise a process whose input depends on nothing goes back through fewer layers than one whose input does.
    """

    def require(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = inputs
        needs_none = x.requires_grad or not torch.is_grad_enabled()
        return inputs if needs_none else (x.detach().requires_grad_(), *others)

    root.register_forward_pre_hook(require, prepend=True)


def shards_layers() -> bool:
    """Whether this process holds shards of layers."""
    return _group is not None


# Lockstep.


def meet(value: int = 0, failed: bool = False) -> int:
    """Wait for all processes; returns the largest value that one of them gives.

    Raises:
        OutOfMemoryElsewhereError: another process says that it failed.
    """
    if _group is None:
        return value
    largest = torch.tensor([int(failed), value])
    with distributed.others():
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=_group)
    if largest[0] and not failed:
        raise OutOfMemoryElsewhereError("another process of the run is out of memory")
    return int(largest[1])


def any_process(true: bool) -> bool:
    """Whether a statement is true in any process."""
    return meet(int(true)) > 0


def every_process(true: bool) -> bool:
    """Whether a statement is true in every process."""
    return meet(int(not true)) == 0


@contextlib.contextmanager
def same_memory(root: nn.Module) -> Iterator[None]:
    """A computation that succeeds in all processes or in none: where one is out of memory, the others raise, too.

    After an error the layers that `root` runs are ready for another attempt, without gradients.
    """
    try:
        yield
        meet()
    except Exception as error:
        if _group is not None and is_out_of_memory(error):
            if not isinstance(error, OutOfMemoryElsewhereError):
                meet(failed=True)
            assert isinstance(root, FSDPModule), "layers are sharded below the module that runs them"
            root.zero_grad()  # of layers that are whole now, too: torch keeps theirs beyond the reset
            if _gathered:
                root.reset_iter_state()
        raise


class AllGather:
    """torch's own gathering of a layer, where all processes are there."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        global _gathered
        _gathered = True
        meet()
        with distributed.others():
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class ReduceScatter:
    """torch's own sum of a layer's gradients, where all processes are there."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        meet()
        with distributed.others():
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


# Shards of tensors; `distributed.whole` puts them together.


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device of `like` and sharded as `like` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within this context the first process's `module` holds its trained parameters whole, in host memory: to be saved,
    not to compute with. All processes enter it.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.requires_grad and isinstance(parameter, DTensor):
                gathered = distributed.whole(parameter.detach())
                if distributed.is_main():
                    child._parameters[name] = nn.Parameter(gathered.cpu())
                    before.append((child, name, parameter))
    try:
        yield
    finally:
        for child, name, parameter in before:
            child._parameters[name] = parameter
