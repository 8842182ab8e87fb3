"""Merging adapters into the base weights, and the proof that it was done right.

The sum W + scale * B A is taken in fp32 and cast once. The proof is by logits on a seeded probe batch, never by keys:
the adapter does something; in fp32 the merged network equals base + adapter; in bf16 the two differ by no more than
twice what bf16 itself costs the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.adapters.generation_config import store_max_new_tokens
from finetune.adapters.storage import load_adapter, trained_on, training_facts
from finetune.lora.linear import remove_lora
from finetune.lora.nf4 import dequantize, forget_original, open_base, quantization_of
from finetune.lora.protocol import adapters, merge_into
from finetune.system.atomic import MANIFEST, files_of, occupied, write_whole
from model import PaliGemma, fetch

FP32_TOLERANCE = 1e-5  # largest difference of logits, relative to the largest logit where that exceeds 1
BF16_FACTOR = 2.0  # times the base's own bf16-to-fp32 distance


def merge_lora(model: nn.Module) -> list[str]:
    """Merge every adapter into its base weights, in place, and put the plain modules back; returns the paths.

    Raises:
        ValueError: no adapters, an NF4 base, or a merged weight is not finite. The model is untouched then.
    """
    if quantization_of(model):
        raise ValueError("an NF4 base cannot hold merged weights: load the full one, or dequantize(model) first")
    if not any(adapters(model)):
        raise ValueError("the model has no adapters to merge: load_adapter(model, directory) first")
    for path, adapter in adapters(model):
        for name, value in adapter.merged_parameters().items():
            if not value.isfinite().all():
                raise ValueError(
                    f"{path}.{name}: merged values are not finite; the adapter is broken, or overflows {value.dtype}"
                )
    for _, adapter in adapters(model):
        merge_into(adapter.base_module(), adapter)
    paths = remove_lora(model)
    for path in paths:
        forget_original(model.get_submodule(path))
    return paths


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What the verification measured on the probe batch; distances are differences of logits."""

    dtype: torch.dtype
    modules: int  # merged
    largest_logit: float
    effect: float  # adapter against base, largest
    largest: float  # merged against base + adapter, largest
    drift: float  # the same, root mean square
    rounding: float  # base in `dtype` against base in fp32, root mean square
    changed_tokens: float  # share of positions whose most likely token is another one after merging
    from_nf4: dict[str, float] = dataclasses.field(default_factory=dict)  # NF4 base + adapter against what it was
    # merged into, root mean square, for each choice of `into`; empty where the adapter was not trained on NF4

    def problems(self) -> list[str]:
        """Why this merge is not to be trusted; empty when it is."""
        found = []
        if not self.effect > 0:
            found.append("the adapter changes nothing: base and base + adapter give the same logits")
        if self.dtype == torch.float32:
            allowed = FP32_TOLERANCE * max(1.0, self.largest_logit)
            if not self.largest <= allowed:
                found.append(f"merged logits differ by up to {self.largest:.2e} in fp32, allowed {allowed:.2e}")
        elif not self.drift <= BF16_FACTOR * self.rounding:
            found.append(
                f"merging moves the logits by {self.drift:.2e} (root mean square), more than {BF16_FACTOR:g} times the "
                f"{self.rounding:.2e} that {self.dtype} costs the base"
            )
        return found

    def __str__(self) -> str:
        lines = [
            f"merged {self.modules} modules in {str(self.dtype).removeprefix('torch.')}; on the probe batch:",
            f"  adapter against base           largest {self.effect:.3e}",
            f"  merged against base + adapter  largest {self.largest:.3e}, rms {self.drift:.3e}",
            f"  base: rounding of the dtype    rms {self.rounding:.3e}",
            f"  most likely tokens changed     {self.changed_tokens:.2%}",
        ]
        for into, drift in self.from_nf4.items():
            lines.append(f"  against NF4 base + adapter     rms {drift:.3e} merged into the {into} base")
        return "\n".join(lines)


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    output: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    into: str = "full",
    replace: bool = False,
) -> MergeReport:
    """Merge a saved adapter into a base checkpoint, verify, write to `output` and re-open what was written.

    Only one copy of the network is in memory at a time: the fp32 one for reference, then the one in `dtype`.

    Args:
        into: "full", the base as it was published; or, for an adapter that was trained on NF4, "dequantized": the
            weights that NF4 stands for, which is what the adapter saw.
        replace: a checkpoint that was written to `output` before gives way, once the new one is complete.

    Raises:
        ValueError: the adapter does not fit the base, there is something at `output` (with `replace`, something else
            than a checkpoint of ours), or the verification failed; nothing is written then.
        OSError: the disk is full; `output` is as it was.
    """
    if occupied(output) and not replace:
        raise ValueError(f"{output} exists already: choose another --output, or overwrite it with --force")
    directory = fetch(base, revision)
    require_replaceable(output, directory)
    bases: dict[str, Callable[[torch.dtype], PaliGemma]] = {"full": lambda dtype: open_base(directory, dtype, device)}
    from_nf4: dict[str, float] = {}
    if kept := trained_on(adapter):
        bases["dequantized"] = lambda dtype: dequantize(open_base(directory, dtype, device, kept))
        trained = logits_with_adapter(open_base(directory, dtype, device, kept), adapter)
        from_nf4 = {
            name: root_mean_square(logits_with_adapter(opened(dtype), adapter, merged=True) - trained)
            for name, opened in bases.items()
        }
    if into not in bases:
        raise ValueError(f"{adapter} was not trained on NF4: there is no {into} base to merge it into, only the full")
    opened = bases[into]
    exact_base = None if dtype == torch.float32 else probe_logits(opened(torch.float32))
    model = opened(dtype)
    plain = probe_logits(model)
    load_adapter(model, adapter)
    adapted = probe_logits(model)
    modules = len(merge_lora(model))
    merged = probe_logits(model)
    report = MergeReport(
        dtype=dtype,
        modules=modules,
        largest_logit=adapted.abs().max().item(),
        effect=(adapted - plain).abs().max().item(),
        largest=(merged - adapted).abs().max().item(),
        drift=root_mean_square(merged - adapted),
        rounding=0.0 if exact_base is None else root_mean_square(plain - exact_base),
        changed_tokens=(merged.argmax(-1) != adapted.argmax(-1)).float().mean().item(),
        from_nf4=from_nf4,
    )
    if problems := report.problems():
        mend = "" if dtype == torch.float32 else "\n--dtype float32 rounds nothing away, at twice the size"
        raise ValueError(
            "the merge is not to be trusted, nothing was written:\n  " + "\n  ".join(problems) + f"\n{report}{mend}"
        )
    size = sum(parameter.nbytes for parameter in model.parameters())

    def fill(path: Path) -> None:
        model.save_pretrained(path)
        store_max_new_tokens(path, training_facts(adapter).max_new_tokens)

    write_whole(output, fill, size, replace)
    # By bits, not by logits: where in memory a weight begins may change the rounding of a product.
    for name, written in PaliGemma.from_pretrained(output, dtype).named_parameters():
        if not torch.equal(written, model.get_parameter(name).cpu()):
            raise ValueError(
                f"{output}, opened again, has another {name} than what was saved: the disk or the write failed"
            )
    return report


