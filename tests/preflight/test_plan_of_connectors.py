"""The plan of networks with another connector, resolution or tiles: memory and FLOPs beside those of real steps."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune import LoRAConfig, inject_lora
from finetune.config.schema import CONNECTOR
from finetune.preflight.count import TERA, flop_counter
from finetune.preflight.plan import Planner
from finetune.training.execution_plan import ExecutionPlan
from model import ConnectorConfig, PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from model.connectors import make_connector
from model.ops.bf16_on_cpu import native_products
from tests.preflight.test_plan import measured_peak

SMALL = PaliGemmaConfig(
    VisionConfig(48, 96, 3, 4, image_size=112),
    TextConfig(128, 512, 3, 4, 1, 32, vocab_size=8192),
    image_token_id=8000,
)


def network(kind: str = "linear", tiles: int = 1, size: int = 112) -> PaliGemmaConfig:
    vision = dataclasses.replace(SMALL.vision, image_size=size)
    return dataclasses.replace(SMALL, vision=vision, connector=ConnectorConfig(kind, latents=16, depth=2), tiles=tiles)


NETWORKS = {
    "linear": network(),
    "mlp": network("mlp"),
    "dense_sci": network("dense_sci"),
    "dense_dci": network("dense_dci"),
    "resampler": network("resampler"),
    "pixel_shuffle": network("pixel_shuffle"),
    "tiles": network(tiles=4, size=56),
    "tiles, resampled": network("resampler", tiles=4),
    "larger images": network(size=168),
}
FROZEN = LoRAConfig(rank=4, targets=("language.*",), modules_to_save=(CONNECTOR,))
ADAPTED = LoRAConfig(rank=4, targets=("language.*", "vision.*"), modules_to_save=(CONNECTOR,), dropout=0.1)
ADAPTERS = {"vision frozen": FROZEN, "vision adapted": ADAPTED}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)
EITHER_VISION = pytest.mark.parametrize("vision", ADAPTERS)
PROMPT, ANSWER = 22, 3


def adapted(name: str, vision: str, dtype: torch.dtype = torch.float32) -> PaliGemma:
    model = PaliGemma(NETWORKS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.to(dtype)
    inject_lora(model, ADAPTERS[vision])
    model.train()
    return model


def batch_of(config: PaliGemmaConfig, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Rows without padding, each with its image."""
    generator = torch.Generator().manual_seed(0)
    images, text = config.num_image_tokens, PROMPT + ANSWER
    ids = torch.full((rows, images + text), config.image_token_id)
    ids[:, images:] = torch.randint(3, config.image_token_id, (rows, text), generator=generator)
    types = (torch.arange(images + text) >= images + PROMPT).long().expand(rows, -1)
    labels = ids.where(types.bool(), -100)
    return {"input_ids": ids, "token_type_ids": types, "labels": labels}, torch.rand(rows, *config.pixel_shape)


def step(model: PaliGemma, batch: dict[str, Tensor], pixels: Tensor) -> None:
    loss = model(**batch, pixel_values=pixels).loss
    assert loss is not None
    loss.backward()


@cache
def planner(name: str, vision: str, dtype: torch.dtype, device: str) -> Planner:
    config, lora = NETWORKS[name], ADAPTERS[vision]
    tokens = config.num_image_tokens + PROMPT + ANSWER
    return Planner(config, lora, dtype, tokens, ANSWER, 4, torch.device(device))


