"""What of the data a person should look at is found, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data import Processor
from data.lengths import TextLengths, measure
from data.records import load_records
from finetune.preflight.data_checks import (
    answer_checks,
    duplicate_checks,
    length_checks,
    oddly_split,
    prompt_check,
    shared_questions,
)
from tests.images import IMAGE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(ROOT / "assets/tiny-base")


def records(folder: Path, *lines: dict[str, Any]) -> Dataset:
    """Of lines that have an image, a prefix and a suffix if they do not say otherwise."""
    folder.mkdir(exist_ok=True)
    whole = [{"image": "a.jpg", "prefix": "caption en", "suffix": "x"} | line for line in lines]
    for line in whole:
        if not (folder / line["image"]).exists():
            (folder / line["image"]).write_bytes(IMAGE)
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, whole)))
    return load_records(jsonl=folder / "lines.jsonl", cache_dir=folder / "cache")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red circle", None),
        ("", None),
        ("2", None),
        ("<loc0012><loc0000><loc1023><loc0500> circle", None),
        ("<loc12>", "<loc12> is no token"),
        ("<loc1024>", "<loc1024> is no token"),
        ("<seg128>", "<seg128> is no token"),
        (" yes", "begins or ends with a space"),
        ("yes ", "begins or ends with a space"),
        ("猫", "single bytes"),
        ("qwqwq", "single letters"),
        ("12345678", "single digits"),
        ("2014", None),
    ],
)
def test_an_answer_that_is_split_oddly_is_told(processor: Processor, text: str, reason: str | None) -> None:
    found = oddly_split(text, processor)
    assert found is None if reason is None else reason in (found or "")


def test_odd_answers_are_those_that_are_learned(tmp_path: Path, processor: Processor) -> None:
    few = records(tmp_path, {"suffix": ["two", "two", "<loc7>"]}, {"image": "b.jpg", "suffix": "two"})
    odd, _ = answer_checks(few, "rotate", processor)
    assert (odd.outcome, odd.found) == (
        "warning",
        "1 of 2 distinct answers are split oddly: '<loc7>' (<loc7> is no token: expected <loc0000> to <loc1023>, "
        "<seg000> to <seg127>)",
    )
    assert answer_checks(few, "majority", processor)[0].outcome == "pass"


@pytest.mark.parametrize(("yes", "outcome"), [(12, "warning"), (10, "pass")])
def test_an_answer_that_outweighs_the_others_is_told(
    tmp_path: Path, processor: Processor, yes: int, outcome: str
) -> None:
    lines = [{"prefix": f"{k}", "suffix": "yes" if k < yes else f"{k % 3}"} for k in range(20)]
    found = answer_checks(records(tmp_path, *lines), "rotate", processor)[1]
    assert found.outcome == outcome
    assert found.found == f"{5 * yes}% of the records have the most frequent of 4 answers, 'yes'"
    assert (f"scores about {5 * yes}" in found.advice) == (outcome == "warning")


def test_of_few_records_no_answer_outweighs_the_others(tmp_path: Path, processor: Processor) -> None:
    assert answer_checks(records(tmp_path, {}, {"prefix": "y"}), "rotate", processor)[1].outcome == "pass"


def test_an_empty_prompt_is_told(tmp_path: Path) -> None:
    found = prompt_check(records(tmp_path, {"prefix": ""}, {"prefix": "  "}, {}))
    assert (found.outcome, found.found) == ("warning", "2 of 3 prompts are empty")
    assert prompt_check(records(tmp_path / "b", {})).outcome == "pass"


def test_what_is_asked_twice_in_the_training_data_is_told(tmp_path: Path) -> None:
    same = {"prefix": "x", "suffix": "y", "image": "b.jpg"}
    few = records(tmp_path, {}, same, same, {"suffix": "other", "id": "mine"}, {"prefix": "z"})
    (found,) = duplicate_checks(few, None)
    assert found.outcome == "warning"
    assert found.found == (
        "1 records repeat image, prompt and answers of another, 1 image and prompt with other answers: 1, 2, 3"
    )
    (found,) = duplicate_checks(few.select([0, 1, 4]), None)
    assert found.outcome == "pass"


def test_what_is_asked_in_both_splits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image at the same path, and of a copy elsewhere, which is not looked for where it would take long."""
    learned = records(tmp_path / "a", {}, {"prefix": "x"})
    asked = records(tmp_path / "b", {"id": "copy"}, {"id": "another prompt", "prefix": "y"})
    *_, found = duplicate_checks(learned, asked)
    assert found.outcome == "warning"
    assert found.found == ("1 of 2 validation questions are in data.train too (images compared by their content): copy")
    (tmp_path / "b/a.jpg").write_bytes(IMAGE[:-1] + b"x")  # of the same size
    assert shared_questions(learned, asked) == ([], "images compared by their content")
    shutil.copy(tmp_path / "a/a.jpg", tmp_path / "b/a.jpg")
    monkeypatch.setattr("finetune.preflight.data_checks.MOST_BYTES", 10)
    assert shared_questions(learned, asked) == ([], "images compared by their paths")
    assert shared_questions(learned, learned)[0] == ["1", "2"]


def test_what_is_cut_or_skipped_is_told(tmp_path: Path) -> None:
    few = records(tmp_path, {"suffix": "a red circle and a blue square"})
    short = Processor.from_pretrained(ROOT / "assets/tiny-base", 9, truncate_answers=True)
    lengths: TextLengths = measure(few, short, "majority", tmp_path)
    longest, cut, used = length_checks(lengths, 2, short)
    assert longest.found == (
        f"the longest text has 9 tokens of at most 9 (max_text_tokens), the longest answer {lengths.longest_answer}"
    )
    assert (cut.outcome, used.outcome) == ("warning", "warning")
    assert f"1 answers lose up to {lengths.cut_tokens} tokens" in cut.found
    assert used.found == "2 records cannot be used and are skipped"
    whole = Processor.from_pretrained(ROOT / "assets/tiny-base")
    checks = length_checks(measure(few, whole, "majority", tmp_path), 0, whole)
    assert {check.outcome for check in checks} == {"pass"}
    assert "(positions of the network)" in checks[0].found
