"""Where examples are: the keys of `data.train` and `data.validation`, and which of them exclude each other.

Not here: reading them (data/sources, data/records.py).
"""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from finetune.config.section import ALTERNATIVE, Count, PathText, Section, Text, error_at

OFFICIAL = ("questions", "annotations")  # keys of the VQA files
TABLES = (  # keys of all other sources that are paths, data.sources.TABLES
    "jsonl",
    "csv",
    "tsv",
    "messages",
    "folder",
    "coco",
    "parquet",
    "disk",
)
HUB = "hub"  # key of the one that is none
SPLITTING = ("disk", HUB)  # those that may have several splits
SOURCE_PATHS = (*OFFICIAL, "images", *TABLES)  # keys of `Source`
ROLES = ("image", "prefix", "question", "suffix", "rejected", "id")  # of columns, as in data/sources/rows.py


class Source(Section):
    """Examples: from the official VQA files (questions, annotations, images), or from one other source (and images)."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")] | None = None
    """In a list of sources what this one is called in figures and ids, such as captions. null: as its file or data set.
    """
    weight: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """In a list of data.train how often this source is drawn, relative to the others: 3 beside 1 is three of four
    examples. null, for all of them: as often as they have examples.
    """
    questions: PathText | None = None
    """Official questions file (JSON)."""
    annotations: PathText | None = None
    """Official annotations file (JSON) with the answers of those questions."""
    images: PathText | None = None
    """Directory of the images."""
    jsonl: PathText | None = None
    """File of lines {"image": ..., "prefix": ..., "suffix": ...}, or with a question instead of a prefix."""
    csv: PathText | None = None
    """File in UTF-8 whose first line names the columns, such as image,prefix,suffix. A cell is one text."""
    tsv: PathText | None = None
    """The same, separated by tabs."""
    messages: PathText | None = None
    """File of lines with chats as TRL, LLaMA-Factory and ms-swift have them: messages, prompt and completion, or
    conversations, with images. One image, one question and one answer a line; the user's text is the whole prompt."""
    folder: PathText | None = None
    """Folder of images as datasets' imagefolder has it: with metadata.csv or metadata.jsonl, whose column file_name
    names the image; or with a folder for each class, whose name is the answer to the question: what is this?"""
    coco: PathText | None = None
    """COCO's JSON of images with boxes (the prompt is detect and all categories) or captions (caption en)."""
    parquet: PathText | None = None
    """Parquet file, folder of files *.parquet, or a pattern such as data/train-*.parquet: columns image (bytes or a
    path), prefix or question, and suffix.
    """
    disk: PathText | None = None
    """Folder that save_to_disk of datasets wrote, with such columns."""
    hub: Annotated[Text, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")] | None = None
    """Id of a data set on the Hugging Face Hub, such as owner/name, with such columns."""
    subset: Text | None = None
    """Name of a configuration of a data set on the Hub, where it has several."""
    revision: Text | None = None
    """Branch, tag or commit of a data set on the Hub. A run stays with the commit that it began with."""
    columns: dict[Literal["image", "prefix", "question", "suffix", "rejected", "id"], Text] | None = None
    """Other names of a source's columns, such as {question: query, suffix: label}."""
    text_rows: bool = False
    """true: a row may be text alone, its image missing, null or empty. Not for the official files and coco, whose
    questions are about images.
    """
    task: Literal["auto", "vqa", "answer", "classify", "document", "chart", "detect", "caption"] = "auto"
    """What answers to these examples are judged by. vqa: the official accuracy; answer: right or wrong, by VQA's text
    rules; classify: that, and F1 by label; document: ANLS; chart: relaxed accuracy; detect: COCO's mAP of boxes (needs
    pycocotools); caption: CIDEr-D (needs pycocoevalcap). auto: vqa for the official files, detect or caption for coco,
    answer for all others.
    """
    split: Text | None = None
    """Such as train, of a data set with several (disk, hub); or train2014, where the official files do not say which
    images they are about.
    """
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Take this share of the examples, drawn with train.seed."""
    count: Count | None = None
    """Take this many examples, drawn with train.seed."""
    sample_by: Literal["image", "question"] = "image"
    """Draw whole images with all their questions, or single questions (which touches many more images)."""

    @property
    def paths(self) -> dict[str, str]:
        """The files and folders that are given, by their keys."""
        return {key: path for key in SOURCE_PATHS if (path := getattr(self, key))}

    @property
    def title(self) -> str:
        """The name of its file, without the path; or its id on the Hub."""
        if self.hub:
            return self.hub
        path = next(path for key, path in self.paths.items() if key != "images")
        return os.path.basename(os.path.abspath(path)) or path  # of "." the name of the folder that it is

    @property
    def called(self) -> str:
        """Its name in a list of sources."""
        return self.name or re.sub(r"[^\w-]+", "-", Path(self.title).stem).strip("-") or "source"

    @field_validator("split")  # the last of those that say where examples are
    @classmethod
    def _one_kind(cls, split: str | None, info: ValidationInfo) -> str | None:
        if not info.data.keys() >= {*SOURCE_PATHS, HUB, "subset", "revision", "columns", "text_rows"}:
            return split
        given = [key for key in (*SOURCE_PATHS, HUB) if info.data[key]]
        tables, official = [key for key in given if key in (*TABLES, HUB)], [key for key in given if key in OFFICIAL]
        if official and not tables and not ("questions" in official and "images" in given):
            key = "images" if "questions" in official else "questions"
            raise error_at(key, "the official files are questions, images and perhaps annotations", *official)
        if len(tables) + bool(official) != 1:
            expected = (
                f"expected either questions, images and perhaps annotations, or one of {', '.join((*TABLES, HUB))}"
            )
            raise error_at(given[-1] if given else "questions", expected, *given)
        if official and info.data["columns"]:
            raise error_at("columns", "the official files have names of their own: leave it out", *official)
        if info.data["text_rows"] and (official or "coco" in tables):
            raise error_at("text_rows", f"every row of {(official or tables)[0]} has an image: leave it out", *given)
        if tables and split and tables[0] not in SPLITTING:
            splitting = ", ".join(("the official files", *SPLITTING))
            raise error_at("split", f"it is for {splitting}, not for {tables[0]}: leave it out", *tables)
        for key in ("subset", "revision"):
            if info.data[key] and HUB not in tables:
                raise error_at(key, f"it is for a data set on the Hub (hub), not for {given[0]}: leave it out", *given)
        return split

    @field_validator("count")
    @classmethod
    def _one_limit(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and info.data.get("fraction") is not None:
            excluded = f"count ({count}) excludes fraction ({info.data['fraction']}): give one of them"
            raise error_at("count", excluded, "fraction")
        return count


def _alternative(value: object) -> str:
    kind = "auto" if isinstance(value, str) else "several" if isinstance(value, list | tuple) else "one"
    return ALTERNATIVE + kind


One = Annotated[Source, Tag(ALTERNATIVE + "one")]
Several = Annotated[tuple[Source, ...], Field(min_length=1), Tag(ALTERNATIVE + "several")]
Auto = Annotated[Literal["auto"], Tag(ALTERNATIVE + "auto")]
Sources = Annotated[One | Several, Discriminator(_alternative)]
SourcesOrAuto = Annotated[One | Several | Auto, Discriminator(_alternative)]
