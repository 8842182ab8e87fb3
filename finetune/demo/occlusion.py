"""What an answer depends on: how much less probable it gets with a part of the image covered in grey.

Occlusion (Zeiler and Fergus, arXiv 1311.2901, section 4.2): no gradients, any network, and the figure means what it
says. A part that another part can replace shows nothing, and what the network makes of grey is its own matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import product

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import collate
from data.drawing import large_enough
from data.images import ImageSource, open_image
from finetune.demo.networks import Network
from model import IGNORE_INDEX

LEAST = 0.1  # share of the probability that has the brightest colour, where none is larger
GREY = (128, 128, 128)  # zero, or close to it, once the processor has normalised it


@dataclasses.dataclass(frozen=True)
class Occlusion:
    """Probability of the whole answer, with the image as it is and with each patch covered, f64 [rows, columns]."""

    whole: float
    covered: Tensor

    @property
    def falls(self) -> Tensor:
        """The share of the probability that is lost, f64 [rows, columns]; negative where it grows."""
        return 1 - self.covered / self.whole if self.whole > 0 else torch.zeros_like(self.covered)

    def sentence(self) -> str:
        """What the map shows, in words."""
        place = int(self.covered.argmin())
        row, column = divmod(place, self.covered.shape[1])
        lowest = float(self.covered.flatten()[place])
        if lowest >= self.whole:
            return f"The answer has {self.whole:.1%} probability, and no covered patch lowers it."
        return (
            f"The answer has {self.whole:.1%} probability, and {lowest:.1%} with the patch in row {row + 1}, column "
            f"{column + 1} covered, which matters most."
        )


def occlusion_map(
    network: Network, image: ImageSource, prompt: str, answer: Sequence[int], grid: int = 8, batch_size: int = 16
) -> Occlusion:
    """Cover each of `grid` x `grid` patches in turn, and take the probability of the same answer.

    Args:
        answer: token ids, as in `Answered.ids`.
        batch_size: covered images at once on the device.

    Raises:
        ValueError: an empty answer, no patches, an image that cannot be used.
    """
    if not answer or grid < 1:
        raise ValueError(f"{len(answer)} tokens and a grid of {grid}: expected an answer and at least one patch")
    opened = open_image(image)
    views = [opened, *covered_images(opened, grid)]
    starts = range(0, len(views), batch_size)
    scored = [answer_log_probs(network, views[start : start + batch_size], prompt, answer) for start in starts]
    first, *others = torch.cat(scored).double().exp().tolist()
    return Occlusion(first, torch.tensor(others, dtype=torch.float64).view(grid, grid))


def covered_images(image: Image.Image, grid: int) -> Iterator[Image.Image]:
    """The image with one patch of `grid` x `grid` in grey each time, row by row."""
    across, down = ([round(i * side / grid) for i in range(grid + 1)] for side in image.size)
    for row, column in product(range(grid), range(grid)):
        view = image.copy()
        view.paste(GREY, (across[column], down[row], across[column + 1], down[row + 1]))
        yield view


@torch.inference_mode()
def answer_log_probs(network: Network, images: Sequence[ImageSource], prompt: str, answer: Sequence[int]) -> Tensor:
    """Log-probability of the same answer to the same prompt, for each of B images: [B], on the CPU."""
    model, processor = network.model, network.processor
    asked = processor.encode(prompt)["input_ids"]
    row = {
        "input_ids": torch.cat((asked, torch.tensor(answer))),
        "token_type_ids": torch.tensor([0] * len(asked) + [1] * len(answer)),
        "labels": torch.tensor([IGNORE_INDEX] * len(asked) + list(answer)),
    }
    rows = collate([row | {"pixel_values": processor.pixels(image)} for image in images], processor.pad_id)
    logits = model(**{name: tensor.to(model.device) for name, tensor in rows.items()}).logits  # (B * T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.tensor(list(answer) * len(images), device=logits.device)[:, None]
    chosen = logits.gather(1, targets)[:, 0] - logits.logsumexp(dim=1)  # (B * T,)
    return chosen.view(len(images), len(answer)).sum(dim=1).cpu()


def heat_map(image: ImageSource, falls: Tensor) -> Image.Image:
    """The image in grey under colours: dark where covering changes nothing, bright where the answer depends on it most.

    falls: f64 [rows, columns], as in `Occlusion`. The largest has the brightest colour, unless it is below LEAST: what
        hardly matters stays dark.
    """
    opened = large_enough(open_image(image))
    shares = (falls / max(float(falls.max()), LEAST)).clamp(min=0)
    smooth = Image.fromarray((255 * shares.numpy()).astype(np.uint8)).resize(opened.size, Image.Resampling.BILINEAR)
    heat = np.asarray(smooth, np.float64) / 255  # (H, W)
    colors = matplotlib.colormaps["inferno"](heat)[..., :3]  # (H, W, 3)
    grey = np.asarray(opened.convert("L"), np.float64)[..., None] / 255  # (H, W, 1)
    return Image.fromarray((255 * (0.45 * grey + 0.55 * colors)).astype(np.uint8))
