"""How long the texts of a data set are, in tokens, before anything is trained: every text is tokenised once.

Distinct texts are tokenised one time each, and the result is cached with the records under what it depends on:
the tokenizer and the texts themselves. Not here: what fits (`Processor.fit`), and what is done with records that do not
(data/invalid.py).
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data.dataset import Answers, pair_of, require_two
from data.invalid import InvalidRecord
from data.processor import LEADING, Processor
from data.progress import progress_bar
from data.records import File, cache_folder

FORMAT = 1  # goes up when lengths are counted or written differently
REFUSED = -1  # the length of a text that the processor refuses
Lengths = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Longest:
    """What a row of the data may take, in tokens; each may be of another row.

    Attributes:
        text: of the longest row without its image and `<bos>`: prefix, newline, each answer with `<eos>`.
        supervised: the most of all answers of a row. answer: of the longest single one.
    """

    text: int
    supervised: int
    answer: int


@dataclasses.dataclass(frozen=True, eq=False)
class TextLengths:
    """Tokens of the records' texts, as a processor makes them, and what is wrong with them.

    Attributes:
        prompt: i32[N], prefix and newline; 0 of an invalid record.
        answer: i32[N], the longest answer that may be learned from a record, `<eos>` included, after cutting; 0 of an
            invalid record and of one without an answer.
        supervised: i32[N], the most tokens of answers that a row of a record holds: those of `answer`, or where all
            answers are learned in one row, of all of them.
        mean_supervised: tokens of a row's answers, on average over all rows that may be learned.
        invalid: the records of which a text cannot be used, by their positions.
        marked: how many prefixes begin with `<image>` or `<bos>`, which are taken off.
        cut: how many records have answers that are cut. cut_tokens: the most that one answer loses.
    """

    prompt: Lengths
    answer: Lengths
    supervised: Lengths
    mean_supervised: float
    invalid: dict[int, InvalidRecord]
    marked: int
    cut: int
    cut_tokens: int

    @property
    def longest_text(self) -> int:
        """Tokens of the longest prompt with one answer."""
        return int((self.prompt + self.answer).max(initial=0))

    @property
    def longest(self) -> Longest:
        """What a row may take, as `max_text_tokens` counts it."""
        supervised = self.supervised
        text = int((self.prompt + supervised).max(initial=0))
        return Longest(text, int(supervised.max(initial=0)), self.longest_answer)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer, which may be another record's."""
        return int(self.answer.max(initial=0))

    @property
    def mean_text(self) -> float:
        """Tokens of a text, as `Longest` has them, on average over the valid records and their answers."""
        prompts = self.prompt[self.prompt > 0]
        return float(prompts.mean()) + self.mean_supervised if len(prompts) else 0.0

    def sampled(self, samples: int, new_tokens: int) -> "TextLengths":
        """Those of rows with so many answers each that a network draws, of up to `new_tokens`. On average these are
        taken to be as long as the records' own.
        """
        supervised = np.where(self.prompt > 0, np.int32(samples * new_tokens), np.int32(0))
        return dataclasses.replace(self, supervised=supervised, mean_supervised=samples * self.mean_supervised)

    def notes(self) -> list[str]:
        """What a person should know of these texts, as lines to show."""
        notes = []
        if self.marked:
            notes.append(f"{self.marked:,} prefixes begin with <image> or <bos>: taken off, for every row has them")
        if self.cut:
            notes.append(
                f"{self.cut:,} records have an answer that is cut at data.max_text_tokens, by up to "
                f"{self.cut_tokens:,} tokens (data.truncate_answers)"
            )
        return notes


def measure(
    records: Sequence[Mapping[str, Any]],
    processor: Processor,
    answers: Answers | None,
    cache_dir: File | None = None,
) -> TextLengths:
    """The lengths of all texts that may be learned from `records` (rows as data/records.py describes them).

    Args:
        processor: says what fits, and cuts answers if it was told to.
        answers: as in `PaliGemmaDataset`: "rotate" looks at all answers of a record, each in a row of its own, "all" at
            all of them in one row, "pair" at the chosen and the rejected one, "majority" at one; "prompt" as "rotate",
            for the answers of a record say how long those that are drawn may be; None at none.
        cache_dir: where the lengths are cached, as in `load_records`.
    """
    texts = text_table(records, answers)
    prompt, longest, total, count = counted(texts, processor, cache_folder(cache_dir))
    together = answers in ("all", "pair")
    answer, supervised, lost = longest.copy(), (total if together else longest).copy(), [0]
    invalid: dict[int, InvalidRecord] = {}
    refused = (prompt == REFUSED) | (longest == REFUSED)
    if answers == "pair":
        refused |= count < 2
    for i in np.flatnonzero(refused | (prompt + supervised > processor.text_limit)).tolist():
        prefix, suffixes = texts["prefix"][i].as_py(), texts["answers"][i].as_py()
        rows = [suffixes] if together else [[suffix] for suffix in suffixes]
        try:
            if answers == "pair":
                require_two(processor.encode_suffixes(prefix, pair_of(records[i])))
            kept = [kept_of(processor, prefix, row) for row in rows or [[]]]
        except ValueError as error:
            invalid[i] = InvalidRecord(records[i]["id"], str(error))
            prompt[i] = answer[i] = supervised[i] = total[i] = count[i] = 0
        else:
            of_answers = [length for row in kept for length in row]
            answer[i], supervised[i] = max(of_answers), max(map(sum, kept))
            cut = zip(suffixes, of_answers, strict=True)
            lost.append(max(len(processor.answer_ids(suffix)) - length for suffix, length in cut))
    marked = pc.sum(pc.match_substring_regex(texts["prefix"], f"^{LEADING.pattern}")).as_py() or 0
    learned = (supervised.sum(), (count > 0).sum()) if together else (total.sum(), count.sum())
    mean = float(learned[0] / max(1, learned[1]))
    return TextLengths(prompt, answer, supervised, mean, invalid, marked, len(lost) - 1, max(lost))


