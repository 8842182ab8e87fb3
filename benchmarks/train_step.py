"""One training step beside transformers + PEFT: time, peak memory, and on a GPU the largest batch.

    python -m benchmarks.train_step --checkpoint DIR --batch 1 --output benchmarks/RESULTS.md
    python -m benchmarks.train_step --checkpoint DIR --device cuda --cap-gib 6.9 --largest

A step: images through the tower, forward, backward, AdamW on fp32 adapters (rank 16, all language linears), gradients
dropped. Rows of one image, 13 prefix and 3 supervised tokens. What is compared:

    ours, ours-gate-up, ours-recompute   nothing, gate and up, or all layers computed again in the backward pass
    documented            the library's recipe: fp32 adapters under bf16 autocast, all logits, checkpointing
    documented-keeping    the same without checkpointing
    tuned                 logits of supervised rows only, adapters in the base's dtype (the optimizer keeps fp32
                          copies), vision without a graph, no autocast
    tuned-checkpointing   the same with checkpointing
    ours-nf4, ours-nf4-recompute, documented-nf4   the decoder's linears in NF4 (needs bitsandbytes); the library's is
                          the documented recipe on a base quantised as it documents, the vision tower left as it is

First the gate, in fp32 on two layers of each tower: every arm's loss within 1e-5 of the documented recipe's on the same
kind of base, every gradient within 1e-4 of its norm.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import side_by_side
from finetune import cli
from finetune.adapter import PREFIX, load_adapter
from finetune.lora import trained_parameters
from finetune.quantize import open_base
from model import IGNORE_INDEX, PaliGemmaConfig
from model.checkpoint import canonical_name

NAME = "benchmarks.train_step"
PREFIX_TOKENS, SUFFIX_TOKENS, RANK = 13, 3, 16
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # fp32 against fp32: other orders of summation
Loss = Callable[[dict[str, Tensor]], Tensor]
Arm = tuple[dict[str, nn.Parameter], Loss]  # what is trained, under our names, and the loss of a batch


def ours(case: Path, dtype: torch.dtype, device: torch.device, recompute: str, quantization: str | None = None) -> Arm:
    model = open_base(case / "checkpoint", dtype, device, quantization)
    load_adapter(model, case / "adapter")
    decoder = model.train().language_model.model
    decoder.set_recompute(layers=len(decoder.layers) if recompute == "layers" else 0, gate_up=recompute == "gate-up")

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs = dict(batch)
        with torch.no_grad():
            features = model.encode_images(inputs.pop("pixel_values"))
        result = model(**inputs, image_features=features).loss
        assert isinstance(result, Tensor), "labels were given"
        return result

    return trained_parameters(model), loss


def library(
    case: Path, dtype: torch.dtype, device: torch.device, tuned: bool, checkpointing: bool, nf4: bool = False
) -> tuple[dict[str, nn.Parameter], Any]:
    """The library's model with the adapter in PEFT, and its trained parameters."""
    from peft import PeftModel

    base = side_by_side.library_model(case / "checkpoint", dtype, device, nf4)
    model = PeftModel.from_pretrained(
        base, case / "adapter", is_trainable=True, autocast_adapter_dtype=not tuned, torch_device=str(device)
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
    trained, model = library(case, dtype, device, tuned=False, checkpointing=checkpointing, nf4=nf4)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            result: Tensor = model(**batch, use_cache=False).loss
        return result

    return trained, loss


def tuned(case: Path, dtype: torch.dtype, device: torch.device, checkpointing: bool) -> Arm:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    trained, adapted = library(case, dtype, device, tuned=True, checkpointing=checkpointing)
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


ARMS: dict[str, Callable[[Path, torch.dtype, torch.device], Arm]] = {
    "ours": functools.partial(ours, recompute="nothing"),
    "ours-gate-up": functools.partial(ours, recompute="gate-up"),
    "ours-recompute": functools.partial(ours, recompute="layers"),
    "documented": documented,
    "documented-keeping": functools.partial(documented, checkpointing=False),
    "tuned": functools.partial(tuned, checkpointing=False),
    "tuned-checkpointing": functools.partial(tuned, checkpointing=True),
    "ours-nf4": functools.partial(ours, recompute="nothing", quantization="nf4"),
    "ours-nf4-recompute": functools.partial(ours, recompute="layers", quantization="nf4"),
    "documented-nf4": functools.partial(documented, nf4=True),
}
DENSE = [arm for arm in ARMS if "nf4" not in arm]
REFERENCES = ("documented", "documented-nf4")  # for a dense base and for one in NF4


def our_name(name: str) -> str:
    """A parameter of the model in PEFT -> its name in ours."""
    path = canonical_name(name.removeprefix(PREFIX).replace(".default.weight", ".weight"))
    assert path is not None, f"{name} is unknown"
    return path.removesuffix(".weight")


def make_batch(config: PaliGemmaConfig, rows: int) -> dict[str, Tensor]:
    """Random rows without padding, each with its own image."""
    generator = torch.Generator().manual_seed(0)
    images, side = config.vision.num_patches, config.vision.image_size
    width = images + PREFIX_TOKENS + SUFFIX_TOKENS
    ids = torch.full((rows, width), config.image_token_id)
    words = (rows, width - images)
    ids[:, images:] = torch.randint(3, min(config.image_token_id, 256_000), words, generator=generator)
    types, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    types[:, -SUFFIX_TOKENS:] = 1
    labels[:, -SUFFIX_TOKENS:] = ids[:, -SUFFIX_TOKENS:]
    pixels = torch.rand(rows, 3, side, side, generator=generator) * 2 - 1
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "labels": labels}
    return made | {"pixel_values": pixels}


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one arm measures; with --gradients its loss and gradients alone, which go into that file."""
    device, dtype = side_by_side.start(arguments)
    trained, loss_of = ARMS[arguments.arm](arguments.case, dtype, device)
    batch = side_by_side.read_batch(arguments.case, device)
    batch = {name: torch.cat([t] * -(-arguments.batch // len(t)))[: arguments.batch] for name, t in batch.items()}
    if arguments.gradients:
        loss = loss_of(batch)
        torch.autograd.backward(loss)
        got = {name: p.grad.float().cpu().contiguous() for name, p in trained.items() if p.grad is not None}
        save_file(got, arguments.gradients)
        return {"loss": loss.item()}

    masters = [parameter.detach().float() for parameter in trained.values()]  # the parameter itself where it is fp32
    optimizer = torch.optim.AdamW(masters, lr=1e-4)

    def step(measure: bool = False) -> dict[str, float]:
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

    since = side_by_side.reset_peak(device)
    measured = step(measure=True)
    seconds = side_by_side.timed(step, arguments.steps, device)
    return {"seconds": seconds, **side_by_side.peaks(device), **measured, "since": since}


def gate(case: Path, arms: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Every way in which an arm differs, in fp32, from the documented recipe on the same kind of base."""

    def run(arm: str) -> tuple[float, dict[str, Tensor]]:
        file = case / f"{arm}.safetensors"
        more = ["--batch", "2", "--gradients", str(file)]
        loss: float = side_by_side.fresh(NAME, arm, case, side_by_side.exactly(arguments), *more)["loss"]
        return loss, load_file(file)

    problems = []
    for reference in REFERENCES:
        others = [arm for arm in arms if arm != reference and (arm in DENSE) == (reference in DENSE)]
        if not others:
            continue
        wanted_loss, wanted = run(reference)
        for arm in others:
            loss, got = run(arm)
            if not abs(loss - wanted_loss) <= LOSS_TOLERANCE:
                problems.append(f"{arm}: loss {loss:.7f} instead of {wanted_loss:.7f}")
            if got.keys() != wanted.keys():
                problems.append(f"{arm}: gradients of other parameters: {sorted(got.keys() ^ wanted.keys())[:5]}")
            for name in got.keys() & wanted.keys():
                error = ((got[name] - wanted[name]).norm() / wanted[name].norm()).item()
                if not error <= GRADIENT_TOLERANCE:
                    problems.append(f"{arm}: gradient of {name} is off by {error:.1e} of its norm")
    return problems


