"""Image -> tensor, prefix and suffix -> ids, token types and labels, as PaliGemma was trained (arXiv 2407.07726).

    <image> x N  <bos>  prefix  "\\n"     token type 0, sees all of itself
    suffix  <eos>                        token type 1, causal; the labels
    suffix  <eos>                        token type 2, if there is a second one (`encode_suffixes`); and so on

A row of text alone is the same without <image>.

Token for token transformers' PaliGemmaProcessor, bit for bit its Pillow image processor, but where that would corrupt
an example: <image> and <bos> at the start of a prefix (transformers' own form) are taken off, for they are put there in
any case, and any other special token in a text is an error; newlines within a prefix become spaces, for one newline
says where the answer begins; a text that is too long is an error, or loses the end of its answer where that was asked.
<loc0000> and <seg000> are words of the vocabulary and stay what they are. Not here: opening images (data/images.py),
how they become numbers (data/image_form.py), how long the texts of a data set are (data/lengths.py).
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.collate import IGNORE_INDEX, collate
from data.image_form import ImageForm, PixelForm, image_form_of, pixels_of, read_json, read_pixel_form
from data.images import ImageSource, open_image

ROWS, POSITIONS = 257216, 8192  # of the published network, whose config.json may leave them out
LEADING = re.compile(r"\s*((<image>|<bos>)\s*)+")  # what a prefix in transformers' form begins with


def single_line(text: str) -> str:
    """The text with a space for each run of newlines, none at its ends."""
    return re.sub(r"[\r\n]+", " ", text.strip("\r\n"))


@dataclass(frozen=True, eq=False)
class Processor:
    """Images and texts -> what the network takes; made by `from_pretrained`."""

    tokenizer: Tokenizer
    pixel_form: PixelForm
    image_form: ImageForm
    positions: int  # tokens of the longest row that the network was made for
    special_ids: frozenset[int]  # of all special tokens, which no text may hold
    digest: str  # sha256 of tokenizer.json
    max_text_tokens: int | None  # the most that prefix, newline, suffixes and each <eos> may take; None: no such limit
    truncate_answers: bool  # whether answers that exceed it lose their ends; otherwise that is an error
    pad_id: int  # this one and the next four: the tokens that structure a row
    eos_id: int
    bos_id: int
    image_token_id: int
    newline_id: int

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        max_text_tokens: int | None = None,
        truncate_answers: bool = False,
        image_form: ImageForm | None = None,
    ) -> "Processor":
        """Reads config.json, tokenizer.json and preprocessor_config.json (4.x) or processor_config.json (5.x).

        image_form: of a network that takes other images than the checkpoint says, with another connector or tiles.

        Raises:
            ValueError: one is missing or broken, two contradict each other, or the tokenizer has ids for which the
                embedding has no rows.
        """
        if max_text_tokens is not None and max_text_tokens < 3:
            raise ValueError(f"max_text_tokens is {max_text_tokens}; expected at least 3: newline, a token, <eos>")
        folder = Path(directory)
        config = read_json(folder / "config.json")
        special_ids = {f"<{name}>": config.get(f"{name}_token_id", i) for i, name in enumerate(("pad", "eos", "bos"))}
        special_ids["<image>"] = config.get("image_token_id", config.get("image_token_index"))
        stored_form = image_form_of(config, folder)
        text = config.get("text_config", {})
        tokenizer, digest = _read_tokenizer(folder / "tokenizer.json", text.get("vocab_size", ROWS))
        pixel_form = read_pixel_form(folder, stored_form)
        special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        for token, expected in special_ids.items():
            if special.get(token) != expected:
                other = f"{special.get(token)} as special token in tokenizer.json"
                difference = f"{token} is {expected} in config.json, {other}"
                raise ValueError(f"{folder}: {difference}; copy both files from one PaliGemma checkpoint")
        # A tokenizer.json carries the truncation and padding with which it was last used.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        (newline_id,) = tokenizer.encode("\n", add_special_tokens=False).ids
        ids = (*special_ids.values(), newline_id)
        return cls(
            tokenizer,
            pixel_form,
            image_form or stored_form,
            text.get("max_position_embeddings", POSITIONS),
            frozenset(special.values()),
            digest,
            max_text_tokens,
            truncate_answers,
            *ids,
        )

    def __call__(
        self, images: Sequence[ImageSource], prefixes: Sequence[str], suffixes: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """A right-padded batch as data/collate.py describes it; `labels` only with suffixes.

        ValueError if there are not as many of each, or if an image cannot be used.
        """
        answers = [None] * len(prefixes) if suffixes is None else suffixes
        if not len(images) == len(prefixes) == len(answers):
            counts = f"{len(images)} images, {len(prefixes)} prefixes and {len(answers)} suffixes"
            raise ValueError(f"got {counts}; expected as many of each")
        rows = zip(images, prefixes, answers, strict=True)
        return collate([{**self.encode(p, s), "pixel_values": self.pixels(image)} for image, p, s in rows], self.pad_id)

    def encode(self, prefix: str, suffix: str | None = None, image: bool = True) -> dict[str, Tensor]:
        """`input_ids`, `token_type_ids` and, with a suffix, `labels` (-100 before the suffix) of one text, i64[S].

        image: whether the row has an image, and so image tokens.

        Raises:
            ValueError: the text is too long (see `fit`), or holds a special token or half a character.
        """
        return self._row(prefix, [] if suffix is None else [suffix], image)

    def encode_suffixes(
        self, prefix: str, suffixes: Sequence[str], weights: Sequence[float] | None = None, image: bool = True
    ) -> dict[str, Tensor]:
        """As `encode`, of one text with several suffixes, none of which sees another (model/layers.py, the mask).

        Args:
            weights: of each suffix, how often the loss of its tokens counts; without them there are no `loss_weights`,
                f32[S], and all tokens count once.
            image: as in `encode`.

        Raises:
            ValueError: there is no suffix; there are not as many weights as suffixes, or one is not above 0; and as
                `encode`, where all suffixes together must fit.
        """
        if isinstance(suffixes, str) or not suffixes:
            raise ValueError(f"suffixes are {suffixes!r}; expected a list of at least one")
        row = self._row(prefix, suffixes, image)
        if weights is None:
            return row
        if len(weights) != len(suffixes) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"weights are {list(weights)}; expected {len(suffixes)}, one for each suffix, each a number above 0: "
                "leave out a suffix that should not count"
            )
        return {**row, "loss_weights": torch.tensor([0.0, *weights])[row["token_type_ids"]]}

    def _row(self, prefix: str, suffixes: Sequence[str], image: bool) -> dict[str, Tensor]:
        prompt, answers = self.prompt_ids(prefix), list(map(self.answer_ids, suffixes))
        lengths = self.fit(len(prompt), *map(len, answers))
        before = [self.image_token_id] * (self.num_image_tokens * image) + [self.bos_id, *prompt]
        ids, types = list(before), [0] * len(before)
        for number, (answer, length) in enumerate(zip(answers, lengths, strict=True), start=1):
            ids += answer if length == len(answer) else [*answer[: length - 1], self.eos_id]
            types += [number] * length
        encoded = {"input_ids": ids, "token_type_ids": types}
        if suffixes:
            encoded["labels"] = [IGNORE_INDEX] * len(before) + ids[len(before) :]
        return {name: torch.tensor(row) for name, row in encoded.items()}

    def prompt_ids(self, prefix: str) -> list[int]:
        """Tokens of a prefix and the newline that ends it."""
        return [*self._ids(self.prompt(prefix), "prefix"), self.newline_id]

    def answer_ids(self, suffix: str) -> list[int]:
        """Tokens of a suffix and <eos>."""
        return [*self._ids(suffix, "suffix"), self.eos_id]

    @staticmethod
    def is_marked(prefix: str) -> bool:
        """Whether a prefix begins with <image> or <bos>, which `prompt` takes off."""
        return LEADING.match(prefix) is not None

    def prompt(self, prefix: str) -> str:
        """The text of a prefix as the network sees it: one line, without <image> and <bos> at its start, nor the spaces
        around those.
        """
        marked = LEADING.match(prefix)
        return single_line(prefix[marked.end() :] if marked else prefix)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of a row with an image."""
        return self.image_form.num_image_tokens

    @property
    def text_limit(self) -> int:
        """The most tokens that prefix, newline, suffixes and each <eos> may take together, with an image or without."""
        positions = self.positions - self.num_image_tokens - 1  # without image tokens and <bos>
        return positions if self.max_text_tokens is None else min(self.max_text_tokens, positions)

    def fit(self, prompt: int, *answers: int) -> list[int]:
        """How many tokens each of a row's answers keeps, of so many, behind a prompt of `prompt` tokens (newline and
        each <eos> counted).

        All of them, unless the text exceeds `text_limit` and may be cut: then the longest answers lose their ends, down
        to one length, the largest that fits, which is <eos> and at least one token before it.

        Raises:
            ValueError: the text does not fit; names the length that it needs and the limit.
        """
        limit, answer = self.text_limit, sum(answers)
        if prompt + answer <= limit:
            return list(answers)
        if self.truncate_answers:
            for longest in range(limit - prompt, 1, -1):
                if prompt + sum(kept := [min(length, longest) for length in answers]) <= limit:
                    return kept
        if limit != self.max_text_tokens:
            said = f"the {self.positions:,} positions of the model leave {limit:,} for it: shorten it"
        elif self.truncate_answers:
            cut = "a prompt is never cut, nor an answer to less than a token and <eos>"
            said = f"max_text_tokens is {limit}; {cut}: raise it, or shorten the text"
        else:
            said = f"max_text_tokens is {limit}: raise it, or leave it at auto"
        whose = "its answer" if len(answers) == 1 else f"its {len(answers)} answers"
        of = f" ({prompt:,} of its prompt, {answer:,} of {whose})" if answer else ""
        raise ValueError(f"its text needs {prompt + answer:,} tokens{of}; {said}")

    def pixels(self, image: ImageSource) -> Tensor:
        """One image, f32[3, H, W]; with tiles f32[5, 3, H, W]. ValueError if it cannot be used."""
        return pixels_of(open_image(image), self.pixel_form, self.image_form)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of new tokens up to <eos>, without special tokens and outer spaces; <loc0000> stays."""
        tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        end = tokens.index(self.eos_id) if self.eos_id in tokens else len(tokens)
        return self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()

    def token_text(self, token: int) -> str:
        """A token as the vocabulary has it, with a space where that writes one; `<7>` where it has none with id 7."""
        text: str | None = self.tokenizer.id_to_token(token)
        return f"<{token}>" if text is None else text.replace("▁", " ")

    def _ids(self, text: str, name: str) -> list[int]:
        """Tokens of a person's text, the `name` of an example. ValueError where it holds what no text may hold."""
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"the {name} {text!r:.100} holds half a character; correct it, or remove it")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self.special_ids.isdisjoint(ids):
            token = self.tokenizer.id_to_token(next(i for i in ids if i in self.special_ids))
            raise ValueError(
                f"the {name} {text!r:.100} holds the special token {token}: remove it, special tokens are added where "
                "they belong"
            )
        return ids


def _read_tokenizer(file: Path, rows: int) -> tuple[Tokenizer, str]:
    """The tokenizer and the sha256 of its file. ValueError where an id has no row in an embedding of so many."""
    try:
        content = file.read_bytes()
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file}: {error}; copy it from the base checkpoint") from error
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ValueError(
            f"{file} has token ids up to {highest:,}, and the embedding has {rows:,} rows (text_config.vocab_size in "
            "config.json): copy both files from one checkpoint, or, if tokens were added, save the network with its "
            "embedding resized to them"
        )
    return tokenizer, hashlib.sha256(content).hexdigest()