def kept_of(processor: Processor, prefix: str, suffixes: Sequence[str]) -> list[int]:
    """Tokens of each suffix of one row after cutting. ValueError where the processor refuses it."""
    row = processor.encode_suffixes(prefix, suffixes) if suffixes else processor.encode(prefix)
    kept: list[int] = row["token_type_ids"].bincount()[1:].tolist()
    return kept


def text_table(records: Sequence[Mapping[str, Any]], answers: Answers | None) -> pa.Table:
    """Columns `prefix`, and `answers` that may be learned: a list, empty where there are none; with "all" of distinct
    ones, with "pair" of two, or of one where none is rejected.
    """
    names = ["prefix", "answers", "answer", *(["rejected"] if answers == "pair" else [])]
    if isinstance(records, datasets.Dataset):
        table = records.select_columns(names).with_format("arrow")[:]
    else:
        table = pa.table({name: [record[name] for record in records] for name in names})
    prefix, lists = table["prefix"].cast(pa.string()), table["answers"].cast(pa.list_(pa.string()))
    if answers == "all":
        lists = distinct(lists.combine_chunks())
    elif answers == "pair":
        both = (table[name].cast(pa.string()).to_pylist() for name in ("answer", "rejected"))
        rows = [[chosen, rejected] if rejected else [chosen] for chosen, rejected in zip(*both, strict=True)]
        lists = pa.array(rows, pa.list_(pa.string()))
    elif answers not in ("rotate", "prompt"):
        counts = pc.list_value_length(lists).to_numpy().astype(np.int32)
        one = np.minimum(counts, 1 if answers else 0)
        offsets = pa.array(np.concatenate(([0], np.cumsum(one))), pa.int32())
        majority = table["answer"].cast(pa.string()).combine_chunks().filter(pa.array(one == 1))
        lists = pa.ListArray.from_arrays(offsets, majority)
    return pa.table({"prefix": prefix, "answers": lists}).combine_chunks()


def distinct(lists: pa.ListArray) -> pa.ListArray:
    """Each list without what it holds already, in the order of first occurrence."""
    counts = lists.value_lengths().to_numpy(zero_copy_only=False)
    texts = lists.flatten()
    encoded = texts.dictionary_encode()
    owners = np.repeat(np.arange(len(counts)), counts)
    pairs = owners * max(1, len(encoded.dictionary)) + encoded.indices.to_numpy(zero_copy_only=False)
    first = np.sort(np.unique(pairs, return_index=True)[1])
    offsets = np.concatenate(([0], np.cumsum(np.bincount(owners[first], minlength=len(counts)))))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts.take(pa.array(first)))


def counted(texts: pa.Table, processor: Processor, folder: Path) -> Lengths:
    """i32[4, N]: tokens of each prompt, of its longest answer, of all its answers, and how many these are; REFUSED
    for a prompt, and for the longest of answers, that the processor refuses. Counted once, then read from `folder`.
    """
    key = hashlib.sha256(f"{FORMAT} {processor.digest} {content_hash(texts)}".encode()).hexdigest()[:32]
    file = folder / f"lengths-{key}.npy"
    with contextlib.suppress(OSError, ValueError):  # none yet, or not as it was written
        return np.load(file, allow_pickle=False)
    prompts = lengths_of(texts["prefix"], processor.prompt_ids)
    lists = texts["answers"].combine_chunks()
    flat = lengths_of(lists.flatten(), processor.answer_ids)
    count = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
    longest, total, some = np.zeros_like(count), np.zeros_like(count), count > 0
    if len(flat):
        starts = (np.cumsum(count) - count)[some]
        refused = np.minimum.reduceat(flat, starts) == REFUSED
        longest[some] = np.where(refused, REFUSED, np.maximum.reduceat(flat, starts))
        total[some] = np.add.reduceat(np.maximum(flat, 0), starts)
    found: Lengths = np.stack((prompts, longest, total, count))
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        written = Path(unfinished, file.name)
        np.save(written, found)
        os.replace(written, file)
    return found


def lengths_of(texts: pa.ChunkedArray | pa.Array, ids: Callable[[str], list[int]]) -> Lengths:
    """i32[N]: the tokens of each text, each distinct one tokenised once; REFUSED where that is a ValueError."""
    encoded = pa.chunked_array([texts]) if isinstance(texts, pa.Array) else texts
    encoded = encoded.combine_chunks().dictionary_encode()

    def length(text: str) -> int:
        try:
            return len(ids(text))
        except ValueError:
            return REFUSED

    distinct = encoded.dictionary.to_pylist()
    lengths = np.array([length(text) for text in progress_bar(distinct, "tokenising texts", unit="text")], np.int32)
    return lengths[encoded.indices.to_numpy(zero_copy_only=False)] if len(lengths) else lengths


def content_hash(table: pa.Table) -> str:
    """sha256 of what a table holds."""
    sink = _Hash()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None))
    return sink.sha256.hexdigest()


class _Hash(io.RawIOBase):
    """A file that keeps nothing of what is written but its sha256."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return len(content)
