"""What a training step saves for its backward pass and how many operations it takes, counted without memory.

The network is built on fake or meta tensors, which have shapes and dtypes but no values, and one row is passed through
it: bytes that autograd saves, layer by layer, and FLOPs of matrix products, forward and backward.

Axes: B rows, S tokens of a row, U supervised positions, D width of the decoder.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma, PaliGemmaConfig

TERA = 10**12


@dataclasses.dataclass(frozen=True)
class SavedActivations:
    """Bytes that one row saves in its forward pass for its backward pass.

    Attributes:
        layers: of each decoder layer that is not recomputed.
        recomputed_layers: of each decoder layer that is recomputed: its input.
        other: of all else: vision encoder and connector where they are trained, final norm, what the layers share.
        once: saved once, however many rows there are: what is trained in full, in the type of the arithmetic.
    """

    layers: list[int]
    recomputed_layers: list[int]
    other: int
    once: int

    def by_layer(self, recompute_layers: int) -> list[int]:
        """Bytes of each decoder layer where the first `recompute_layers` are recomputed."""
        return self.recomputed_layers[:recompute_layers] + self.layers[recompute_layers:]


@dataclasses.dataclass(frozen=True)
class FLOPs:
    """Floating-point operations of matrix products, two for each multiplication with its addition.

    Attributes:
        image: one image through vision encoder and connector; forward, and backward where they are trained.
        row: one row through the decoder and its head, forward and backward, without recomputation.
        recomputation: what recomputing a decoder layer adds to a row, by layer.
    """

    image: int
    row: int
    recomputation: list[int]

    def tera(self, execution: ExecutionPlan, images: float) -> float:
        """TFLOP (10^12 operations) of a row and of `images` images, recomputation included."""
        return (images * self.image + self.row + sum(self.recomputation[: execution.recompute_layers])) / TERA


def empty_model(config: PaliGemmaConfig, dtype: torch.dtype) -> PaliGemma:
    """The network, to be built within a FakeTensorMode: shapes and dtypes, no values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return PaliGemma(config)
    finally:
        torch.set_default_dtype(before)


def saved_activations(model: PaliGemma, tokens: int, supervised: int, vision_trains: bool) -> SavedActivations:
    """What one row of an adapted network on fake tensors saves, with its decoder layers recomputed and not.

    Args:
        tokens: S. supervised: U. vision_trains: whether anything before the decoder is trained.
    """
    decoder = model.language_model.model
    decoder.set_recompute(len(decoder.layers))
    *recomputed, _ = saved_bytes(model, tokens, supervised, vision_trains)
    decoder.set_recompute(0)
    *layers, of_one = saved_bytes(model, tokens, supervised, vision_trains)
    *_, of_two = saved_bytes(model, tokens, supervised, vision_trains, rows=2)
    return SavedActivations(layers, recomputed, of_two - of_one, 2 * of_one - of_two)


def saved_bytes(model: PaliGemma, tokens: int, supervised: int, vision_trains: bool, rows: int = 1) -> list[int]:
    """Bytes that a forward pass of these shapes saves: of each decoder layer, and as the last number of all else.

    Each storage counts once, where it is saved first; parameters do not count. What all layers share (rotary
    embedding, attention bias) is saved whether layers are recomputed or not.
    """
    decoder, config = model.language_model.model, model.config
    # The storages themselves are held: the address of one that is freed could be given to another.
    known = {storage._cdata: storage for storage in (parameter.untyped_storage() for parameter in model.parameters())}
    saved, current = [0] * (len(decoder.layers) + 1), -1

    def count(tensor: Tensor, index: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage
            saved[index] += storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        count(tensor, current)
        return tensor

    def enter_decoder(*_: object) -> None:
        nonlocal current
        current = 0

    def count_shared(_: nn.Module, inputs: tuple[Tensor, tuple[Tensor, Tensor], Tensor]) -> None:
        (cos, sin), bias = inputs[1:3]
        for tensor in (cos, sin, bias):
            count(tensor, -1)

    # A layer that is recomputed saves its input before it is entered.
    def leave_layer(*_: object) -> None:
        nonlocal current
        current += 1

    handles = [decoder.register_forward_pre_hook(enter_decoder)]
    for layer in decoder.layers:
        handles += [layer.register_forward_pre_hook(count_shared), layer.register_forward_hook(leave_layer)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.zeros(rows, tokens, config.text.hidden_size, dtype=model.dtype)  # (B, S, D)
        if vision_trains:
            images = model.encode_images(torch.zeros(rows, *config.pixel_shape, dtype=model.dtype))
            x = torch.cat((images, x[:, config.num_image_tokens :]), dim=1)
        run_decoder(model, x, supervised)
    for handle in handles:
        handle.remove()
    return saved


def run_decoder(model: PaliGemma, x: Tensor, supervised: int) -> Tensor:
    """Input embeddings [B, S, D] -> final hidden states [B, U, D] of `supervised` positions."""
    rows, tokens, _ = x.shape
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=x.device)
    positions = torch.arange(tokens, device=x.device).expand(rows, -1)  # (B, S)
    queries = torch.arange(supervised, device=x.device).expand(rows, -1)  # (B, U)
    hidden: Tensor = model.language_model.model(x, mask, positions, query_positions=queries)
    return hidden


def flop_counter() -> FlopCounterMode:
    """Counts the FLOPs of matrix products within it, with the adapters' in-place one, which torch does not count."""

    def product(_: object, left: list[int], right: list[int], **__: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def count_flops(
    config: PaliGemmaConfig, lora: LoRAConfig | None, vision_trains: bool, tokens: int, supervised: int
) -> FLOPs:
    """The matrix products of an image and of a row, forward and backward, counted in a network without values.

    Args:
        lora: the adapters; None where all parameters are trained.
        vision_trains: whether anything before the decoder is trained. tokens: S. supervised: U.
    """
    with torch.device("meta"):
        model = PaliGemma(config)
        pixels = torch.zeros(1, *config.pixel_shape)
        x = torch.zeros(1, tokens, config.text.hidden_size, requires_grad=vision_trains)
    if lora is not None:
        inject_lora(model, lora)
    model.eval()  # dropout multiplies no matrices
    recomputation: list[int] = []
    before = 0

    def count_layer(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal before
        forward, before = counter.get_total_flops() - before, counter.get_total_flops()
        down = 2 * output.shape[1] * config.text.hidden_size * config.text.intermediate_size
        recomputation.append((forward - down) * output.requires_grad)  # the output of `down` is not needed again

    with flop_counter() as counter:
        with torch.set_grad_enabled(vision_trains):
            images = model.encode_images(pixels)
        if vision_trains:
            images.sum().backward()
        image = before = counter.get_total_flops()
        for layer in model.language_model.model.layers:
            layer.register_forward_hook(count_layer)
        model.language_model.head(run_decoder(model, x, supervised)).sum().backward()
    return FLOPs(image, counter.get_total_flops() - image, recomputation)
