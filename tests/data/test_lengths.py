"""How long texts are, before anything is trained: what is counted, what is refused, what is kept for the next time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from data import PaliGemmaDataset, Processor
from data.lengths import Longest, measure
from data.records import FEATURES, load_records

BASE = Path(__file__).parents[2] / "assets/tiny-base"
TEXTS = [
    ("answer en how many?", ["3", "three circles", "3"], "3"),
    ("", ["yes"], "yes"),
    ("caption en", ["", "a red circle and a blue cross"], ""),
    ("answer en what is this?", [], ""),
    ("<image>caption en", [""], ""),
]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BASE)


def rows(texts: Sequence[tuple[str, list[str], str]]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{i}",
            "image": {"path": "absent.png", "bytes": None},
            "image_id": "i",
            "question": prefix,
            "prefix": prefix,
            "answers": answers,
            "equally_right": False,
            "answer": answer,
            "rejected": "",
            "answer_type": "",
            "question_type": "",
            "extra": "",
        }
        for i, (prefix, answers, answer) in enumerate(texts)
    ]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("answers", ["rotate", "majority", "all", None])
def test_lengths_are_those_of_the_processors_rows(
    processor: Processor, tmp_path: Path, answers: Any, mapped: bool
) -> None:
    """Of records in memory and of mapped ones, a selection among them, which knows other rows than its file."""
    records: Any = rows(TEXTS)
    if mapped:
        records = datasets.Dataset.from_list(rows([("not asked", ["never " * 50], "never"), *TEXTS]), features=FEATURES)
        records = records.select(range(1, 6))
    found = measure(records, processor, answers, tmp_path)
    by_choice = {
        "rotate": lambda all_of, one: all_of,
        "majority": lambda all_of, one: [one][: len(all_of)],
        "all": lambda all_of, one: list(dict.fromkeys(all_of)),
        None: lambda all_of, one: [],
    }
    learned = [by_choice[answers](all_of, one) for _, all_of, one in TEXTS]
    encoded = [[len(processor.answer_ids(text)) for text in texts] for texts in learned]
    assert found.prompt.tolist() == [len(processor.prompt_ids(prefix)) for prefix, _, _ in TEXTS]
    assert found.answer.tolist() == [max(counts, default=0) for counts in encoded]
    of_rows = [[sum(counts)] if answers == "all" and counts else counts for counts in encoded]
    assert found.supervised.tolist() == [max(counts, default=0) for counts in of_rows]
    every = [count for counts in of_rows for count in counts]
    assert found.mean_supervised == pytest.approx(sum(every) / len(every) if every else 0)
    assert found.mean_text == pytest.approx(found.prompt.mean() + found.mean_supervised)
    assert (found.longest_text, found.longest_answer) == ((found.prompt + found.answer).max(), found.answer.max())
    assert found.longest == Longest(
        (found.prompt + found.supervised).max(), found.supervised.max(), found.longest_answer
    )
    assert (found.invalid, found.marked, found.cut) == ({}, 1, 0)
    assert found.notes() == ["1 prefixes begin with <image> or <bos>: taken off, for every row has them"]


@pytest.mark.parametrize("answers", ["rotate", "majority", "all"])
def test_no_row_of_a_data_set_is_longer_than_was_measured(processor: Processor, tmp_path: Path, answers: Any) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    records = [row | {"image": {"path": str(path), "bytes": None}} for row in rows(TEXTS) if row["answers"]]
    found = measure(records, processor, answers, tmp_path)
    dataset = PaliGemmaDataset(records, processor, answers)
    examples = [dataset[index, epoch] for index in range(len(records)) for epoch in range(6)]
    assert max(len(row["input_ids"]) for row in examples) == processor.num_image_tokens + 1 + found.longest.text
    assert max(int((row["labels"] != -100).sum()) for row in examples) == found.longest.supervised
    longest = max(int(row["token_type_ids"].bincount()[1:].max()) for row in examples)
    assert longest == found.longest_answer


def test_what_does_not_fit_is_named_with_the_length_it_needs(tmp_path: Path) -> None:
    """200 words behind `caption en`: once trained on without the prompt. And a text that holds a special token."""
    records = rows([*TEXTS, ("caption en", ["x", "circle " * 200], "x"), ("what is <eos>?", ["yes"], "yes")])
    found = measure(records, Processor.from_pretrained(BASE, 128), "rotate", tmp_path)
    assert sorted(found.invalid) == [5, 6]
    assert found.invalid[5].id == "q5"
    assert "its text needs " in found.invalid[5].reason
    assert "max_text_tokens is 128" in found.invalid[5].reason
    assert "holds the special token <eos>" in found.invalid[6].reason
    assert (found.prompt[5], found.answer[5], found.answer[6]) == (0, 0, 0)
    assert found.longest_text == measure(rows(TEXTS), Processor.from_pretrained(BASE), "rotate", tmp_path).longest_text
    assert sorted(measure(records, Processor.from_pretrained(BASE, 128), "majority", tmp_path).invalid) == [6]


def test_answers_of_one_row_must_fit_together(processor: Processor, tmp_path: Path) -> None:
    """Each fits alone. Where they may be cut, the longest are, to one length."""
    answers = ["red", "a red circle", "a red circle and a red cross", "red"]
    records, prompt = rows([("answer en what?", answers, "red"), *TEXTS]), len(processor.prompt_ids("answer en what?"))
    lengths = [len(processor.answer_ids(answer)) for answer in answers[:3]]
    limit = prompt + max(lengths)
    assert measure(records, Processor.from_pretrained(BASE, limit), "rotate", tmp_path).invalid == {}
    refused = measure(records, Processor.from_pretrained(BASE, limit), "all", tmp_path)
    assert sorted(refused.invalid) == [0]
    assert f"{sum(lengths)} of its 3 answers); max_text_tokens is {limit}" in refused.invalid[0].reason
    assert (refused.prompt[0], refused.answer[0], refused.supervised[0]) == (0, 0, 0)
    cutting = Processor.from_pretrained(BASE, limit, truncate_answers=True)
    found = measure(records, cutting, "all", tmp_path)
    kept = cutting.fit(prompt, *lengths)
    assert sum(kept) <= max(lengths) < sum(lengths)
    assert (found.answer[0], found.supervised[0], found.cut) == (max(kept), sum(kept), 1)
    assert found.longest.text <= limit


def test_a_run_that_cuts_says_how_many_lose_how_much(processor: Processor, tmp_path: Path) -> None:
    long = "circle " * 50
    records = rows([*TEXTS, ("caption en", ["x", long], "x"), ("q " * 200, ["x"], "x")])
    found = measure(records, Processor.from_pretrained(BASE, 30, truncate_answers=True), "rotate", tmp_path)
    needed = len(processor.prompt_ids("caption en")) + len(processor.answer_ids(long))
    assert (found.cut, found.cut_tokens, found.longest_text) == (1, needed - 30, 30)
    assert f"1 records have an answer that is cut at data.max_text_tokens, by up to {needed - 30}" in found.notes()[1]
    assert sorted(found.invalid) == [6]  # a prompt is never cut
    assert "a prompt is never cut" in found.invalid[6].reason


def test_every_distinct_text_is_tokenised_once_and_never_again(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the texts, the answers that are learned, or the tokenizer are others."""
    asked: list[str] = []
    encode = Processor._ids

    def counting(self: Processor, text: str, name: str) -> list[int]:
        asked.append(text)
        return encode(self, text, name)

    monkeypatch.setattr(Processor, "_ids", counting)
    records = datasets.Dataset.from_list(rows(TEXTS * 20), features=FEATURES)
    first = measure(records, processor, "rotate", tmp_path)
    distinct = {text for _, answers, _ in TEXTS for text in answers}
    assert sorted(asked) == sorted([*(processor.prompt(prefix) for prefix, _, _ in TEXTS), *distinct])
    asked.clear()
    again = measure(records, processor, "rotate", tmp_path)
    assert asked == []
    assert again.prompt.tolist() == first.prompt.tolist()
    assert again.answer.tolist() == first.answer.tolist()
    for changed in (
        lambda: measure(records.select(range(4)), processor, "rotate", tmp_path),
        lambda: measure(records, processor, "majority", tmp_path),
        lambda: measure(records, Processor(**vars(processor) | {"digest": "another"}), "rotate", tmp_path),
    ):
        asked.clear()
        changed()
        assert asked
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".npy"]


def test_lengths_of_files_are_those_of_their_records(processor: Processor, tmp_path: Path) -> None:
    """An empty suffix is learned as <eos> alone."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "prefix": "detect cat", "suffix": suffix} for suffix in ("", "circle", ["", "circle circle"])
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = load_records(jsonl=tmp_path / "lines.jsonl", cache_dir=tmp_path)
    found = measure(records, processor, "rotate", tmp_path)
    assert found.answer.tolist() == [1, 2, 3]
    dataset = PaliGemmaDataset(records, processor)
    assert dataset[0]["labels"].tolist()[-2:] == [-100, processor.eos_id]
