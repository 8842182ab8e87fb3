"""What of a run's data a person should look at before training: it does not end a run, and may well be meant.

Counted over all records that can be used. Not here: whether a row is put together rightly (inspection.py), and records
that cannot be used (data/invalid.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data import Processor
from data.dataset import Answers
from data.lengths import TextLengths
from data.records import image_names, image_places
from finetune.system.terminal import shortened

if TYPE_CHECKING:
    from datasets import Dataset

MOST_ANSWERS = 5_000  # distinct answers whose tokens are looked at, the most frequent ones
MOST_BYTES = 1 << 30  # of images that are compared by content
ENOUGH = 10  # records from which on the share of an answer says something
NAMED = 3  # examples that a check spells out
ANSWER_SHOWN = 60  # characters of an answer
LETTERS, DIGITS = 4, 8  # tokens of one letter, or of one digit, in a row from which on a text is learned piece by piece
WORD = re.compile(r"<(?:loc|seg)[^<>\s]*>")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class Check:
    """What one look found.

    Attributes:
        outcome: "warning" where a person should look, "fail" where training would be ruined.
        found: in a sentence. advice: what to do about it, in another; "" where it passes.
    """

    name: str
    outcome: Literal["pass", "warning", "fail"]
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.name}: {self.found}" + (f"; {self.advice}" if self.advice else "")


def warn(name: str, found: str, advice: str, is_fine: bool) -> Check:
    """A check that passes, or else is a warning."""
    return Check(name, "pass", found) if is_fine else Check(name, "warning", found, advice)


def length_checks(lengths: TextLengths, skipped: int, processor: Processor) -> list[Check]:
    """Whether texts are cut, or left out. skipped: how many records cannot be used."""
    limit = "max_text_tokens" if processor.max_text_tokens == processor.text_limit else "positions of the network"
    longest = (
        f"the longest text has {lengths.longest_text:,} tokens of at most {processor.text_limit:,} ({limit}), the "
        f"longest answer {lengths.longest_answer:,}"
    )
    cut = "no prompt is ever cut" + (
        f", {lengths.cut:,} answers lose up to {lengths.cut_tokens:,} tokens" if lengths.cut else ", and no answer is"
    )
    return [
        Check("longest text", "pass", longest),
        warn("nothing is cut", cut, "raise data.max_text_tokens, or shorten these answers", not lengths.cut),
        warn(
            "every record is used",
            f"{skipped:,} records cannot be used and are skipped",
            "`train.py CONFIG --check` lists each with its reason",
            not skipped,
        ),
    ]


def prompt_check(records: Dataset) -> Check:
    """Whether every record asks something."""
    empty = sum(not prefix.strip() for prefix in records["prefix"][:])
    return warn(
        "every prompt says something",
        f"{empty:,} of {len(records):,} prompts are empty",
        "an empty prompt is legal, but the network cannot tell what is asked: write one, such as caption en",
        not empty,
    )


def answer_checks(records: Dataset, answers: Answers, processor: Processor) -> list[Check]:
    """How the tokenizer splits what is learned, and whether one answer outweighs all others."""
    majority = Counter(records["answer"][:])
    learned = majority if answers == "majority" else Counter(itertools.chain.from_iterable(records["answers"][:]))
    looked_at = learned.most_common(MOST_ANSWERS)
    odd = [f"{quoted(text)} ({reason})" for text, _ in looked_at if (reason := oddly_split(text, processor))]
    most, times = majority.most_common(1)[0]
    share = times / len(records)
    return [
        warn(
            "answers are tokens as expected",
            f"{len(odd):,} of {len(looked_at):,} distinct answers are split oddly{named(odd)}",
            "correct what is misspelled; what is right is learned piece by piece, which needs more examples",
            not odd,
        ),
        warn(
            "no answer outweighs the others",
            f"{share:.0%} of the records have the most frequent of {len(majority):,} answers, {quoted(most)}",
            f"a network that always says it scores about {100 * share:.0f}: compare with that, or balance the data",
            share <= 0.5 or len(records) < ENOUGH,
        ),
    ]


def oddly_split(text: str, processor: Processor) -> str | None:
    """What is odd about the tokens of an answer, in words, or None."""
    for word in WORD.findall(text):
        if processor.tokenizer.token_to_id(word) is None:
            return f"{word} is no token: expected <loc0000> to <loc1023>, <seg000> to <seg127>"
    if text != text.strip():
        return "it begins or ends with a space"
    pieces = processor.tokenizer.encode(text, add_special_tokens=False).tokens
    unknown = processor.tokenizer.token_to_id("<unk>") is not None and "<unk>" in pieces
    if unknown or any(map(BYTE.fullmatch, pieces)):
        return "characters that are no tokens" if unknown else "single bytes"
    # Scripts without capitals have words of one character, which is nothing odd.
    kinds = {"single letters": (LETTERS, lambda c: c.lower() != c.upper()), "single digits": (DIGITS, str.isdigit)}
    bare = [piece.strip("▁") for piece in pieces]
    for reason, (most, is_one) in kinds.items():
        if longest_row(len(piece) == 1 and is_one(piece) for piece in bare) >= most:
            return reason
    return None


def longest_row(values: Iterable[bool]) -> int:
    """How many are true one after the other, at most."""
    return max((sum(1 for _ in group) for value, group in itertools.groupby(values) if value), default=0)


def quoted(answer: str) -> str:
    return repr(shortened(answer, ANSWER_SHOWN))


def named(texts: Sequence[str]) -> str:
    """The first of them, for the end of a sentence."""
    more = f", and {len(texts) - NAMED:,} more" if len(texts) > NAMED else ""
    return f": {', '.join(texts[:NAMED])}{more}" if texts else ""


def duplicate_checks(train: Dataset, validation: Dataset | None) -> list[Check]:
    """Whether something is asked twice of one image, within data.train and across to data.validation."""
    asked = questions_of(train)
    counts, with_answers = Counter(asked), Counter(zip(asked, map(tuple, train["answers"][:]), strict=True))
    repeated = [place for place, key in enumerate(asked) if counts[key] > 1]
    same = sum(count - 1 for count in with_answers.values())
    others = sum(count - 1 for count in counts.values()) - same
    ids = train.select(repeated[:NAMED])["id"][:]
    found = [
        warn(
            "no question twice in data.train",
            f"{same:,} records repeat image, prompt and answers of another, {others:,} image and prompt with other "
            f"answers{named(ids) if repeated else ''}",
            "take them out, or give one record all its answers",
            not repeated,
        )
    ]
    if validation is None:
        return found
    shared, how = shared_questions(train, validation)
    advice = "take them out of one of the two: what is answered about them may be memorised"
    name = "no question in both data.train and data.validation"
    said = f"{len(shared):,} of {len(validation):,} validation questions are in data.train too ({how}){named(shared)}"
    return [*found, warn(name, said, advice, not shared)]


def questions_of(records: Dataset) -> list[tuple[str | None, str]]:
    """What each record asks of which image, told by its path, or by the digest of its bytes; None without an image."""
    return list(zip(image_names(image_places(records)), records["prefix"][:], strict=True))


def shared_questions(train: Dataset, validation: Dataset) -> tuple[list[str], str]:
    """The ids of validation records that ask what a training record asks of the same image; and how images were
    compared: by path or digest always, by their content too where those in question are not too many to be read.
    """
    learned, asked = questions_of(train), questions_of(validation)
    shared = set(learned) & set(asked)
    sizes = {image: size_of(image) for image, _ in {*learned, *asked}}
    by_size = ({(sizes[image], prefix) for image, prefix in questions} for questions in (learned, asked))
    in_both = set.intersection(*by_size)
    files = {
        image: size
        for image, prefix in {*learned, *asked}
        if image is not None and (size := sizes[image]) is not None and (size, prefix) in in_both
    }
    if sum(files.values()) > MOST_BYTES:
        return ids_of(validation, asked, lambda question: question in shared), "images compared by their paths"
    digests = {image: hashlib.sha256(Path(image).read_bytes()).hexdigest() for image in files}
    same = {(digests[image], prefix) for image, prefix in learned if image in digests}
    return (
        ids_of(validation, asked, lambda one: one in shared or (digests.get(one[0] or "", ""), one[1]) in same),
        "images compared by their content",
    )


def size_of(image: str | None) -> int | None:
    """Bytes of an image that is a file; None of one that is not there, or is none."""
    try:
        return os.stat(image).st_size if image and os.path.isabs(image) else None
    except OSError:
        return None


def ids_of(
    records: Dataset,
    asked: Sequence[tuple[str | None, str]],
    is_shared: Callable[[tuple[str | None, str]], bool],
) -> list[str]:
    ids: list[str] = records.select([place for place, one in enumerate(asked) if is_shared(one)])["id"][:]
    return ids
