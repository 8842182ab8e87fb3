"""What depends on rounding is compared where it does not matter, or with how much it matters here.

Two ways to one result agree in fp64 to EXACT of its largest value, on every CPU and with any number of threads. In fp32
sums in another order, or another CPU's kernels, move a result by an amount that no number written down in a test knows:
it is measured, as the distance from fp64, and one way may be no farther from it than FARTHER times the other.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EXACT = 1e-12  # of the largest value: fp64 has 2e-16, and a deep network of sums some thousand times that
FARTHER = 3.0  # from fp64 than the other, at most: the ratio of two sums of many roundings
Module = TypeVar("Module", bound=nn.Module)
Results = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Computed:
    """One way to a result: its tensors by name, in fp64 and as fp32 arithmetic gives them (both stored in fp64)."""

    exact: dict[str, Tensor]
    rounded: dict[str, Tensor]


def computed(run: Callable[[torch.dtype], Results]) -> Computed:
    """Run a computation in fp64 and in fp32, from the same random state: `run` is called with each dtype."""
    state, results = torch.get_rng_state(), {}
    for dtype in (torch.float64, torch.float32):
        torch.set_rng_state(state)
        with KeepFP64():
            results[dtype] = named(run(dtype))
        found = {tensor.dtype for tensor in results[dtype].values()}
        assert found == {dtype}, f"asked for {dtype}, computed in {found}"
    return Computed(*({name: t.double() for name, t in tensors.items()} for tensors in results.values()))


def computed_by(model: Module, run: Callable[[Module], Results]) -> Computed:
    """What `run` makes of a copy of a model in fp64, and of one in fp32."""
    return computed(lambda dtype: run(in_dtype(copy.deepcopy(model), dtype)))


def assert_same(ours: Computed, theirs: Computed) -> None:
    """The same in fp64; and in fp32 as near to it as theirs."""
    assert_exact(ours.exact, theirs.exact)
    assert_as_near(ours.rounded, theirs.rounded, theirs.exact)


def assert_exact(ours: Results, theirs: Results) -> None:
    """Equal in fp64, to EXACT of the largest value of all tensors."""
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in (*ours.values(), *theirs.values())} == {torch.float64}
    largest = max(tensor.abs().max().item() for tensor in theirs.values())
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=EXACT * largest, msg=partial("{}: {}".format, name))


def assert_as_near(ours: Results, theirs: Results, exact: Results) -> None:
    """Ours is no farther from `exact` than FARTHER times theirs is, or than fp32 can store `exact` at all."""
    exact = named(exact)
    rounding = norm(exact) * torch.finfo(torch.float32).eps
    ours_off, theirs_off = (distance(result, exact) for result in (ours, theirs))
    assert ours_off <= FARTHER * max(theirs_off, rounding), (
        f"{ours_off:.3g} from fp64, the reference {theirs_off:.3g}; stored in fp32 it would be {rounding:.3g}"
    )


def distance(result: Results, exact: Results) -> float:
    """The norm of the difference of all tensors together."""
    result, exact = named(result), named(exact)
    assert result.keys() == exact.keys()
    assert all(result[name].shape == tensor.shape for name, tensor in exact.items())
    return norm({name: result[name].double() - tensor.double() for name, tensor in exact.items()})


def norm(tensors: Mapping[str, Tensor]) -> float:
    return sum(tensor.double().pow(2).sum().item() for tensor in tensors.values()) ** 0.5


def named(results: Results) -> dict[str, Tensor]:
    """Tensors by name, or by place where they have none; without their graphs."""
    if isinstance(results, Tensor):
        results = [results]
    pairs = results.items() if isinstance(results, Mapping) else ((str(i), t) for i, t in enumerate(results))
    tensors = {name: tensor.detach() for name, tensor in pairs}
    assert tensors
    return tensors


def in_dtype(model: Module, dtype: torch.dtype) -> Module:
    """The model, its parameters cast, adapters included. Buffers stay as they are, rotary frequencies are fp32 always;
    but what the library holds as a rounded number, the scale of embeddings, is made anew, and so is the dtype that
    transformers 4 remembers for its mask.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=dtype)
        if hasattr(module, "text_config_dtype"):
            module.text_config_dtype = dtype  # type: ignore[assignment]
    return model


class KeepFP64(TorchFunctionMode):
    """What asks for fp32, to be more precise than bf16, leaves fp64 as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is F.softmax and kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