def saved_by_a_step(model: PaliGemma, batch: dict[str, Tensor], pixels: Tensor) -> int:
    """Bytes that autograd saves in a forward pass from pixels to the loss, without the log-probabilities."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved, alive = 0, []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(storage)
            saved += storage.nbytes()
        return tensor

    with native_products(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, pixel_values=pixels)
    return saved - len(pixels) * ANSWER * model.config.text.vocab_size * 4  # of log-softmax, in fp32


@EVERY_NETWORK
@EITHER_VISION
def test_a_real_step_in_bf16_saves_what_was_planned_in_any_micro_batch(name: str, vision: str) -> None:
    """In micro-batches of 1, 2 and 4: what is saved once (weights in the type of the arithmetic) is planned once."""
    model = adapted(name, vision, torch.bfloat16)
    model.language_model.model.fold_heads = False  # as on the card that is planned for
    made = planner(name, vision, torch.bfloat16, "cuda")
    for rows in (1, 2, 4):
        saved = saved_by_a_step(model, *batch_of(model.config, rows))
        assert made.activations(ExecutionPlan(rows)) == pytest.approx(saved, rel=0.03), rows


@EITHER_VISION
def test_weights_trained_in_full_are_cast_once_however_many_rows(vision: str) -> None:
    """All matrices of a resampler in bf16, but not its latents; in fp32 they are what they are."""
    name = "tiles, resampled"
    assert planner(name, vision, torch.float32, "cpu").saved.once == 0
    trained = dict(make_connector(NETWORKS[name]).named_parameters())
    matrices = sum(weight.nbytes // 2 for name, weight in trained.items() if weight.ndim == 2 and "latents" not in name)
    assert planner(name, vision, torch.bfloat16, "cuda").saved.once == pytest.approx(matrices, rel=0.01)


@EVERY_NETWORK
@EITHER_VISION
@pytest.mark.parametrize(("rows", "layers"), [(1, 0), (4, 2)])
def test_the_planned_peak_is_what_the_allocator_gives_from_pixels_on(
    name: str, vision: str, rows: int, layers: int
) -> None:
    """Within 10%, as for the decoder alone; in fp32 on the CPU."""
    model = adapted(name, vision)
    model.language_model.model.set_recompute(layers)
    batch, pixels = batch_of(model.config, rows)
    step(model, batch, pixels)  # makes the gradients
    made = planner(name, vision, torch.float32, "cpu")
    planned = made.activation_components(ExecutionPlan(rows, recompute_layers=layers))
    assert sum(planned.values()) == pytest.approx(measured_peak(lambda: step(model, batch, pixels)), rel=0.1)


@EVERY_NETWORK
@EITHER_VISION
@pytest.mark.parametrize("layers", [0, 3])
def test_planned_flops_are_those_of_a_real_step_from_pixels_on(name: str, vision: str, layers: int) -> None:
    """What is recomputed to two per cent, the rest exactly."""
    model = adapted(name, vision)
    model.language_model.model.set_recompute(layers)
    made = planner(name, vision, torch.float32, "cpu")
    batch, pixels = batch_of(model.config, 1)
    # The products of the math kernel are seen by the counter, those of other kernels are not.
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        step(model, batch, pixels)
    planned = made.tflop(ExecutionPlan(1, layers))
    assert planned == pytest.approx(counter.get_total_flops() / TERA, rel=0.02 if layers else 1e-9)


@EVERY_NETWORK
def test_a_frozen_vision_tower_may_leave_the_device_whatever_is_trained_behind_it(name: str) -> None:
    """What the connector takes of a step's images stays: the features, and the mean of each group that it asks for."""
    made = planner(name, "vision frozen", torch.bfloat16, "cuda")
    assert any(execution.offload_vision for execution in made.candidates(None, None))
    config = NETWORKS[name]
    groups = len(make_connector(config).groups)
    numbers = 4 * config.views * config.vision.num_patches * config.vision.hidden_size * (1 + groups)
    assert made.plan(ExecutionPlan(1), 0).components["image features of a step"] == 2 * numbers
    adapted = planner(name, "vision adapted", torch.bfloat16, "cuda")
    assert not any(execution.offload_vision for execution in adapted.candidates(None, None))
    assert adapted.plan(ExecutionPlan(1), 0).components["image features of a step"] == 0


@pytest.mark.parametrize(("kind", "tiles"), [("linear", 1), ("dense_dci", 1), ("resampler", 4), ("pixel_shuffle", 4)])
def test_what_encoding_an_image_takes_is_never_planned_too_small(kind: str, tiles: int) -> None:
    """Without a graph, in the proportions of the published network, of which it is an estimate."""
    proportions = dataclasses.replace(SMALL, vision=VisionConfig(288, 1076, 3, 4, image_size=224))
    config = dataclasses.replace(proportions, connector=ConnectorConfig(kind), tiles=tiles)
    tokens = config.num_image_tokens + PROMPT + ANSWER
    made = Planner(config, LoRAConfig(rank=4), torch.float32, tokens, ANSWER, 4, torch.device("cpu"))
    model, pixels = PaliGemma(config), torch.rand(2, *config.pixel_shape)

    def encode() -> None:
        with torch.no_grad():
            model.encode_images(pixels)

    encode()
    assert 1 < 2 * made.encoding / measured_peak(encode) < 1.4