def find_largest(attempt: Callable[[int], dict[str, Any] | None], first: int) -> dict[int, dict[str, Any]]:
    """What fitted: batch size -> measurements. Doubles from `first` until an attempt finds no room, then bisects."""
    fitted: dict[int, dict[str, Any]] = {}
    low, high, size = 0, None, first
    while high is None or high - low > 1:
        if (measured := attempt(size)) is None:
            high = size
        else:
            low, fitted[size] = size, measured
        size = 2 * low if high is None else (low + high) // 2
    return fitted


def largest(case: Path, arms: Sequence[str], arguments: argparse.Namespace) -> str:
    """A table of each arm's largest batch and of its speed at its best."""
    body = [["arm", "largest batch", "samples/s at its best", "with batch", "reserved there, GiB"]]
    for arm in arms:

        def attempt(size: int, arm: str = arm) -> dict[str, Any] | None:
            measured = side_by_side.fresh(NAME, arm, case, arguments, "--batch", str(size))
            print(f"{arm}, batch {size}: {measured}", file=sys.stderr)
            return None if "out of memory" in measured else measured

        fitted = find_largest(attempt, arguments.batch)
        if not fitted:
            body.append([arm, "none", "", "", ""])
            continue
        best = max(fitted, key=lambda size: size / fitted[size]["seconds"])
        speed = f"{best / fitted[best]['seconds']:.2f}"
        body.append([arm, str(max(fitted)), speed, str(best), f"{fitted[best]['reserved']:.2f}"])
    return side_by_side.rows(body)


