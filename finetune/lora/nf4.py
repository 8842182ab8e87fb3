"""A frozen base in four bits: NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), by bitsandbytes.

Blocks of 64 weights share a scale of 8 bits, blocks of 256 scales one of 32: 4.127 bits a weight. The decoder's linears
are quantised, nothing else: the embedding is also the output head, and the vision tower is small. Arithmetic is in the
dtype of the input; each product makes its dense matrix for that moment. bitsandbytes is an optional extra, imported
where it is needed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.system.atomic import require_whole
from finetune.system.progress import progress
from model import PaliGemma
from model.ops import linear as linear_ops
from model.progress import Progress, silent

SAMPLE = 64  # values by which a weight is known again
BLOCK = 64  # weights that share a scale
NESTED = 256 + 16 + 1  # values of an NF4 weight's state that do not depend on its size
BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a quantised weight, scales included


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight in NF4: codes u8 [out * in / 2, 1], and what gives them their values, as `NF4Linear` holds them."""

    codes: Tensor
    absmax: Tensor
    nested: Tensor
    shape: tuple[int, int]


class NF4Linear(nn.Linear):
    """A frozen linear whose `weight` is packed, two weights a byte: u8 [out * in / 2, 1].

    The quantisation state are buffers of bytes: they move, are copied and are saved with the weight, and no cast of the
    module's dtype touches them. The dense matrix has the dtype of the input.

    Attributes:
        weight_absmax: u8 [blocks], the scale of each block of 64 weights, itself quantised.
        weight_nested: u8 [4 * (NESTED + blocks of scales)], fp32 values as bytes: the codes of the scales, those of the
            weights, the offset of the scales, the scale of each block of 256 scales.
        weight_sample: u8 [2 * SAMPLE], some values of the weight before it was packed (`sample_of`) as bytes.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed, state = library().quantize_4bit(
            linear.weight.detach().to(device), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        inner = state.state2
        nested = torch.cat((inner.code, state.code, state.offset.reshape(1), inner.absmax)).float()
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias
        self.register_buffer("weight_absmax", state.absmax)
        self.register_buffer("weight_nested", nested.view(torch.uint8))
        self.register_buffer("weight_sample", sample_of(linear.weight).view(torch.uint8).to(device))

    def forward(self, x: Tensor) -> Tensor:
        return linear_ops.linear(x, dense(weight_of(self), x.dtype), self.bias)


class LinearLike(Protocol):
    """A linear, or what stands in its place."""

    in_features: int
    out_features: int
    _buffers: dict[str, Tensor | None]

    @property
    def weight(self) -> Tensor: ...


def weight_of(linear: LinearLike) -> Tensor | PackedWeight:
    """The weight of a linear in the form it is kept in."""
    absmax, nested = (linear._buffers.get(name) for name in ("weight_absmax", "weight_nested"))
    if absmax is None or nested is None:
        return linear.weight
    return PackedWeight(linear.weight, absmax, nested, (linear.out_features, linear.in_features))


def dense(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """A weight as a matrix [out, in]: itself where it is plain, else what its codes stand for, in `dtype`."""
    if isinstance(weight, Tensor):
        return weight
    functions, nested = library(), weight.nested.view(torch.float32)
    inner = functions.QuantState(nested[NESTED:], code=nested[:256], blocksize=256, dtype=torch.float32)
    state = functions.QuantState(
        weight.absmax,
        torch.Size(weight.shape),
        nested[256:272],
        BLOCK,
        "nf4",
        torch.float32 if dtype == torch.float64 else dtype,
        nested[272],
        inner,
    )
    matrix: Tensor = functions.dequantize_4bit(weight.codes, state)
    return matrix.to(dtype)


class Dequantized(nn.Linear):
    """A plain linear with the weight that an `NF4Linear` stood for; `weight_sample` as there, not part of its state."""

    def __init__(self, packed: NF4Linear, dtype: torch.dtype) -> None:
        super().__init__(packed.in_features, packed.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(dense(weight_of(packed), dtype), requires_grad=False)
        self.bias = packed.bias
        self.register_buffer("weight_sample", packed.get_buffer("weight_sample"), persistent=False)


def sample_of(weight: Tensor) -> Tensor:
    """64 values of a weight, from its first to its last, as bf16 on the CPU."""
    place = torch.arange(SAMPLE, device=weight.device) * (weight.numel() - 1) // (SAMPLE - 1)
    return weight.detach().reshape(-1)[place].to("cpu", torch.bfloat16)


def original_sample(module: nn.Module) -> Tensor | None:
    """The values (`sample_of`) that the weight of a linear had before it was packed; None for what never was."""
    sample = module._buffers.get("weight_sample")
    return None if sample is None else sample.cpu().view(torch.bfloat16)


def forget_original(module: nn.Module) -> None:
    """Its weight has changed: it is no longer known by the values before it was packed."""
    module._buffers.pop("weight_sample", None)
    module._non_persistent_buffers_set.discard("weight_sample")


def library() -> ModuleType:
    """bitsandbytes' functions. Raises ValueError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ValueError("a base in NF4 needs bitsandbytes: pip install 'bitsandbytes>=0.48'") from error
    functions: ModuleType = bitsandbytes.functional
    return functions


def decoder_linears(model: PaliGemma) -> dict[str, nn.Linear]:
    """The linears that `quantize` packs, or has packed, by path: those of the decoder's layers."""
    layers = "language_model.model.layers."
    return {p: module for p, module in model.named_modules() if isinstance(module, nn.Linear) and p.startswith(layers)}


def quantize(model: PaliGemma, device: str | torch.device, shown: Progress = silent) -> PaliGemma:
    """Pack the decoder's linears, one after the other, and bring all to `device`: it never holds the dense network.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    linears = decoder_linears(model)
    for path, linear in shown(linears.items(), len(linears)):
        model.set_submodule(path, NF4Linear(linear, torch.device(device)))
    return model.to(device)


def dequantize(model: PaliGemma) -> PaliGemma:
    """Put plain linears with the dense matrices back: the network that NF4 stands for, at its full size."""
    for path, packed in decoder_linears(model).items():
        if isinstance(packed, NF4Linear):
            model.set_submodule(path, Dequantized(packed, model.dtype))
    return model


def open_base(
    directory: Path, dtype: torch.dtype, device: str | torch.device, quantization: str | None = None
) -> PaliGemma:
    """A checkpoint's network on `device`: as it is, or its decoder in NF4, then read into the host's memory first.

    Raises:
        ValueError: the checkpoint does not open, or has a manifest and is not as it was written.
    """
    require_whole(directory)
    if quantization is None:
        return PaliGemma.from_pretrained(directory, dtype, device, progress=progress("loading", "weight"))
    library()  # before minutes of reading
    model = PaliGemma.from_pretrained(directory, dtype, progress=progress("loading", "weight"))
    return quantize(model, device, progress("packing", "weight"))


def quantization_of(model: nn.Module) -> str | None:
    """How the base of a network is kept: "nf4", or None."""
    # An adapter stands in the place of the linear, and shares its packed weight.
    return "nf4" if any(p.dtype == torch.uint8 for p in model.parameters()) else None


def packed_bytes(weights: int) -> int:
    """What this many weights take once they are packed."""
    return int(weights * BITS / 8)
