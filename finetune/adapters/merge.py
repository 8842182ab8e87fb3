"""Merging adapters into the base weights: the sum W + scale * B A is taken in fp32 and cast once.

What a merge is verified by is in merge_report.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from finetune.adapters.card_file import CARD_FILE, is_edited
from finetune.adapters.generation_config import store_max_new_tokens
from finetune.adapters.merge_report import MergeReport, Probes, distances, probe_logits
from finetune.adapters.metadata import trained_on, training_facts
from finetune.adapters.network import adapted_config
from finetune.adapters.storage import load_adapter
from finetune.lora.linear import remove_lora
from finetune.lora.nf4 import dequantize, forget_original, open_base, quantization_of
from finetune.lora.protocol import adapters, merge_into
from finetune.system.atomic import MANIFEST, files_of, occupied, write_whole
from finetune.system.progress import progress_bar
from model import PaliGemma, fetch
from model.convert import convert


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


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    output: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    into: Literal["full", "dequantized"] = "full",
    replace: bool = False,
) -> MergeReport:
    """Merge a saved adapter into a base checkpoint, verify, write to `output` and re-open what was written.

    The base is opened in fp32 for reference, then cast; where the adapter was trained on NF4, in NF4 before that, and
    for "dequantized" once more in full. Only one copy of the network is in memory at a time.

    Args:
        into: "full", the base as it was published; or, for an adapter that was trained on NF4, "dequantized": the
            weights that NF4 stands for, which is what the adapter saw.
        replace: a checkpoint that was written to `output` before is replaced, once the new one is complete.

    Raises:
        ValueError: the adapter does not fit the base, there is something at `output` (with `replace`, something else
            than a checkpoint of ours), or the verification failed; nothing is written then.
        OSError: the disk is full; `output` is as it was.
    """
    if occupied(output) and not replace:
        raise ValueError(f"{output} exists already: choose another --output, or overwrite it with --force")
    directory = fetch(base, revision)
    require_replaceable(output, directory)
    if into == "dequantized" and not trained_on(adapter):
        raise ValueError(f"{adapter} was not trained on NF4: there is no {into} base to merge it into, only the full")
    with progress_bar("", "step", delay=0, bar_format="{desc}") as bar:
        merging = Merging(directory, Path(adapter), torch.device(device), bar.set_description_str)
        model, report = merging.into_full(dtype) if into == "full" else merging.into_dequantized(dtype)
        if problems := report.problems():
            advice = "" if dtype == torch.float32 else "\n--dtype float32 rounds nothing away, at twice the size"
            raise ValueError(
                "the merge is not to be trusted, nothing was written:\n  "
                + "\n  ".join(problems)
                + f"\n{report}{advice}"
            )
        merging.tell(f"writing {output}")
        write_merged(model, output, training_facts(adapter).max_new_tokens, replace)
    return report


@dataclasses.dataclass(frozen=True)
class Merging:
    """A base and an adapter on it, opened as often as a merge needs; `tell` gets what is done at the moment."""

    directory: Path
    adapter: Path
    device: torch.device
    tell: Callable[[str], object]

    def into_full(self, dtype: torch.dtype) -> tuple[PaliGemma, MergeReport]:
        """The published base with the adapter merged into it, and the verification."""
        nf4 = None
        if trained_on(self.adapter):
            model, trained = self.open_dequantized(dtype)
            nf4 = trained, self.merge(model).merged
            del model  # before the next one is opened
        model = self.open(torch.float32)
        exact = None if dtype == torch.float32 else self.probe(model, "of the base in fp32")
        probes = self.merge(model.to(dtype))
        from_nf4 = distances(nf4[0], full=probes.merged, dequantized=nf4[1]) if nf4 else {}
        return model, probes.report(dtype, exact, from_nf4)

    def into_dequantized(self, dtype: torch.dtype) -> tuple[PaliGemma, MergeReport]:
        """The weights that NF4 stands for with the adapter merged into them, and the verification."""
        full = self.merge(self.open(dtype)).merged
        exact = None
        if dtype != torch.float32:
            dense = dequantize(self.open(torch.float32, trained_on(self.adapter)))
            exact = self.probe(dense, "of the base in fp32")
            del dense  # before the next one is opened
        model, trained = self.open_dequantized(dtype)
        probes = self.merge(model)
        return model, probes.report(dtype, exact, distances(trained, full=full, dequantized=probes.merged))

    def open(self, dtype: torch.dtype, quantize: str | None = None) -> PaliGemma:
        """The base, with the connector, resolution and tiles that the adapter was trained with."""
        self.tell(f"opening the base in {quantize or str(dtype).removeprefix('torch.')}")
        model = open_base(self.directory, dtype, self.device, quantize)
        convert(model, adapted_config(self.directory, self.adapter))
        return model

    def open_dequantized(self, dtype: torch.dtype) -> tuple[PaliGemma, Tensor]:
        """The weights that NF4 stands for, and the logits of the NF4 base with the adapter, as it was trained."""
        model = self.open(dtype, trained_on(self.adapter))
        load_adapter(model, self.adapter)
        trained = self.probe(model, "of the base in NF4 with the adapter")
        remove_lora(model)
        return dequantize(model), trained

    def merge(self, model: PaliGemma) -> Probes:
        """Merge the adapter into a base, in place, with the logits before, with the adapter and after."""
        plain = self.probe(model, "of the base")
        load_adapter(model, self.adapter)
        adapted = self.probe(model, "with the adapter")
        self.tell("merging")
        modules = len(merge_lora(model))
        return Probes(modules, plain, adapted, self.probe(model, "of what was merged"))

    def probe(self, model: PaliGemma, whose: str) -> Tensor:
        self.tell(f"logits {whose}")
        return probe_logits(model)


def write_merged(model: PaliGemma, output: Path, max_new_tokens: int | None, replace: bool) -> None:
    """Write a checkpoint whole and open it again.

    Raises:
        ValueError: what is on the disk is not what was saved.
    """

    def fill(path: Path) -> None:
        model.save_pretrained(path)
        store_max_new_tokens(path, max_new_tokens)

    write_whole(output, fill, sum(parameter.nbytes for parameter in model.parameters()), replace)
    # By bits, not by logits: where in memory a weight begins may change the rounding of a product.
    for name, written in PaliGemma.from_pretrained(output, model.dtype).named_parameters():
        if not torch.equal(written, model.get_parameter(name).cpu()):
            raise ValueError(
                f"{output}, opened again, has another {name} than what was saved: the disk or the write failed"
            )


def require_replaceable(output: Path, base: Path) -> None:
    """ValueError where `output` holds anything but a checkpoint that was written here before, or is the base itself."""
    if not occupied(output):
        return
    expected = "--force overwrites a merged checkpoint only: choose another --output"
    if not (output / "config.json").is_file() or not (listed := files_of(output)):
        raise ValueError(f"{output} is no checkpoint that was written here ({MANIFEST} lists its files). {expected}")
    ours = listed | {MANIFEST} | (set() if is_edited(output) else {CARD_FILE})
    if foreign := sorted({path.name for path in output.iterdir()} - ours):
        raise ValueError(f"{output} holds {', '.join(foreign)}, which was not written with it. {expected}")
    if output.resolve() == base.resolve():
        raise ValueError(f"{output} is the base itself. {expected}")
