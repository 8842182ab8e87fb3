"""How a merge is verified: by logits on a seeded probe batch, never by keys.

The adapter does something; in fp32 the merged network equals base + adapter; in bf16 the two differ by no more than
twice what bf16 itself costs the base.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from model import PaliGemma

FP32_TOLERANCE = 1e-5  # largest difference of logits, relative to the largest logit where that exceeds 1
BF16_FACTOR = 2.0  # times the base's own bf16-to-fp32 distance


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


@dataclasses.dataclass(frozen=True)
class Probes:
    """Logits on the probe batch, fp32 [rows * text_tokens, V], of one base."""

    modules: int  # that the adapter adapts
    plain: Tensor
    adapted: Tensor  # with the adapter
    merged: Tensor

    def report(self, dtype: torch.dtype, exact: Tensor | None, from_nf4: dict[str, float]) -> MergeReport:
        """What the logits show. exact: of the base in fp32; None where it is the base itself."""
        return MergeReport(
            dtype=dtype,
            modules=self.modules,
            largest_logit=self.adapted.abs().max().item(),
            effect=(self.adapted - self.plain).abs().max().item(),
            largest=(self.merged - self.adapted).abs().max().item(),
            drift=root_mean_square(self.merged - self.adapted),
            rounding=0.0 if exact is None else root_mean_square(self.plain - exact),
            changed_tokens=(self.merged.argmax(-1) != self.adapted.argmax(-1)).float().mean().item(),
            from_nf4=from_nf4,
        )


@torch.inference_mode()
def probe_logits(model: PaliGemma, rows: int = 2, text_tokens: int = 24) -> Tensor:
    """fp32 logits [rows * text_tokens, V] of the text positions of a seeded batch: random images, random tokens."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    images = config.num_image_tokens
    pixels = torch.rand(rows, *config.pixel_shape, generator=generator) * 2 - 1
    text = torch.randint(3, config.text.vocab_size, (rows, text_tokens), generator=generator)
    text = text.masked_fill(text == config.image_token_id, 3)
    input_ids = torch.cat((torch.full((rows, images), config.image_token_id), text), dim=1).to(model.device)
    hidden = model.hidden_states(input_ids, image_features=model.encode_images(pixels.to(model.device)))
    return model.language_model.head(hidden[:, images:]).flatten(0, 1).float().cpu()


def root_mean_square(difference: Tensor) -> float:
    return difference.pow(2).mean().sqrt().item()


def distances(trained: Tensor, **merged: Tensor) -> dict[str, float]:
    """Root mean squares of the differences from the logits of the NF4 base with the adapter, by what differs."""
    return {into: root_mean_square(logits - trained) for into, logits in merged.items()}
