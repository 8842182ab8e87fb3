"""What a run learns from and is evaluated on, opened as its configuration says: records whose texts were tokenised, so
that lengths are known and what does not fit is named before anything is trained.
"""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from data import Processor
from data.image_form import ImageForm
from data.invalid import SkippedRecords
from data.lengths import Longest, TextLengths, measure
from data.records import image_names, image_places, load_records
from finetune.config.schema import RunConfig
from finetune.system.console import show
from finetune.system.paths import did_you_mean
from model import ConnectorConfig, PaliGemmaConfig
from model.convert import changed

if TYPE_CHECKING:
    from datasets import Dataset


@dataclasses.dataclass(frozen=True)
class Examples:
    """Records as data/records.py describes them, those that are skipped among them, and their lengths."""

    records: Dataset
    lengths: TextLengths
    skipped: SkippedRecords

    @property
    def longest(self) -> Longest:
        """What the plan takes from the data."""
        return self.lengths.longest

    @property
    def valid(self) -> Dataset:
        """The records that are not skipped."""
        return valid(self.records, self.skipped)


def require_paths(config: RunConfig, *splits: str) -> None:
    """The files and folders of data.train or data.validation (`splits`) are there.

    Raises:
        ValueError: names all that are missing, by their keys.
    """
    sources = {split: getattr(config.data, split) for split in splits}
    missing = [
        f"data.{split}.{key}: {path} does not exist{did_you_mean(path)}"
        for split, source in sources.items()
        for key, path in (source.paths if source else {}).items()
        if not Path(path).exists() and not (key == "parquet" and glob.has_magic(path))
    ]
    if missing:
        raise ValueError("\n".join(missing))


def open_records(config: RunConfig, split: str, skipped: SkippedRecords | None = None) -> Dataset:
    """The records of data.train or data.validation (`split`), as `load_records` opens them, with locations as
    image.aspect says; those that cannot be used go to `skipped`, by default where the configuration says.
    """
    source = getattr(config.data, split).model_dump(exclude={"task"})
    prompt, seed = config.data.prompt, config.train.seed
    skipped, aspect = skipped or skipped_records(config, split), config.image.aspect or "squash"
    return load_records(**source, prompt=prompt, seed=seed, skipped=skipped, aspect=aspect)


def skipped_records(config: RunConfig, split: str, listed: bool = True) -> SkippedRecords:
    """How many records of a split may be skipped by the configuration, and, if they are `listed`, in which file."""
    allowed = config.data.skip_at_most
    if config.data.on_error == "fail":
        return SkippedRecords(skippable=allowed)
    return SkippedRecords(Path(config.output, f"skipped_{split}.jsonl") if listed else None, allowed, allowed)


def network_config(directory: Path, config: RunConfig) -> PaliGemmaConfig:
    """The dimensions of the run's network: of its checkpoint, changed as model.connector and image say.

    Raises:
        ValueError: they do not fit the checkpoint; names the key.
    """
    kind, options, image = config.model.connector, config.connector, config.image
    published, connector = PaliGemmaConfig.from_directory(directory), None
    try:
        if kind is not None:
            seed = config.train.seed if options.seed is None else options.seed
            connector = ConnectorConfig(kind, options.latents, options.depth, options.factor, options.start, seed)
        return changed(published, connector, image.size, image.tiles, image.aspect)
    except ValueError as error:
        raise ValueError(f"model.connector, connector and image do not fit {config.model.path}: {error}") from error


def processor_of(
    directory: Path, config: PaliGemmaConfig, max_text_tokens: int | None = None, truncate_answers: bool = False
) -> Processor:
    """A checkpoint's processor, for a network of these dimensions."""
    form = ImageForm(config.vision.image_size, config.tiles, config.aspect, config.num_image_tokens)
    return Processor.from_pretrained(directory, max_text_tokens, truncate_answers, form)


def open_processor(directory: Path, config: RunConfig) -> Processor:
    """The processor of the run's network, with the limit that the configuration sets."""
    data = config.data
    limit = None if data.max_text_tokens == "auto" else data.max_text_tokens
    return processor_of(directory, network_config(directory, config), limit, data.truncate_answers)


def open_examples(
    config: RunConfig, split: str, processor: Processor, skipped: SkippedRecords | None = None
) -> Examples:
    """Examples of data.train or data.validation (`split`), with a line about what was changed in their texts.

    Args:
        skipped: where invalid records go, by default where the configuration says.

    Raises:
        ValueError: the records cannot be read; or more of them are invalid than may be skipped; or they have locations,
            and the checkpoint pads its images where the configuration does not say so.
    """
    skipped = skipped or skipped_records(config, split)
    records = open_records(config, split, skipped)
    if processor.image_form.aspect != (config.image.aspect or "squash") and has_locations(records):
        raise ValueError(
            f"data.{split} has locations such as <loc0000>, and {config.model.path} pads its images, which moves them: "
            "say so in the configuration too, with image.aspect: pad"
        )
    # Of a validation record the majority answer is scored; which one is learned from is a matter of training.
    lengths = measure(records, processor, config.data.answers if split == "train" else "majority")
    skipped.add(lengths.invalid.values(), len(records))
    for note in lengths.notes():
        show(f"data.{split}: {note}")
    return Examples(records, lengths, skipped)


def has_locations(records: Dataset) -> bool:
    """Whether an answer, or a prefix, has locations of a box."""
    texts = records.select_columns(["prefix", "answer"]).with_format("arrow")[:]
    return any(pc.any(pc.match_substring(texts.column(name), "<loc")).as_py() for name in texts.column_names)


def shared_images_note(train: Dataset, validation: Dataset) -> str | None:
    """What a person should know where images are in both, or None. Those that are files are told by
    their path, others by the digest of their bytes.
    """
    seen, asked = (set(image_names(image_places(records))) for records in (train, validation))
    if not (shared := len(seen & asked)):
        return None
    return (
        f"{shared:,} of the {len(asked):,} images of data.validation are in data.train too: what is answered about "
        "those may be memorised, and says nothing about new images"
    )


def askable(records: Dataset, processor: Processor, skipped: SkippedRecords) -> Dataset:
    """The records whose prompts can be asked, with a line about what was changed in those.

    Raises:
        ValueError: more cannot be asked than may be skipped.
    """
    lengths = measure(records, processor, answers=None)
    skipped.add(lengths.invalid.values(), len(records))
    for note in lengths.notes():
        show(note)
    return valid(records, skipped)


def valid(records: Dataset, skipped: SkippedRecords) -> Dataset:
    """The records that are not among the skipped."""
    if not skipped.reasons:
        return records
    return records.select([i for i, name in enumerate(records["id"][:]) if name not in skipped.reasons])


def max_new_tokens(config: RunConfig, lengths: TextLengths) -> int:
    """The most tokens of a generated answer: as configured, or as many as the longest trained answer has."""
    configured = config.evaluation.max_new_tokens
    return lengths.longest_answer if configured == "auto" else configured
