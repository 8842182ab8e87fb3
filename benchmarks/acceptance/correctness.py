"""Whether what is computed on the device is right: beside the library and PEFT, and beside our own fp64.

What depends on rounding is measured by its relative distance from fp64: ours may be at most TWICE the library's own, or
rounding's floor. The library takes its norms in fp32 whatever the dtype, so the fp64 is ours; that the library is near
it, too, is asked for with an absolute bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import arms, generate
from benchmarks.acceptance.bench import Bench, gradients_of
from benchmarks.acceptance.findings import Finding, Part, at_most, imported, judged
from benchmarks.acceptance.rounding import NEAR, beside, distance, joined, worst

BF16_LIMIT = 1.2  # times the library's own distance in bf16
ROWS = 6
Results = dict[str, dict[str, Tensor]]  # what was compared -> tensors by name


def no_tf32(bench: Bench) -> Iterator[Finding]:
    """fp32 products are fp32's own; every check behind this one relies on it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator(bench.device).manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator, device=bench.device) for _ in range(2))
    yield at_most("no_tf32", distance(a @ b, a.double() @ b.double()), 1e-5)


def fp32(bench: Bench) -> Iterator[Finding]:
    """Logits, loss and gradients of padded rows, beside transformers and PEFT."""
    examples = bench.examples(ROWS)
    batch = bench.batch(examples)
    real = batch["attention_mask"].bool()
    texts = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def ours(dtype: torch.dtype) -> Results:
        model = bench.adapted(dtype).train()
        with torch.no_grad():
            logits = model(**texts).logits[real]
        trained, loss_of = arms.ours_on(model, "nothing")
        loss = forward_and_backward(loss_of, batch)
        return {"logits": {"": logits}, "loss": {"": loss}, "gradients": gradients_of(trained)}

    def library(dtype: torch.dtype) -> Results:
        trained, model = arms.library_on(bench.library(dtype), bench.adapter_directory(), False, False)
        output = model(**batch, use_cache=False)
        output.loss.backward()
        logits, loss = output.logits.detach()[real], output.loss.detach()
        return {"logits": {"": logits}, "loss": {"": loss}, "gradients": gradients_of(trained)}

    truth = ours(torch.float64)
    bench.keep_only(torch.float32)
    mine, theirs = ours(torch.float32), library(torch.float32)
    for name, wanted in truth.items():
        far = worst(theirs[name], wanted)
        yield at_most(f"fp32.{name}.library", far, NEAR)
        yield beside(f"fp32.{name}", worst(mine[name], wanted), far, "the library's")


def bf16(bench: Bench) -> Iterator[Finding]:
    """Logits and gradients in bf16: no further from their fp32 than the library's from its own."""
    batch = bench.batch(bench.examples(ROWS))
    texts = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def logits(make: Callable[[torch.dtype], torch.nn.Module], dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            found: Tensor = make(dtype)(**texts).logits
        return found[batch["attention_mask"].bool()]

    def ours(dtype: torch.dtype) -> Tensor:
        return gradients(arms.ours_on(bench.adapted(dtype), "nothing"))

    def library(dtype: torch.dtype) -> Tensor:
        return gradients(arms.documented_on(bench.library(dtype), bench.adapter_directory(), checkpointing=False))

    def gradients(arm: arms.Arm) -> Tensor:
        trained, loss_of = arm
        forward_and_backward(loss_of, batch)
        return joined(gradients_of(trained))

    kinds = (torch.bfloat16, torch.float32)
    bench.keep_only(torch.float32)
    mine, theirs = (distance(*(logits(make, kind) for kind in kinds)) for make in (bench.ours, bench.library))
    yield beside("bf16.logits", mine, theirs, "the library's", BF16_LIMIT, floor=0.0)
    mine, theirs = (distance(*(make(kind) for kind in kinds)) for make in (ours, library))
    yield beside("bf16.gradients", mine, theirs, "the library's", BF16_LIMIT, floor=0.0)


def attention(bench: Bench) -> Iterator[Finding]:
    """Which implementations of attention a training step takes: never the one of separate products."""
    batch = {name: tensor.to(bench.device) for name, tensor in arms.make_batch(bench.config, 2).items()}
    for dtype in (torch.bfloat16, torch.float32):
        _, loss_of = arms.ours_on(bench.adapted(dtype), "nothing")
        work = partial(forward_and_backward, loss_of, batch)
        work()
        profile = bench.card.profile(work)
        kernels = [kernel for kernel in profile.kernels if any(w in kernel for w in ("fmha", "flash", "attention"))]
        passed = bool(profile.attention) and not any("math" in kind for kind in profile.attention)
        found, name = ", ".join(sorted(profile.attention)) or "none seen", str(dtype).removeprefix("torch.")
        yield judged(f"attention.{name}", passed, found, "a fused one, never math", kernels=kernels)


def forward_and_backward(loss_of: arms.Loss, batch: dict[str, Tensor]) -> Tensor:
    loss = loss_of(batch)
    torch.autograd.backward(loss)
    return loss.detach()


def generation(bench: Bench) -> Iterator[Finding]:
    """Greedy tokens in fp32, one for one, for prompts of different lengths."""
    batch = {name: tensor.to(bench.device) for name, tensor in generate.make_batch(bench.config).items()}
    count = 16
    mine = generate.ours_on(bench.ours(torch.float32))(batch, count)
    theirs = generate.library_on(bench.library(torch.float32))(batch, count)
    same = int((mine == theirs).sum()) if mine.shape == theirs.shape else 0
    total = theirs.numel()
    yield judged("generation", same == total, f"{same} of {total} tokens", "all the library's", ours=mine.tolist())


def nf4(bench: Bench) -> Iterator[Finding]:
    """The codes and scales of NF4 are those that a CPU makes of the same weight."""
    import bitsandbytes.functional as library

    name = "language_model.model.layers.0.mlp.up_proj.weight"
    weight = bench.weights_in(torch.bfloat16)[name]

    def packed(device: torch.device) -> tuple[Tensor, Tensor]:
        codes, state = library.quantize_4bit(
            weight.to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return codes.cpu(), library.dequantize_4bit(codes, state).cpu()

    (codes, dense), (codes_here, dense_here) = packed(torch.device("cpu")), packed(bench.device)
    high, low = (((codes >> s) & 15) != ((codes_here >> s) & 15) for s in (4, 0))
    yield at_most("nf4.codes", (int(high.sum()) + int(low.sum())) / (2 * codes.numel()), 0.0, "of them differ")
    yield at_most("nf4.dense", distance(dense_here, dense), 2**-8)


CHECKS: Part = {
    "no_tf32": no_tf32,
    "fp32": fp32,
    "attention": attention,
    "step": imported("correctness_training", "cuts"),
    "syncs": imported("correctness_training", "synchronisations"),
    "dropout": imported("correctness_training", "dropout"),
    "bf16": bf16,
    "generation": generation,
    "steps": imported("correctness_training", "steps"),
    "resume": imported("correctness_training", "resume"),
    "nf4": nf4,
}