def require_replaceable(output: Path, base: Path) -> None:
    """ValueError where `output` holds anything but a checkpoint that was written here before, or is the base itself."""
    if not occupied(output):
        return
    expected = "--force overwrites a merged checkpoint only: choose another --output"
    if not (output / "config.json").is_file() or not (listed := files_of(output)):
        raise ValueError(f"{output} is no checkpoint that was written here ({MANIFEST} lists its files). {expected}")
    if foreign := sorted({path.name for path in output.iterdir()} - listed - {MANIFEST}):
        raise ValueError(f"{output} holds {', '.join(foreign)}, which was not written with it. {expected}")
    if output.resolve() == base.resolve():
        raise ValueError(f"{output} is the base itself. {expected}")


def logits_with_adapter(model: PaliGemma, adapter: str | Path, merged: bool = False) -> Tensor:
    load_adapter(model, adapter)
    if merged:
        merge_lora(model)
    return probe_logits(model)


@torch.inference_mode()
def probe_logits(model: PaliGemma, rows: int = 2, text_tokens: int = 24) -> Tensor:
    """fp32 logits [rows * text_tokens, V] of the text positions of a seeded batch: random pictures, random tokens."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side, images = config.vision.image_size, config.vision.num_patches
    pixels = torch.rand(rows, config.vision.num_channels, side, side, generator=generator) * 2 - 1
    text = torch.randint(3, config.text.vocab_size, (rows, text_tokens), generator=generator)
    text = text.masked_fill(text == config.image_token_id, 3)
    input_ids = torch.cat((torch.full((rows, images), config.image_token_id), text), dim=1).to(model.device)
    hidden = model.hidden_states(input_ids, image_features=model.encode_images(pixels.to(model.device)))
    return model.language_model.head(hidden[:, images:]).flatten(0, 1).float().cpu()


def root_mean_square(difference: Tensor) -> float:
    return difference.pow(2).mean().sqrt().item()
