"""A frozen module that is kept in host memory and brought to the device for its own work: the vision encoder.

Its parameters are exchanged, not written to: also after an error, those in host memory are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from finetune.system.transfer import host_buffer, packed_size, views


class Offload:
    """Moves the parameters of `module` into one host buffer, page-locked where that can be had.

    Either all of them have moved or, where that raised, none. One buffer, because page-locked memory is handed out in
    powers of two: by the parameter, SigLIP's 0.77 GiB would take about half as much again.

    Args:
        module: frozen.
        device: where it computes, within `on_device`.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.slots = [(child, name) for child in module.modules() for name, _ in child.named_parameters(recurse=False)]
        parameters = self.parameters()
        assert not any(p.requires_grad for p in parameters), "a trained parameter would be lost to its optimizer"
        host = views(host_buffer(packed_size(parameters), device), parameters)
        for home, parameter in zip(host, parameters, strict=True):
            home.copy_(parameter.detach())
        self.put(host)

    def parameters(self) -> list[nn.Parameter]:
        return [getattr(child, name) for child, name in self.slots]

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Let the module hold these instead."""
        for (child, name), tensor in zip(self.slots, tensors, strict=True):
            made = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            setattr(child, name, made)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within this context the module is on the device; afterwards, also after an error, it is as it was."""
        home = self.parameters()
        try:
            self.put([parameter.detach().to(self.device, non_blocking=True) for parameter in home])
            yield
        finally:
            self.put(home)
