"""Preference pairs: TRL's columns and ours become the same records in every source; what is no pair is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from data import convert
from data.invalid import SkippedRecords
from data.records import load_records
from tests.images import IMAGE, encoded

PAIR = {"prompt": "what is this?", "chosen": "a cat", "rejected": "a dog"}
OWN = {"prefix": "what is this?", "suffix": "a cat", "rejected": "a dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(IMAGE)
    return tmp_path


def load(folder: Path, *lines: Any, key: str = "jsonl", **options: Any) -> list[dict[str, Any]]:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source: dict[str, Any] = {key: file, "cache_dir": folder / "cache"}
    rows: list[dict[str, Any]] = load_records(**source, **options).to_list()
    return rows


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, GOOD, BAD = says("user", "what is this?"), says("assistant", "a cat"), says("assistant", "a dog")
PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "what is this?"}]
TALK = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
FORMS: dict[str, dict[str, Any]] = {
    "texts": PAIR | {"image": "a.jpg"},
    "a list of one image": PAIR | {"images": ["a.jpg"]},
    "a mark for the image": PAIR | {"prompt": "<image>what is this?", "images": ["a.jpg"]},
    "chats": TALK | {"images": ["a.jpg"]},
    "chats of parts": {
        "prompt": [says("user", PARTS)],
        "chosen": [says("assistant", [{"type": "text", "text": "a cat"}])],
        "rejected": [says("assistant", [{"type": "text", "text": "a dog"}])],
        "images": [{"path": "a.jpg", "bytes": None}],
    },
    "a text and chats": TALK | {"prompt": "what is this?", "image": "a.jpg"},
    "no prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD], "image": "a.jpg"},
    "null as prompt": {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD], "image": "a.jpg"},
}


@pytest.mark.parametrize("key", ["jsonl", "messages"])
@pytest.mark.parametrize("form", FORMS)
def test_trls_columns_are_read_without_being_named(folder: Path, form: str, key: str) -> None:
    (record,) = load(folder, FORMS[form] | {"source": "web"}, key=key)
    assert record["image"]["path"] == str(folder / "a.jpg")
    assert (record["prefix"], record["question"]) == ("what is this?", "what is this?")
    assert (record["answers"], record["answer"], record["rejected"]) == (["a cat"], "a cat", "a dog")
    assert (record["equally_right"], record["extra"]) == (True, '{"source": "web"}')


def test_our_own_columns_and_other_names(folder: Path) -> None:
    """A question is put into the prompt; a whole number is a text; a row without `rejected`, or with null, is none."""
    question = {"image": "a.jpg", "question": "how many?", "suffix": 2, "rejected": 3}
    single = {"image": "b.jpg", "prefix": "x", "suffix": ["y", "z"]}
    records = load(folder, OWN | {"image": "a.jpg"}, question, single, single | {"rejected": None})
    assert [(one["prefix"], one["answers"], one["rejected"], one["extra"]) for one in records] == [
        ("what is this?", ["a cat"], "a dog", ""),
        ("answer en how many?", ["2"], "3", ""),
        ("x", ["y", "z"], "", ""),
        ("x", ["y", "z"], "", ""),
    ]
    named = {"picture": "a.jpg", "asked": "x", "good": "y", "bad": "z"}
    columns = {"image": "picture", "prefix": "asked", "suffix": "good", "rejected": "bad"}
    assert load(folder, named, columns=columns)[0]["rejected"] == "z"
    (record,) = load(folder, PAIR | {"picture": "a.jpg"}, columns={"image": "picture"})
    assert (record["image_id"], record["prefix"], record["rejected"]) == ("a.jpg", "what is this?", "a dog")
    columns = {"question": "prompt", "suffix": "chosen"}
    assert load(folder, PAIR | {"image": "a.jpg"}, columns=columns)[0]["prefix"] == "answer en what is this?"
    (record,) = load(folder, OWN | {"image": "a.jpg", "chosen": "x"})  # a further column, beside a suffix
    assert (record["answer"], record["extra"]) == ("a cat", '{"chosen": "x"}')


def test_a_chat_with_a_rejected_answer_beside_it(folder: Path) -> None:
    """As ms-swift has it; and a prompt and a completion."""
    chat = {"messages": [USER, GOOD], "images": ["a.jpg"], "rejected_response": "a dog"}
    (record,) = load(folder, chat, key="messages", columns={"rejected": "rejected_response"})
    assert (record["answers"], record["rejected"], record["extra"]) == (["a cat"], "a dog", "")
    line = {"prompt": "what is this?", "completion": "a cat", "rejected": "a dog", "image": "a.jpg"}
    assert load(folder, line, key="messages")[0]["rejected"] == "a dog"


@pytest.mark.parametrize("delimiter", [",", "\t"], ids=["csv", "tsv"])
@pytest.mark.parametrize("names", [["prompt", "chosen"], ["prefix", "suffix"]], ids="-".join)
def test_tables_of_texts(folder: Path, delimiter: str, names: list[str]) -> None:
    key = {",": "csv", "\t": "tsv"}[delimiter]
    with (folder / f"pairs.{key}").open("w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow([*names, "rejected", "image"])
        table.writerow([*PAIR.values(), "a.jpg"])
        table.writerow([*list(PAIR.values())[:2], "", "a.jpg"])
    source: dict[str, Any] = {key: folder / f"pairs.{key}", "cache_dir": folder}
    skipped = SkippedRecords(share=0.5)
    records = load_records(**source, skipped=skipped).to_list()
    assert (records[0]["prefix"], records[0]["answers"], records[0]["rejected"]) == (
        "what is this?",
        ["a cat"],
        "a dog",
    )
    if "chosen" in names:
        (reason,) = skipped.reasons.values()
        assert reason.startswith("a preference pair has an empty answer: 'a cat' is chosen, '' is rejected")
    else:  # an empty cell of a table in which only some rows are pairs
        assert [one["rejected"] for one in records] == ["a dog", ""]


def test_a_column_that_a_table_of_pairs_lacks_is_named_once(folder: Path) -> None:
    (folder / "pairs.csv").write_text("prompt,chosen,rejected,file\nx,y,z,a.jpg\n")
    with pytest.raises(
        ValueError, match=r"pairs\.csv: it has no image; .* got file; name them with columns: \{image: \.\.\.\}"
    ):
        load_records(csv=folder / "pairs.csv", cache_dir=folder)
    records = load_records(csv=folder / "pairs.csv", columns={"image": "file"}, cache_dir=folder)
    assert records["rejected"][:] == ["z"]


@pytest.mark.parametrize("key", ["parquet", "disk", "hub"])
@pytest.mark.parametrize("form", ["texts", "chats", "no prompt"])
def test_data_sets_hold_pairs_with_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, form: str
) -> None:
    """Images as TRL has them, a list of one."""
    rows = FORMS[form] | {"images": [{"bytes": IMAGE, "path": None}]}
    rows.pop("image", None)
    table = datasets.Dataset.from_list([rows]).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "pairs.parquet")
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "saved"))
    loading = datasets.load_dataset_builder
    monkeypatch.setattr(
        "datasets.load_dataset_builder",
        lambda *_, **__: loading("parquet", data_files=str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "c")),
    )
    given = {"parquet": tmp_path / "pairs.parquet", "disk": tmp_path / "saved", "hub": "mine/pairs"}[key]
    source: dict[str, Any] = {key: given} | ({} if key == "parquet" else {"split": "train"})
    (record,) = load_records(**source, cache_dir=tmp_path / "cache")
    assert (record["prefix"], record["answers"], record["rejected"]) == ("what is this?", ["a cat"], "a dog")
    assert record["image"]["bytes"] == IMAGE


def test_metadata_of_a_folder(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps(PAIR | {"file_name": "a.jpg"}))
    (record,) = load_records(folder=folder, cache_dir=folder / "cache")
    assert (record["image_id"], record["answer"], record["rejected"]) == ("a.jpg", "a cat", "a dog")


SAME = r"the chosen answer and the rejected one are the same, 'a cat '; expected two that differ"
EMPTY = "a preference pair has an empty answer: {} is chosen, {} is rejected; expected a text for each of them"
TWO = says("user", "and now?")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (OWN | {"rejected": "a cat "}, SAME),
        (PAIR | {"rejected": "a cat "}, SAME),
        ({"chosen": [USER, GOOD], "rejected": [USER, says("assistant", "a cat ")]}, SAME),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
            "the chosen answer and the rejected one are the same, 'a cat'; expected two that differ",
        ),
        (OWN | {"rejected": ""}, EMPTY.format("'a cat'", "''")),
        (OWN | {"rejected": " "}, EMPTY.format("'a cat'", "' '")),
        (OWN | {"suffix": ""}, EMPTY.format("''", "'a dog'")),
        (PAIR | {"chosen": ""}, EMPTY.format("''", "'a dog'")),
        (PAIR | {"rejected": ""}, EMPTY.format("'a cat'", "''")),
        (PAIR | {"rejected": None}, "it has no rejected; expected a pair: prompt, chosen, rejected and image"),
        ({"prompt": "x", "chosen": "y"}, "it has no rejected; expected a pair"),
        ({"prompt": "x", "rejected": "y"}, "it has no chosen; expected a pair"),
        (OWN | {"rejected": ["a dog"]}, r"expected a text or a whole number as rejected, got \['a dog'\]"),
        (OWN | {"suffix": ["a cat", "cat"]}, "it has 2 answers beside rejected, and a preference pair has one that is"),
        (
            OWN | {"equally_right": False},
            r"its answers are annotators' \(equally_right is false\), and it has rejected",
        ),
        (
            {"chosen": "what is this? a cat", "rejected": "what is this? a dog"},
            "it has no prompt, and where the prompt ends within chosen and rejected cannot be told of texts; put what",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [TWO, BAD]},
            "it has no prompt, and chosen and rejected do not begin with the same message",
        ),
        (
            {"chosen": [GOOD], "rejected": [BAD]},
            "it has no prompt, and chosen and rejected do not begin with the same message",
        ),
        ({"chosen": [USER, GOOD, TWO, GOOD], "rejected": [USER, GOOD, TWO, BAD]}, "it has 4 messages, of user, assis"),
        (PAIR | {"chosen": 3}, "expected a text or a list of messages as chosen, got 3"),
        (TALK | {"chosen": []}, r"expected a text or a list of messages as chosen, got \[\]"),
        (TALK | {"prompt": [says("system", "be brief"), USER]}, "it has a system text"),
        (PAIR | {"images": ["a.jpg", "b.jpg"], "image": None}, "it has 2 images, and 0 places for one"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_pair_is_named_and_counted(folder: Path, bad: dict[str, Any], said: str) -> None:
    good = OWN | {"image": "a.jpg"}
    bad = {"image": "a.jpg"} | bad
    with pytest.raises(ValueError, match=rf"1 of 2 records cannot be used.*\n.*pairs\.jsonl, line 2: {said}"):
        load(folder, good, bad)
    skipped = SkippedRecords(share=0.5)
    assert len(load(folder, good, bad, skipped=skipped)) == 1
    assert list(skipped.reasons) == [f"{folder}/pairs.jsonl, line 2"]


@pytest.mark.parametrize("columns", [None, {"rejected": "bad"}])
def test_pairs_are_converted_and_read_back(folder: Path, columns: dict[str, str] | None) -> None:
    """With single answers among them; also where `rejected` has another name."""
    name = (columns or {}).get("rejected", "rejected")
    question = {"image": "b.jpg", "question": "how many?", "suffix": 2, name: 3, "id": "q", "note": [1]}
    load(
        folder, {"image": "a.jpg", "prefix": "x", "suffix": "y", name: "z"}, question, question | {"id": 7, name: None}
    )
    source: dict[str, Any] = {"jsonl": folder / "pairs.jsonl", "columns": columns}
    convert.convert(source, folder / "out.jsonl")
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row.get("rejected") for row in rows] == ["z", "3", None]
    found = load_records(jsonl=folder / "out.jsonl", cache_dir=folder / "cache").to_list()
    assert found == load_records(**source, cache_dir=folder / "cache").to_list()
    assert [one["rejected"] for one in found] == ["z", "3", ""]


def test_locations_of_a_rejected_answer_move_with_those_of_the_chosen_one(tmp_path: Path) -> None:
    """Into the square around an image twice as wide as high."""
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (400, 200)), "PNG"))
    box = "<loc0000><loc0000><loc1023><loc1023> {}"
    line = {"image": "a.jpg", "prefix": "detect cat", "suffix": box.format("cat"), "rejected": box.format("dog")}
    (record,) = load(tmp_path, line, aspect="pad")
    assert record["answer"] == "<loc0256><loc0000><loc0767><loc1023> cat"
    assert record["rejected"] == "<loc0256><loc0000><loc0767><loc1023> dog"


def test_a_text_that_no_file_can_hold_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="its text is no Unicode"):
        load(folder, OWN | {"image": "a.jpg", "rejected": "\ud800"})


def test_the_kind_of_a_file_of_pairs_is_told(folder: Path) -> None:
    load(folder, FORMS["chats"])
    given = convert.parse([str(folder / "pairs.jsonl"), str(folder / "out.jsonl")])
    assert convert.source_of(given) == {"jsonl": folder / "pairs.jsonl"}
