"""What a run learns from and is evaluated on, opened as its configuration says: records whose texts were tokenised, so
that lengths are known and what does not fit is named before anything is trained.
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Sequence
from itertools import accumulate, islice, starmap, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from data import Processor
from data.image_form import ImageForm
from data.invalid import InvalidRecord, SkippedRecords
from data.lengths import Longest, TextLengths, measure
from data.records import image_names, image_places, load_records
from data.splits import hold_out
from data.text_rows import MARK
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
    sizes: tuple[int, ...]
    """The number of records of each source, in the order of the records."""

    @property
    def longest(self) -> Longest:
        """What the plan takes from the data."""
        return self.lengths.longest

    @property
    def sizes_of_valid(self) -> tuple[int, ...]:
        """The number of valid records of each source."""
        if not self.skipped.reasons:
            return self.sizes
        ids, ends = self.records["id"][:], accumulate(self.sizes)
        parts = [ids[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]
        return tuple(sum(id not in self.skipped.reasons for id in part) for part in parts)

    @property
    def valid(self) -> Dataset:
        """The records that are not skipped."""
        return valid(self.records, self.skipped)


def require_paths(config: RunConfig, *splits: str) -> None:
    """The files and folders of data.train or data.validation (`splits`) are there.

    Raises:
        ValueError: names all that are missing, by their keys.
    """
    missing = [
        f"{place}.{key}: {path} does not exist{did_you_mean(path)}"
        for split in splits
        for place, source in config.data.places(split).items()
        for key, path in source.paths.items()
        if not Path(path).exists() and not (key == "parquet" and glob.has_magic(path))
    ]
    if missing:
        raise ValueError("\n".join(missing))


def open_records(config: RunConfig, split: str, skipped: SkippedRecords | None = None) -> Dataset:
    """The records of data.train or data.validation (`split`), those of one source after those of another, as
    `open_sources` opens them.
    """
    return joined(open_sources(config, split, skipped))


def open_sources(config: RunConfig, split: str, skipped: SkippedRecords | None = None) -> list[Dataset]:
    """The records of each source of data.train or data.validation (`split`), as `load_records` opens them, with
    locations as image.aspect says, without those that are held out for the other split, and of several sources with
    ids that begin with the source's name. Those that cannot be used go to `skipped`, by default where the configuration
    says.
    """
    sources, skipped = config.data.sources(split), skipped or skipped_records(config, split)
    several = len(sources) > 1
    opened: dict[str, Dataset] = {}
    found = SkippedRecords(share=math.inf) if several else skipped  # of several sources the share is that of all
    try:
        for source in sources:
            opened[source.called] = load_records(
                **source.model_dump(exclude={"task", "name", "weight"}),
                prompt=config.data.prompt,
                seed=config.train.seed,
                skipped=found,
                aspect=config.image.aspect or "squash",
                prefix_of_ids=f"{source.called}/" if several else "",
            )
    finally:  # of a source without any that can be used, too
        if several:
            skipped.add(starmap(InvalidRecord, found.reasons.items()), found.looked_at)
    if config.data.validation == "auto":
        return [getattr(parts, split) for parts in hold_out(opened, config.train.seed).values()]
    return list(opened.values())


def joined(sources: Sequence[Dataset]) -> Dataset:
    """The records of all sources, as one data set."""
    if len(sources) == 1:
        return sources[0]
    from datasets import concatenate_datasets  # only now: it takes seconds

    return concatenate_datasets(list(sources))


def in_turns(sizes: Sequence[int], count: int) -> list[int]:
    """The first `count` positions of joined records, the sources, which have these sizes, taking turns."""
    of_sources = (range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True))
    positions = (position for turn in zip_longest(*of_sources) for position in turn if position is not None)
    return list(islice(positions, count))


def drawn(records: Dataset, sizes: Sequence[int], count: int, seed: int) -> Dataset:
    """`count` of joined records at random, of each source as many as of another, as far as it has them."""
    ends = accumulate(sizes)
    parts = [records.select(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return joined([part.shuffle(seed=seed) for part in parts]).select(in_turns(sizes, count))


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
    sources = open_sources(config, split, skipped)
    records = joined(sources)
    if processor.image_form.aspect != (config.image.aspect or "squash") and has_locations(records):
        raise ValueError(
            f"data.{split} has locations such as <loc0000>, and {config.model.path} pads its images, which moves them: "
            "say so in the configuration too, with image.aspect: pad"
        )
    # Of a validation record the majority answer is scored; which one is learned from is a matter of training.
    learned = config.learned_answers if split == "train" else "majority"
    lengths = measure(records, processor, learned)
    if learned == "prompt":
        lengths = lengths.sampled(config.reward.samples, max_new_tokens(config, lengths))
    skipped.add(lengths.invalid.values(), len(records))
    for note in (*text_rows_note(records), *lengths.notes()):
        show(f"data.{split}: {note}")
    return Examples(records, lengths, skipped, tuple(map(len, sources)))


def text_rows_note(records: Dataset) -> list[str]:
    """How many records are text alone, as lines to show; none where all have images."""
    ids = records.select_columns("image_id").with_format("arrow")[:].column("image_id")
    count = pc.sum(pc.starts_with(ids, MARK)).as_py() or 0
    return [f"{count:,} of {len(records):,} records are text without an image (text_rows)"] if count else []


def has_locations(records: Dataset) -> bool:
    """Whether an answer, or a prefix, has locations of a box."""
    texts = records.select_columns(["prefix", "answer"]).with_format("arrow")[:]
    return any(pc.any(pc.match_substring(texts.column(name), "<loc")).as_py() for name in texts.column_names)


def shared_images_note(train: Dataset, validation: Dataset) -> str | None:
    """What a person should know where images are in both, or None. Those that are files are told by
    their path, others by the digest of their bytes.
    """
    seen, asked = (set(image_names(image_places(records))) - {None} for records in (train, validation))
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
