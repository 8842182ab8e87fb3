"""The arms of a training step: what of a network is trained, the loss of a batch, and the step that takes both.

Each is made from a checkpoint and an adapter on disk (`ARMS`), or from networks that are in memory already (`..._on`).
benchmarks/train_step.py says what the arms are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import side_by_side
from finetune.adapters.storage import PREFIX, load_adapter
from finetune.lora.nf4 import open_base
from finetune.lora.protocol import trained_parameters
from model import IGNORE_INDEX, PaliGemma, PaliGemmaConfig
from model.checkpoint import canonical_name

PREFIX_TOKENS, SUFFIX_TOKENS, RANK = 13, 3, 16
Loss = Callable[[dict[str, Tensor]], Tensor]
Arm = tuple[dict[str, nn.Parameter], Loss]  # what is trained, under our names, and the loss of a batch
Opened = Callable[[Path, torch.dtype, torch.device], Arm]  # an arm from its case


def ours(case: Path, dtype: torch.dtype, device: torch.device, recompute: str, quantization: str | None = None) -> Arm:
    model = open_base(case / "checkpoint", dtype, device, quantization)
    load_adapter(model, case / "adapter")
    return ours_on(model, recompute)


def ours_on(model: PaliGemma, recompute: str) -> Arm:
    """recompute: "nothing" or "layers"."""
    decoder = model.train().language_model.model
    decoder.set_recompute(layers=len(decoder.layers) if recompute == "layers" else 0)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs = dict(batch)
        with torch.no_grad():
            features = model.encode_images(inputs.pop("pixel_values"))
        result = model(**inputs, image_features=features).loss
        assert isinstance(result, Tensor), "labels were given"
        return result

    return trained_parameters(model), loss


def library_on(base: Any, adapter: Path, tuned: bool, checkpointing: bool) -> tuple[dict[str, nn.Parameter], Any]:
    """The library's model with an adapter from disk in PEFT, and its trained parameters; tuned: in the base's dtype."""
    from peft import PeftModel

    dtype, place = base.dtype, str(base.device)
    model = PeftModel.from_pretrained(
        base, adapter, is_trainable=True, autocast_adapter_dtype=not tuned, torch_device=place
    )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = {our_name(name): p for name, p in model.train().named_parameters() if p.requires_grad}
    kind = dtype if tuned else torch.float32
    assert all(parameter.dtype == kind for parameter in trained.values()), f"adapters are not in {kind}"
    return trained, model


def documented(
    case: Path, dtype: torch.dtype, device: torch.device, checkpointing: bool = True, nf4: bool = False
) -> Arm:
    base = side_by_side.library_model(case / "checkpoint", dtype, device, nf4)
    return documented_on(base, case / "adapter", checkpointing)


def documented_on(base: Any, adapter: Path, checkpointing: bool = True) -> Arm:
    trained, model = library_on(base, adapter, tuned=False, checkpointing=checkpointing)
    kind, mixed = base.device.type, base.dtype == torch.bfloat16

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=mixed):
            result: Tensor = model(**batch, use_cache=False).loss
        return result

    return trained, loss


def tuned(case: Path, dtype: torch.dtype, device: torch.device, checkpointing: bool) -> Arm:
    base = side_by_side.library_model(case / "checkpoint", dtype, device)
    return tuned_on(base, case / "adapter", checkpointing)


def tuned_on(base: Any, adapter: Path, checkpointing: bool) -> Arm:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    trained, adapted = library_on(base, adapter, tuned=True, checkpointing=checkpointing)
    model: Any = adapted.get_base_model()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            features = model.get_image_features(batch["pixel_values"]).pooler_output
        hidden = model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
            use_cache=False,
        ).last_hidden_state
        targets = batch["labels"][:, 1:]
        supervised = targets != IGNORE_INDEX
        return F.cross_entropy(model.lm_head(hidden[:, :-1][supervised]).float(), targets[supervised])

    return trained, loss


def in_fp32(arm: Opened) -> Opened:
    """The same arm in fp32, whatever the others are in."""
    return lambda case, _, device: arm(case, torch.float32, device)


ARMS: dict[str, Opened] = {
    "ours": functools.partial(ours, recompute="nothing"),
    "ours-recompute": functools.partial(ours, recompute="layers"),
    "documented": documented,
    "documented-keeping": functools.partial(documented, checkpointing=False),
    "tuned": functools.partial(tuned, checkpointing=False),
    "tuned-checkpointing": functools.partial(tuned, checkpointing=True),
    "ours-fp32": in_fp32(functools.partial(ours, recompute="nothing")),
    "tuned-fp32": in_fp32(functools.partial(tuned, checkpointing=False)),
    "ours-nf4": functools.partial(ours, recompute="nothing", quantization="nf4"),
    "ours-nf4-recompute": functools.partial(ours, recompute="layers", quantization="nf4"),
    "documented-nf4": functools.partial(documented, nf4=True),
}
DENSE = [arm for arm in ARMS if "nf4" not in arm]
USUAL = [arm for arm in DENSE if "fp32" not in arm]
REFERENCES = ("documented", "documented-nf4")  # for a dense base and for one in NF4


def our_name(name: str) -> str:
    """A parameter of the model in PEFT -> its name in ours."""
    path = canonical_name(name.removeprefix(PREFIX).replace(".default.weight", ".weight"))
    assert path is not None, f"{name} is unknown"
    return path.removesuffix(".weight")


def make_batch(config: PaliGemmaConfig, rows: int) -> dict[str, Tensor]:
    """Random rows without padding, each with its own image."""
    generator = torch.Generator().manual_seed(0)
    images = config.num_image_tokens
    width = images + PREFIX_TOKENS + SUFFIX_TOKENS
    ids = torch.full((rows, width), config.image_token_id)
    words = (rows, width - images)
    ids[:, images:] = torch.randint(3, min(config.image_token_id, 256_000), words, generator=generator)
    types, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    types[:, -SUFFIX_TOKENS:] = 1
    labels[:, -SUFFIX_TOKENS:] = ids[:, -SUFFIX_TOKENS:]
    pixels = torch.rand(rows, *config.pixel_shape, generator=generator) * 2 - 1
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "labels": labels}
    return made | {"pixel_values": pixels}


def take_step(arm: Arm) -> Callable[[dict[str, Tensor], bool], dict[str, float]]:
    """A function (batch, measure) that takes an optimizer step: AdamW on fp32 copies of what is trained, which are the
    parameters themselves where these are fp32. With `measure` it returns the loss and the gradient's norm.
    """
    trained, loss_of = arm
    masters = [parameter.detach().float() for parameter in trained.values()]
    optimizer = torch.optim.AdamW(masters, lr=1e-4)

    def step(batch: dict[str, Tensor], measure: bool = False) -> dict[str, float]:
        loss, measured = loss_of(batch), {}
        torch.autograd.backward(loss)
        for parameter, master in zip(trained.values(), masters, strict=True):
            assert parameter.grad is not None, "every adapter takes part"
            master.grad, parameter.grad = parameter.grad.float(), None
        if measure:
            norms = torch.stack([master.grad.norm() for master in masters if master.grad is not None])
            measured = {"loss": loss.item(), "gradient": norms.norm().item()}
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(trained.values(), masters, strict=True):
                if parameter.dtype != master.dtype:
                    parameter.copy_(master)
        return measured

    return step
