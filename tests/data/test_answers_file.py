"""answers.jsonl as evaluate.py writes it, and what is no line of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.answers_file import GivenAnswer, read_answers

LINE = {"id": "1", "question": "what?", "expected": ["a cat"], "answer": "cat", "score": 30, "finished": True}


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "answers.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_a_line_is_an_answer(tmp_path: Path) -> None:
    """Whatever else it has; question and expected may be missing."""
    least = {"id": "b/2", "answer": "", "score": 0.0, "finished": False}
    file = write(tmp_path, LINE | {"confidence": 0.5, "image_id": "x"}, "", least)
    assert read_answers(file) == {
        "1": GivenAnswer(f"{file}, line 1", "cat", 30.0, True, "what?", ["a cat"]),
        "b/2": GivenAnswer(f"{file}, line 3", "", 0.0, False, None, None),
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        (["x"], "with id, answer, score, finished; id, answer, score, finished cannot be used in"),
        (LINE | {"id": 1}, "with id, answer, score, finished; id cannot be used in"),
        (LINE | {"answer": None}, "finished; answer cannot be used in"),
        (LINE | {"score": True}, "finished; score cannot be used in"),
        (LINE | {"score": float("nan")}, "finished; score cannot be used in"),
        (LINE | {"score": "100"}, "finished; score cannot be used in"),
        (LINE | {"finished": 1}, "finished; finished cannot be used in"),
        ({"question_id": 1, "answer": "cat"}, "finished; id, score, finished cannot be used in"),
        (LINE, "id '1' has an answer in an earlier line; expected one for each id"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_no_line_of_it_is_named(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"answers\.jsonl, line 2: .*{said}"):
        read_answers(write(tmp_path, LINE, line))


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"answers\.jsonl is empty"):
        read_answers(write(tmp_path))
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist"):
        read_answers(tmp_path / "gone.jsonl")


def test_an_answer_to_another_example_is_told(tmp_path: Path) -> None:
    """By what was asked, or by what was expected."""
    given = read_answers(write(tmp_path, LINE))["1"]
    record = {"id": "1", "question": "what?", "answers": ["a cat"]}
    given.require_about(record)
    GivenAnswer("x", "cat", 30.0, True).require_about(record | {"question": "other"})
    with pytest.raises(ValueError, match=r"line 1: question of id '1' is 'what\?', and in the source 'who\?'"):
        given.require_about(record | {"question": "who?"})
    with pytest.raises(ValueError, match=r"expected of id '1' is \['a cat'\], and in the source \['a dog'\]"):
        given.require_about(record | {"answers": ["a dog"]})