def main(argv: Sequence[str]) -> None:
    parser = side_by_side.parser(NAME, __doc__)
    parser.add_argument("--batch", type="positive", default=1, help="rows of a step")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=DENSE, metavar="ARM", help="default: all but those in NF4"
    )
    parser.add_argument(
        "--largest", action="store_true", help="on a GPU: find each arm's largest batch, from --batch on"
    )
    parser.add_argument("--gradients", type=Path, help="for --arm: write the gradients of one pass there, and stop")
    if (arguments := side_by_side.parse(parser, argv, list(ARMS), run_arm)) is None:
        return
    if arguments.largest and not arguments.device.startswith("cuda"):
        raise ValueError("--largest looks for the end of a GPU's memory: it needs --device cuda")
    with side_by_side.workplace(arguments) as (place, checkpoint):
        config = PaliGemmaConfig.from_directory(checkpoint)
        shallow = side_by_side.write_shallow(checkpoint, place / "layers")
        case = side_by_side.write_case(place / "gate", shallow, make_batch(config, 2), RANK)
        side_by_side.refuse(gate(case, arguments.arms, arguments))
        case = side_by_side.write_case(place / "case", checkpoint, make_batch(config, arguments.batch), RANK)
        if arguments.largest:
            parts = [largest(case, arguments.arms, arguments)]
        else:
            results = side_by_side.by_turns(NAME, arguments.arms, case, arguments, "--batch", str(arguments.batch))
            weighed = {"s/step": "seconds", **side_by_side.MEMORY[torch.device(arguments.device).type]}
            parts = side_by_side.compared(results, weighed, {"loss": "loss", "gradient norm": "gradient"})
        passed = f"Gate passed in fp32: loss within {LOSS_TOLERANCE}, gradients within {GRADIENT_TOLERANCE}."
        if set(arguments.arms) <= set(REFERENCES):
            passed = "No gate: there is nothing to compare."
        parts.append(f"From batch {arguments.batch}, {arguments.dtype}. {passed}")
        side_by_side.report(NAME, argv, arguments.output, parts)


if __name__ == "__main__":
    cli.run(main)
