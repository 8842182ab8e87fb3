"""`train.py --inspect`: the first examples of a run as the network sees them, as a table and as one HTML file.

The file needs nothing from outside; every text of the data is escaped by the template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from data import Processor
from data.image_form import PixelForm
from finetune.config.schema import RunConfig
from finetune.preflight.inspection import Inspection, inspect_examples
from finetune.report.embedded import data_uri
from finetune.report.page import render
from finetune.system.atomic import write_text_whole
from finetune.system.console import new_table, show
from finetune.system.terminal import one_line, shortened, visible
from model import IGNORE_INDEX

INSPECT_FILE = "inspect.html"
# What a token is -> its colour in the image of the attention mask; templates/inspect.html has the same.
KINDS = {"image": "#4c86e0", "prefix": "#2f9e6b", "suffix": "#d9822b", "padding": "#8a94a6"}
JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class Token:
    """A token, or a run of image tokens or of padding.

    Attributes:
        text: the piece of the tokenizer. label: None where the loss ignores it.
        position: of the first one in its row, from 0. count: how many there are.
    """

    text: str
    id: int
    label: int | None
    position: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Shown:
    """An example on the page: images as data URIs, with tiles the quarters row by row and the whole, none of a row of
    text alone; its tokens by what they are, in order; and its attention mask as an image.
    """

    id: str
    prefix: str
    suffix: str
    images: list[str]
    tokens: list[tuple[str, list[Token]]]
    mask: str
    length: int


def inspect(config: RunConfig, page: Path | None = None) -> None:
    """Show the first examples and what was found in them, and write the page, by default OUTPUT/inspect.html.

    Raises:
        ValueError: the examples cannot be read; or, once all is shown, they would ruin the training.
    """
    found = inspect_examples(config)
    examples = [shown(found, row) for row in range(len(found.examples))]
    table = new_table("id", "prefix", learns(config), "tokens", "supervised")
    for one in examples:
        supervised = sum(len(tokens) for kind, tokens in one.tokens if kind == "suffix")
        table.add_row(one.id, shortened(one.prefix), shortened(one.suffix), str(one.length), str(supervised))
    show(table, *map(str, found.checks))
    file = page or Path(config.output, INSPECT_FILE)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(file, render("inspect.html", **of_inspection(config, found, examples)))
    show(f"the same as a page, with images and every token: {file}")
    if failed := [str(check) for check in found.checks if check.outcome == "fail"]:
        raise ValueError("these examples would ruin the training:\n  " + "\n  ".join(failed))


def learns(config: RunConfig) -> str:
    """What stands above the answers of an example."""
    return "learns to prefer | to" if config.learned_answers == "pair" else "learns to answer"


def of_inspection(config: RunConfig, found: Inspection, examples: list[Shown]) -> dict[str, Any]:
    """What the template shows."""
    checks = [dataclasses.replace(check, found=visible(check.found)) for check in found.checks]
    counts = {name: sum(check.outcome == name for check in checks) for name in ("pass", "warning", "fail")}
    return {
        "title": f"What {Path(config.output).name} learns from",
        "source": config.data.title("train"),
        "counts": counts,
        "checks": sorted(checks, key=lambda check: ("fail", "warning", "pass").index(check.outcome)),
        "examples": examples,
        "learns": learns(config),
        "kinds": list(KINDS),
        "is_tiled": found.dimensions.tiles > 1,
    }


def shown(found: Inspection, row: int) -> Shown:
    """One example of the batch, with the padding that the batch gives it."""
    example, processor = found.examples[row], found.processor
    batch = {name: tensor[row] for name, tensor in found.batch.items()}
    kinds = kinds_of(batch, found.dimensions.image_token_id)
    stretches = tokens_of(batch, kinds, processor)
    texts = {
        kind: " | ".join(text_of(tokens, processor) for of, tokens in stretches if of == kind)
        for kind in ("prefix", "suffix")
    }
    pixels: Tensor | None = example.get("pixel_values")
    views: Sequence[Tensor] = ()
    if pixels is not None:
        views = list(pixels[None] if pixels.ndim == 3 else pixels)  # each (3, H, W)
    return Shown(
        one_line(example["id"]),
        texts["prefix"],
        texts["suffix"],
        [data_uri(unnormalized(view, processor.pixel_form), "JPEG", JPEG_QUALITY) for view in views],
        stretches,
        data_uri(mask_image(found.attention[row].numpy(), kinds), "PNG", JPEG_QUALITY),
        len(example["input_ids"]),
    )


def kinds_of(row: Mapping[str, Tensor], image_token_id: int) -> list[str]:
    """What each token of a row [S] is, a key of KINDS."""
    columns = (row[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
    return [
        "padding" if not real else "suffix" if label != IGNORE_INDEX else "image" if id == image_token_id else "prefix"
        for id, real, label in zip(*columns, strict=True)
    ]


def tokens_of(row: Mapping[str, Tensor], kinds: list[str], processor: Processor) -> list[tuple[str, list[Token]]]:
    """The tokens of a row [S] in stretches of one kind and type; image tokens and padding, which are alike, as one."""
    stretches: list[tuple[str, list[Token]]] = []
    ids, labels, types = (row[name].tolist() for name in ("input_ids", "labels", "token_type_ids"))
    for position, (kind, id, label) in enumerate(zip(kinds, ids, labels, strict=True)):
        if not position or (kinds[position - 1], types[position - 1]) != (kind, types[position]):
            stretches.append((kind, []))
        tokens = stretches[-1][1]
        if tokens and kind in ("image", "padding") and tokens[-1].id == id:
            tokens[-1] = dataclasses.replace(tokens[-1], count=tokens[-1].count + 1)
            continue
        text = processor.tokenizer.id_to_token(id)
        supervised = None if label == IGNORE_INDEX else label
        tokens.append(Token("(no token)" if text is None else one_line(text), id, supervised, position))
    return stretches


def text_of(tokens: list[Token], processor: Processor) -> str:
    """The text of a stretch of tokens, without special ones, safe to be shown."""
    return visible(processor.tokenizer.decode([token.id for token in tokens]).strip())


def unnormalized(pixels: Tensor, form: PixelForm) -> Image.Image:
    """Pixels f32[3, H, W] as the vision tower gets them -> the image that they stand for."""
    values = pixels.permute(1, 2, 0).double().numpy() * np.array(form.std) + np.array(form.mean)
    return Image.fromarray((values / form.factor).round().clip(0, 255).astype(np.uint8))


def mask_image(allowed: npt.NDArray[np.bool_], kinds: list[str]) -> Image.Image:
    """bool [S, S], queries by keys -> an image with a pixel for each, in the colour of the key; clear where a query may
    not look.
    """
    colors = [bytes.fromhex(color[1:]) for color in KINDS.values()]
    of_key = np.array([1 + list(KINDS).index(kind) for kind in kinds], np.uint8)
    image = Image.fromarray(np.where(allowed, of_key[None, :], 0).astype(np.uint8), "P")
    image.putpalette(bytes(3) + b"".join(colors))
    image.info["transparency"] = 0
    return image
