"""A source and the answers of networks become a file of pairs, which is read as such; nothing is lost uncounted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import preferences
from data.records import load_records
from data.synthetic.scenes import write as write_scenes
from tests.images import IMAGE

TEN = ["2"] * 6 + ["3"] * 4
EXAMPLES: list[dict[str, Any]] = [
    {"image": "a.jpg", "question": "what is this?", "suffix": "cat", "id": "x"},
    {"image": "a.jpg", "prefix": "count cats", "suffix": TEN, "equally_right": False, "answer": "2"},
    {"image": "b.jpg", "prefix": "name it", "suffix": ["dog", "puppy", "puppy"], "by": "me"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(IMAGE)
    write(tmp_path / "in.jsonl", *EXAMPLES)
    return tmp_path


def write(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def answer(id: str, text: str, score: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"id": id, "answer": text, "score": score, "finished": True, **more}


def made(folder: Path, *options: str | Path) -> list[dict[str, Any]]:
    """The lines that a command writes."""
    preferences.main([str(folder / "in.jsonl"), str(folder / "out.jsonl"), *map(str, options)])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_pairs_are_read_as_such(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what the source says of them otherwise; annotators' answers become the most frequent one."""
    answers = write(folder / "answers.jsonl", answer("x", "dog"), answer("2", "4"), answer("3", "a cat"))
    rows = made(folder, "--answers", answers)
    assert rows == [
        {"id": "x", "image": "a.jpg", "question": "what is this?", "suffix": "cat", "rejected": "dog"},
        {"id": "2", "image": "a.jpg", "prefix": "count cats", "suffix": "2", "rejected": "4"},
        {"id": "3", "image": "b.jpg", "prefix": "name it", "suffix": "puppy", "rejected": "a cat", "by": "me"},
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/in.jsonl is read as jsonl",
        "right beats wrong: 3 pairs",
        f"3 pairs written; read them with train: {{jsonl: {folder}/out.jsonl}}",
    ]
    records = load_records(jsonl=folder / "out.jsonl", cache_dir=folder / "cache").to_list()
    assert [(one["id"], one["prefix"], one["answers"], one["rejected"]) for one in records] == [
        ("x", "answer en what is this?", ["cat"], "dog"),
        ("2", "count cats", ["2"], "4"),
        ("3", "name it", ["puppy"], "a cat"),
    ]
    assert {one["equally_right"] for one in records} == {True}


def test_each_distinct_answer_makes_a_pair_with_an_id_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two that are the same that counts which was not cut off; an id of another example is not taken."""
    write(folder / "in.jsonl", *EXAMPLES, EXAMPLES[0] | {"id": "x-2"})
    first = write(folder / "first.jsonl", answer("x", "cow", finished=False), answer("2", "4"))
    second = write(folder / "second.jsonl", answer("x", "dog"), answer("2", " 4 "), answer("x-2", "dog"))
    third = write(folder / "third.jsonl", answer("x", "bird"), answer("2", "5", 60.0))
    rows = made(folder, "--answers", first, "--answers", second, "--answers", third)
    assert [(row["id"], row["rejected"]) for row in rows] == [
        ("x", "dog"),
        ("x-3", "bird"),
        ("x-4", "cow"),
        ("2", "4"),
        ("x-2", "dog"),
    ]
    assert capsys.readouterr().out.splitlines()[1:-1] == [
        "right beats wrong: 5 pairs",
        "no pair: 1 answers are the same in another file",
        "no pair: 1 answers score above 0 and below 90",
        "1 examples have no answer: 3",
    ]


def test_blunt_answers_lose_to_sentences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of another network that it finished; else the template."""
    answers = write(folder / "a.jsonl", answer("x", "Cat", 100.0), answer("2", "two", 100.0), answer("3", "cow"))
    long = [answer("x", "this is a cat"), answer("2", "I see 2 cats", finished=False), answer("3", "here is a puppy")]
    base = write(folder / "base.jsonl", *long)
    options: list[str | Path] = ["--answers", answers, "--sentences", base, "--long", "the answer is {answer}"]
    assert [(row["suffix"], row["rejected"]) for row in made(folder, *options)] == [
        ("this is a cat", "Cat"),
        ("the answer is two", "two"),
        ("here is a puppy", "cow"),
    ]
    assert capsys.readouterr().out.splitlines()[1:-1] == [
        f"1 of 3 answers in {base} are cut off and cannot be chosen",
        "long beats blunt: 2 pairs",
        "right beats wrong: 1 pairs",
    ]
    assert [row["id"] for row in made(folder, *options[:4], "--force")] == ["x", "3"]
    assert "no pair: 1 answers are right and blunt, and no sentence says them" in capsys.readouterr().out


