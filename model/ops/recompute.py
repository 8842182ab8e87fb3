"""What is recomputed in the backward pass instead of saved: cheap outputs always, whole layers on request.

The output of a norm and the product gelu(gate) * up follow by a few elementwise operations from tensors that are saved
anyway. Within `recompute_cheap_outputs` a function that saves such an output for backward saves how to compute it
instead: the first use in the backward pass computes it, the last one drops it. This is the selective recomputation of
arXiv 2205.05198, section 5, for elementwise operations. A whole layer is recomputed by `torch.utils.checkpoint`.
Values and gradients stay the same, bit for bit.

Under `torch.compile` no output is marked: there the partitioner decides what is recomputed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _CheapOutput:
    """How to compute a marked output, and how many functions saved it for backward."""

    def __init__(self, output: Tensor, compute: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.compute, self.inputs, self.size = compute, inputs, output.numel()
        self.uses = 0
        self.uses_left = 0  # of those, still to come in this backward pass
        self.recomputed: Tensor | None = None

    def get(self, shape: torch.Size) -> Tensor:
        """The output in the shape in which it was saved."""
        if self.recomputed is None:
            self.recomputed, self.uses_left = self.compute(*self.inputs), self.uses
        output = self.recomputed.view(shape)
        self.uses_left -= 1
        if self.uses_left == 0:
            self.recomputed = None
        return output


# The marked outputs by the address of their storage, each with a reference that ends with the output; None outside
# `recompute_cheap_outputs`, and within a layer that is recomputed whole.
_marked: ContextVar[dict[int, tuple[_CheapOutput, weakref.ref[Tensor]]] | None] = ContextVar("marked", default=None)


def cheap_to_recompute(output: Tensor, compute: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Returns `output`, marked as one that `compute(*inputs)` gives again.

    The inputs are held until the backward pass: they should be tensors that are saved anyway.
    """
    if torch.compiler.is_compiling():
        return output
    marked = _marked.get()
    if marked is None or not output.requires_grad:
        return output
    address = output.untyped_storage()._cdata
    detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)  # holds no graph

    def forget(_: weakref.ref[Tensor]) -> None:
        marked.pop(address, None)  # another storage may get this address

    marked[address] = _CheapOutput(output, compute, detached), weakref.ref(output, forget)
    return output


@contextmanager
def recompute_cheap_outputs() -> Iterator[None]:
    """Within this context marked outputs are not saved for backward but recomputed.

    Every other tensor goes to the hooks outside, if there are any (`torch.autograd.graph.saved_tensors_hooks`): torch
    itself calls the innermost hooks alone.
    """
    marked: dict[int, tuple[_CheapOutput, weakref.ref[Tensor]]] = {}
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    outer_pack, outer_unpack = outer or (_same, _same)

    def pack(saved: Tensor) -> tuple[_CheapOutput | None, Any]:
        output, _ = marked.get(saved.untyped_storage()._cdata, (None, None))
        if output is None or saved.numel() != output.size or not saved.is_contiguous():
            return None, outer_pack(saved)
        output.uses += 1
        return output, saved.shape

    def unpack(packed: tuple[_CheapOutput | None, Any]) -> Tensor:
        output, rest = packed
        return outer_unpack(rest) if output is None else output.get(rest)

    token = _marked.set(marked)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _marked.reset(token)
        marked.clear()  # or its weak references, whose callback refers to it, would hold it


def _same(value: Any) -> Any:
    return value


def recompute_layer(layer: nn.Module, x: Tensor, *others: Any) -> Tensor:
    """layer(x, *others), of which only x is saved for backward, and the others are held; the rest is recomputed.

    Nothing in it is marked: a mark would hold tensors, where otherwise nothing is held.
    """

    def run(x: Tensor) -> Tensor:
        output: Tensor = layer(x, *others)
        return output

    token = _marked.set(None)
    try:
        output: Tensor = checkpoint(run, x, use_reentrant=False) if torch.is_grad_enabled() else run(x)
        return output
    finally:
        _marked.reset(token)
