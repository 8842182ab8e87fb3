"""A frozen base in four bits: NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), by bitsandbytes.

Blocks of 64 weights share a scale of 8 bits, blocks of 256 scales one of 32: 4.127 bits a weight. The decoder's linears
are quantised, nothing else: the embedding is also the output head, and the vision tower is small. Arithmetic is in the
dtype the weights had; each product makes its dense matrix for that moment. bitsandbytes is an optional extra, imported
where it is needed.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from finetune.durable import require_whole
from model import PaliGemma, products

SAMPLE = 64  # values by which a weight is known again
BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a quantised weight, scales included


class NF4Linear(nn.Linear):
    """A frozen linear whose `weight` is packed, two weights a byte: u8 [out * in / 2, 1].

    original: some values of the weight before it was packed (`sample_of`).
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed, self.state = library().quantize_4bit(
            linear.weight.detach().to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias, self.original = linear.bias, sample_of(linear.weight)

    def dense(self) -> Tensor:
        """The matrix that the codes stand for, [out, in] in the dtype it had."""
        matrix: Tensor = library().dequantize_4bit(self.weight, self.state)
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, self.dense(), self.bias)


def dense(linear: nn.Linear) -> Tensor:
    """The weight of a linear as a matrix [out, in], whatever form it is kept in."""
    return linear.dense() if isinstance(linear, NF4Linear) else linear.weight


class Dequantized(nn.Linear):
    """A plain linear with the weight that an `NF4Linear` stood for."""

    def __init__(self, packed: NF4Linear) -> None:
        super().__init__(packed.in_features, packed.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(packed.dense(), requires_grad=False)
        self.bias, self.original = packed.bias, packed.original


def sample_of(weight: Tensor) -> Tensor:
    """64 values of a weight, from its first to its last, as bf16 on the CPU."""
    place = torch.arange(SAMPLE, device=weight.device) * (weight.numel() - 1) // (SAMPLE - 1)
    return weight.detach().reshape(-1)[place].to("cpu", torch.bfloat16)


def original_sample(module: nn.Module) -> Tensor | None:
    """The values that the weight of a linear had before it was packed; None for what never was."""
    return module.original if isinstance(module, NF4Linear | Dequantized) else None


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


def quantize(model: PaliGemma, device: str | torch.device) -> PaliGemma:
    """Pack the decoder's linears, one after the other, and bring all to `device`: it never holds the dense network.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    for path, linear in decoder_linears(model).items():
        model.set_submodule(path, NF4Linear(linear, torch.device(device)))
    return model.to(device)


def dequantize(model: PaliGemma) -> PaliGemma:
    """Put plain linears with the dense matrices back: the network that NF4 stands for, at its full size."""
    for path, packed in decoder_linears(model).items():
        if isinstance(packed, NF4Linear):
            model.set_submodule(path, Dequantized(packed))
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
        return PaliGemma.from_pretrained(directory, dtype, device)
    library()  # before minutes of reading
    return quantize(PaliGemma.from_pretrained(directory, dtype), device)


def quantization_of(model: nn.Module) -> str | None:
    """How the base of a network is kept: "nf4", or None."""
    # An adapter stands in the place of the linear, and shares its packed weight.
    return "nf4" if any(p.dtype == torch.uint8 for p in model.parameters()) else None


def packed_bytes(weights: int) -> int:
    """What this many weights take once they are packed."""
    return int(weights * BITS / 8)