def test_ids_without_an_example_and_without_an_answer_are_named_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [answer(f"of/{k}", "dog") for k in range(5)]
    made(folder, "--answers", write(folder / "answers.jsonl", answer("x", "dog"), *others))
    said = capsys.readouterr().out.splitlines()
    assert "2 examples have no answer: 2, 3" in said
    assert "5 answers are to no example: of/0, of/1, of/2 and 2 more" in said


def test_rows_that_cannot_be_used_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their answers are not said to be to no example; the exit code is 1, as of data.convert."""
    write(folder / "in.jsonl", *EXAMPLES, EXAMPLES[0] | {"id": "y", "image": "gone.jpg"})
    answers = write(folder / "answers.jsonl", answer("x", "dog"), answer("y", "dog"))
    with pytest.raises(SystemExit, match="1"):
        made(folder, "--answers", answers)
    out, err = capsys.readouterr()
    assert "to no example" not in out
    assert "gone.jpg does not exist" in err
    assert err.splitlines()[-1] == "1 rows cannot be used and were skipped"
    assert len((folder / "out.jsonl").read_text().splitlines()) == 1


def test_no_pair_is_an_error_that_says_why(folder: Path) -> None:
    answers = write(folder / "answers.jsonl", answer("x", "cat", 100.0), answer("2", "3", 60.0), answer("7", "dog"))
    with pytest.raises(ValueError, match=r"^no pair can be made:\n") as caught:
        made(folder, "--answers", answers)
    assert str(caught.value).splitlines()[1:] == [
        "  no pair: 1 answers are right",
        "  no pair: 1 answers score above 0 and below 90",
        "  1 examples have no answer: 3",
        "  1 answers are to no example: 7",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "answers.jsonl", "b.jpg", "in.jsonl"]


def test_answers_to_other_examples_are_refused(folder: Path) -> None:
    """Their ids are numbers of lines too; also where a text is the same as in another file."""
    good = write(folder / "good.jsonl", answer("2", "4"))
    for line in (answer("2", "4", question="count dogs"), answer("2", "4", expected=["3"])):
        other = write(folder / "other.jsonl", line)
        with pytest.raises(
            ValueError, match=r"other\.jsonl, line 1: (question|expected) of id '2' is .* in the source"
        ):
            made(folder, "--answers", good, "--answers", other)
    assert not (folder / "out.jsonl").exists()


def test_nothing_that_is_read_is_replaced_and_other_files_only_if_asked(folder: Path) -> None:
    answers = write(folder / "answers.jsonl", answer("x", "dog"))
    before = {path: path.read_bytes() for path in (folder / "in.jsonl", answers)}
    (folder / "link.jsonl").symlink_to(folder / "in.jsonl")
    asked = ["--answers", str(answers), "--sentences", str(answers), "--long", "it is {answer}", "--force"]
    for output in (*before, folder / "link.jsonl"):
        with pytest.raises(ValueError, match=r"is one of the files that are read; give another path"):
            preferences.main([str(folder / "in.jsonl"), str(output), *asked])
    assert {path: path.read_bytes() for path in before} == before
    (folder / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.jsonl exists already: give another path, or replace it with --force"):
        made(folder, "--answers", answers)
    assert (folder / "out.jsonl").read_text() == "mine"
    assert len(made(folder, "--answers", answers, "--force")) == 1
    with pytest.raises(ValueError, match=r"is a folder; expected a path for the file of pairs"):
        preferences.main([str(folder / "in.jsonl"), str(folder), *asked])


def test_the_official_files_are_a_source(tmp_path: Path) -> None:
    """By the options of data.convert, with images in a folder of their own."""
    write_scenes(tmp_path, scenes=3, seed=1, split="train2014")
    names = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json", "images")
    paths = [str(tmp_path / name) for name in names]
    source: dict[str, Any] = dict(zip(("questions", "annotations", "images"), paths, strict=True))
    (first, *_) = load_records(**source, cache_dir=tmp_path)
    answers = write(tmp_path / "answers.jsonl", answer(first["id"], "nonsense", expected=first["answers"]))
    given = [word for key, value in source.items() for word in (f"--{key}", value)]
    preferences.main([*given, str(tmp_path / "out.jsonl"), "--answers", str(answers)])
    (row,) = load_records(jsonl=tmp_path / "out.jsonl", images=tmp_path / "images", cache_dir=tmp_path).to_list()
    assert (row["question"], row["answers"], row["rejected"]) == (first["question"], [first["answer"]], "nonsense")


def test_answers_have_to_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preferences.main(["in.jsonl", "out.jsonl"])
    assert "the following arguments are required: --answers" in capsys.readouterr().err
