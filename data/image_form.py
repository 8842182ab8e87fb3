"""From an opened image to numbers: padded, cut into tiles, resized, normalised, as a checkpoint's files say.

Pixels are the reference processor's bit for bit, in its order of roundings. Axes: H and W pixels.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class PixelForm(NamedTuple):
    """How 8-bit pixels become numbers: resized, times the factor, minus the mean, over the deviation."""

    resample: int
    factor: float
    mean: tuple[float, ...]  # of red, green and blue, as std
    std: tuple[float, ...]


class ImageForm(NamedTuple):
    """What the network sees of an image, where it is not what the checkpoint's files say."""

    size: int  # height and width in pixels
    tiles: int  # 1: the image whole; 4: its quarters and the whole
    aspect: str  # squash, or pad with grey to a square first
    num_image_tokens: int  # N, of a row


def pixels_of(image: Image.Image, pixel_form: PixelForm, image_form: ImageForm) -> Tensor:
    """f32[3, H, W]; with tiles f32[5, 3, H, W], the quarters row by row and the whole."""
    if image_form.aspect == "pad":
        image = padded(image, tuple(int(255 * mean) for mean in pixel_form.mean))
    if image_form.tiles == 1:
        return normalized(image, pixel_form, image_form.size)
    return torch.stack([normalized(view, pixel_form, image_form.size) for view in (*quarters(image), image)])


def normalized(image: Image.Image, form: PixelForm, size: int) -> Tensor:
    """Resized, as numbers: f32[3, H, W]."""
    resized = image.resize((size, size), form.resample)  # u8[H, W, 3]
    scaled = (np.asarray(resized, np.float64) * form.factor).astype(np.float32)
    values = (scaled - np.array(form.mean, np.float32)) / np.array(form.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def padded(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of this colour, as LLaVA 1.5 pads (arXiv 2310.03744)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def quarters(image: Image.Image) -> list[Image.Image]:
    """The four quarters, row by row, at least one pixel each: Idefics2's tiles (arXiv 2405.02246, section 4.3)."""
    width, height = image.size
    x, y = max(1, width // 2), max(1, height // 2)
    left, top = min(x, width - 1), min(y, height - 1)  # where the right and lower ones begin
    boxes = [(0, 0, x, y), (left, 0, width, y), (0, top, x, height), (left, top, width, height)]
    return [image.crop(box) for box in boxes]


def image_form_of(config: dict[str, Any], folder: Path) -> ImageForm:
    """What a config.json says of images. ValueError where it is no network's that this toolkit writes."""
    vision = config.get("vision_config", {})  # the published one leaves the size out
    size, tiles, aspect = vision.get("image_size", 224), config.get("tiles", 1), config.get("aspect", "squash")
    if tiles not in (1, 4) or aspect not in ("squash", "pad"):
        expected = "expected 1 or 4, squash or pad"
        raise ValueError(f"{folder / 'config.json'}: tiles is {tiles!r} and aspect {aspect!r}; {expected}")
    tokens = (size // vision.get("patch_size", 14)) ** 2
    if config.get("connector") or tiles > 1:
        tokens = config.get("text_config", {}).get("num_image_tokens")
        if type(tokens) is not int or tokens < 1:
            raise ValueError(
                f"{folder / 'config.json'}: num_image_tokens at text_config is {tokens!r}; a network with a connector "
                "of its own or with tiles has to say how many image tokens a row has: copy the file from the checkpoint"
            )
    return ImageForm(size, tiles, aspect, tokens)


def read_pixel_form(folder: Path, image: ImageForm) -> PixelForm:
    """What the files say about pixels, SigLIP's values where they say nothing, checked against config.json."""
    wanted = {"size": {"height": image.size, "width": image.size}, "image_seq_length": image.num_image_tokens}
    wanted |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    forms = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = read_json(folder / name) if (folder / name).exists() else {}
        given = content.get("image_processor") if name == "processor_config.json" else content
        if not given:
            continue  # 4.x, too, writes a processor_config.json, but without pixels
        for key, value in wanted.items():
            if given.get(key, value) != value:
                difference = f"{key} is {given[key]}, by config.json it should be {value}"
                raise ValueError(f"{folder / name}: {difference}; copy both files from one PaliGemma checkpoint")
        mean, std = (tuple(given.get(key, (0.5, 0.5, 0.5))) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or 0 in std:
            raise ValueError(f"{folder / name}: expected 3 channels and no std of 0, got mean {mean}, std {std}")
        resample, factor = given.get("resample", Image.Resampling.BICUBIC), given.get("rescale_factor", 1 / 255)
        forms[name] = PixelForm(resample, factor, mean, std)
    if len(set(forms.values())) != 1:
        files = "preprocessor_config.json or processor_config.json with an image_processor, or both alike"
        raise ValueError(f"{folder}: expected {files}, found {forms}; copy one from the base checkpoint")
    return next(iter(forms.values()))


def read_json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint. ValueError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; give the directory of a PaliGemma checkpoint") from error
