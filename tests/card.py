"""A second device for tests without one: tensors that say they are on `meta`, and hold values all the same.

Within `Card()` whatever is made on, or moved to, the device `meta` is a CardTensor: its values lie in an ordinary
tensor that only the card computes with. As on a real card an operation on tensors of both devices raises, but for the
copies between them and CPU numbers of no dimension; what makes the host wait for the device is recorded, and where.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# Their results, or the shapes of these, depend on values: the host reads them before it goes on.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ROOT = Path(__file__).parent.parent


class CardTensor(torch.Tensor):
    """A tensor on the card; `content` holds what is in it."""

    content: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> CardTensor:
        made: CardTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.content = values
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} on a tensor of the card, outside of Card()")


class Factories(TorchFunctionMode):
    """torch.tensor on the card, which for `meta` would make an empty tensor that no dispatch mode hears of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and is_card(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


class Card(TorchDispatchMode):
    """The device, as long as the context lasts.

    Attributes:
        waits: what made the host wait, each as `operation at file:line`.
        copies: what was copied from one device to the other, waiting or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.pinned: list[Tensor] = []
        self.factories = Factories()

    def __enter__(self) -> Card:
        # `parameter.data = other` would leave `content` behind: modules on the move get new parameters.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self.factories.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.factories.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)

    def page_locked(self, size: int) -> Tensor:
        """u8 [size] of host memory from which the card copies while the host goes on."""
        made = torch.empty(size, dtype=torch.uint8)
        self.pinned.append(made)  # as long as the card is there, so that no other takes its place
        return made

    def is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()._cdata
        return any(made.untyped_storage()._cdata == storage for made in self.pinned)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        on_card = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
        asked = kwargs.get("device")
        makes = is_card(asked)
        if not on_card and not makes:
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return self.decomposed(func, args, kwargs)  # inference mode does not take such operations apart
        self.check(func, args, kwargs, tensors)
        onto_host = func is aten.copy_.default and not isinstance(args[0], CardTensor)
        leaves = onto_host or (asked is not None and not makes)
        if makes:
            kwargs["device"] = "cpu"
        inner_args, inner_kwargs = tree_map_only(CardTensor, lambda tensor: tensor.content, (args, kwargs))
        result = func(*inner_args, **inner_kwargs)
        if leaves:
            return args[0] if onto_host else result
        with torch.inference_mode(False):  # a view of an ordinary tensor is one, in that mode too
            return self.wrapped(func, args, kwargs, tensors, result)

    def decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        super().__enter__()
        try:
            return func.decompose(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def wrapped(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], result: Any) -> Any:
        """The result of an operation on the card: views share the storage of what they are views of."""
        outside = {id(tensor) for tensor in tensors if not isinstance(tensor, CardTensor)}
        wrapped = tree_map_only(Tensor, lambda tensor: tensor if id(tensor) in outside else CardTensor(tensor), result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def check(self, func: Any, args: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        """Raise where an operation takes tensors of both devices; record where the host waits for it."""
        strangers = [tensor for tensor in tensors if not isinstance(tensor, CardTensor)]
        if func in COPIES or (kwargs.get("device") is not None and strangers):
            self.copied(func, args, kwargs)
        elif func in INDEXING:
            for index in (value for value in args[1] if value is not None):
                if not isinstance(index, CardTensor) or index.dtype in (torch.bool, torch.uint8):
                    self.waits.append(f"{func} {place()}")
            strangers = [tensor for tensor in strangers if all(tensor is not index for index in args[1])]
        elif func in WAITING:
            self.waits.append(f"{func} {place()}")
        if func not in COPIES and any(tensor.dim() for tensor in strangers):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found "
                f"{[(tuple(t.shape), str(t.device)) for t in tensors]} {place()}"
            )

    def copied(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], None)
        from_card = isinstance(source, CardTensor)
        to_card = (
            isinstance(target, CardTensor)
            if target is not None
            else (from_card if kwargs.get("device") is None else torch.device(kwargs["device"]).type == DEVICE.type)
        )
        if from_card == to_card:
            return
        lasting = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        self.copies.append(f"{func} {tuple(source.shape)} {place()}")
        if not (lasting and not from_card and self.is_pinned(source)):
            self.waits.append(f"{func} {tuple(source.shape)} {place()}")


def place() -> str:
    """Where in this project an operation was called."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path != Path(__file__):
            return f"at {path.relative_to(ROOT)}:{frame.lineno} ({frame.line})"
    return "in a library"
