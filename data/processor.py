"""Picture -> tensor, prefix and suffix -> ids, token types and labels, as PaliGemma was trained (arXiv 2407.07726).

    <image> x N  <bos>  prefix  "\\n"     token type 0, sees all of itself
    suffix  <eos>                        token type 1, causal; the labels

Token for token transformers' PaliGemmaProcessor, bit for bit its Pillow image processor, but where that would spoil an
example: <eos> or <image> in a person's text are spelled out as text; newlines within a prefix become spaces, for one
newline says where the answer begins; a text that is too long never loses image tokens, that newline or <eos>.
<loc0000> and <seg000> are words of the vocabulary and stay what they are. Not here: opening pictures (data/images.py).
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from data.collate import IGNORE_INDEX, collate
from data.images import ImageSource, open_image


def single_line(text: str) -> str:
    """The text with a space for each run of newlines, none at its ends."""
    return re.sub(r"[\r\n]+", " ", text.strip("\r\n"))


class PixelForm(NamedTuple):
    """How 8-bit pixels become numbers: resized, times the factor, minus the mean, over the deviation."""

    resample: int
    factor: float
    mean: tuple[float, ...]  # of red, green and blue, as std
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Processor:
    """Pictures and texts -> what the network takes; made by `from_pretrained`."""

    tokenizer: Tokenizer
    pixel_form: PixelForm
    image_size: int  # height and width of a picture, in pixels
    num_image_tokens: int  # N, one for each patch
    max_text_tokens: int  # the most that prefix, newline, suffix and <eos> take together
    pad_id: int  # this one and the next four: the tokens that structure a row
    eos_id: int
    bos_id: int
    image_token_id: int
    newline_id: int

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str], max_text_tokens: int = 128) -> "Processor":
        """Reads config.json, tokenizer.json and preprocessor_config.json (4.x) or processor_config.json (5.x).

        ValueError if one is missing or broken, or if two contradict each other.
        """
        if max_text_tokens < 3:
            raise ValueError(f"max_text_tokens is {max_text_tokens}; expected at least 3: newline, a token, <eos>")
        folder = Path(directory)
        config = _read_json(folder / "config.json")
        special_ids = {f"<{name}>": config.get(f"{name}_token_id", i) for i, name in enumerate(("pad", "eos", "bos"))}
        special_ids["<image>"] = config.get("image_token_id", config.get("image_token_index"))
        vision = config.get("vision_config", {})  # the published one leaves the size out
        image_size = vision.get("image_size", 224)
        num_image_tokens = (image_size // vision.get("patch_size", 14)) ** 2
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{folder / 'tokenizer.json'}: {error}; copy it from the base checkpoint") from error
        pixel_form = _read_pixel_form(folder, image_size, num_image_tokens)
        special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        for token, expected in special_ids.items():
            if special.get(token) != expected:
                fault = f"{token} is {expected} in config.json, {special.get(token)} as special token in tokenizer.json"
                raise ValueError(f"{folder}: {fault}; copy both files from one PaliGemma checkpoint")
        # A tokenizer.json carries the truncation and padding with which it was last used.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        (newline_id,) = tokenizer.encode("\n", add_special_tokens=False).ids
        ids = (*special_ids.values(), newline_id)
        return cls(tokenizer, pixel_form, image_size, num_image_tokens, max_text_tokens, *ids)

    def __call__(
        self, images: Sequence[ImageSource], prefixes: Sequence[str], suffixes: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """A right-padded batch as data/collate.py describes it; `labels` only with suffixes.

        ValueError if there are not as many of each, or if a picture cannot be used.
        """
        answers = [None] * len(prefixes) if suffixes is None else suffixes
        if not len(images) == len(prefixes) == len(answers):
            counts = f"{len(images)} images, {len(prefixes)} prefixes and {len(answers)} suffixes"
            raise ValueError(f"got {counts}; expected as many of each")
        rows = zip(images, prefixes, answers, strict=True)
        return collate([{**self.encode(p, s), "pixel_values": self.pixels(image)} for image, p, s in rows], self.pad_id)

    def encode(self, prefix: str, suffix: str | None = None) -> dict[str, Tensor]:
        """`input_ids`, `token_type_ids` and, with a suffix, `labels` (-100 before the suffix) of one text, i64[S].

        A text beyond `max_text_tokens` loses the end of its prefix and then, if the suffix alone is too long, the end
        of the suffix before <eos>.
        """
        question = self._ids(single_line(prefix))
        answer = [] if suffix is None else [*self._ids(suffix), self.eos_id]
        room = self.max_text_tokens - 1  # for the newline
        if len(question) + len(answer) > room:
            warnings.warn(f"texts of more than max_text_tokens = {self.max_text_tokens} tokens are cut", stacklevel=2)
            answer = [*answer[: room - 1], self.eos_id] if len(answer) > room else answer
            question = question[: room - len(answer)]
        before = [self.image_token_id] * self.num_image_tokens + [self.bos_id, *question, self.newline_id]
        encoded = {"input_ids": before + answer, "token_type_ids": [0] * len(before) + [1] * len(answer)}
        if suffix is not None:
            encoded["labels"] = [IGNORE_INDEX] * len(before) + answer
        return {name: torch.tensor(row) for name, row in encoded.items()}

    def pixels(self, image: ImageSource) -> Tensor:
        """One picture in the reference's order of roundings, f32[3, H, W]; ValueError if it cannot be used."""
        form = self.pixel_form
        picture = open_image(image).resize((self.image_size, self.image_size), form.resample)  # u8[H, W, 3]
        scaled = (np.asarray(picture, np.float64) * form.factor).astype(np.float32)
        values = (scaled - np.array(form.mean, np.float32)) / np.array(form.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of new tokens up to <eos>, without special tokens and outer spaces; <loc0000> stays."""
        tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        end = tokens.index(self.eos_id) if self.eos_id in tokens else len(tokens)
        return self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()

    def _ids(self, text: str) -> list[int]:
        """Tokens of a person's text, special ones spelled out."""
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"the text {text!r:.100} holds half a character; mend it, or leave it out")
        self.tokenizer.encode_special_tokens = True  # at each call, for pickling (to a worker) forgets it
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _read_pixel_form(folder: Path, image_size: int, num_image_tokens: int) -> PixelForm:
    """What the files say about pixels, SigLIP's values where they say nothing, checked against config.json."""
    wanted = {"size": {"height": image_size, "width": image_size}, "image_seq_length": num_image_tokens}
    wanted |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    forms = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = _read_json(folder / name) if (folder / name).exists() else {}
        given = content.get("image_processor") if name == "processor_config.json" else content
        if not given:
            continue  # 4.x, too, writes a processor_config.json, but without pixels
        for key, value in wanted.items():
            if given.get(key, value) != value:
                fault = f"{key} is {given[key]}, by config.json it should be {value}"
                raise ValueError(f"{folder / name}: {fault}; copy both files from one PaliGemma checkpoint")
        mean, std = (tuple(given.get(key, (0.5, 0.5, 0.5))) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or 0 in std:
            raise ValueError(f"{folder / name}: expected 3 channels and no std of 0, got mean {mean}, std {std}")
        resample, factor = given.get("resample", Image.Resampling.BICUBIC), given.get("rescale_factor", 1 / 255)
        forms[name] = PixelForm(resample, factor, mean, std)
    if len(set(forms.values())) != 1:
        files = "preprocessor_config.json or processor_config.json with an image_processor, or both alike"
        raise ValueError(f"{folder}: expected {files}, found {forms}; copy one from the base checkpoint")
    return next(iter(forms.values()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; give the directory of a PaliGemma checkpoint") from error
