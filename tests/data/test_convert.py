"""Any source becomes JSON lines that are read as the same records."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from data import convert
from data.records import load_records
from data.synthetic.scenes import write as write_scenes
from tests.images import encoded

ROOT = Path(__file__).parents[2]
TEXTS = [("caption en", "Caffé 猫"), ("two\nlines", ""), ("detect cat", "<loc0001><loc0002><loc0003><loc0004> cat")]
Source = dict[str, Any]


def images(folder: Path) -> list[str]:
    """Names of three different images in a folder, one of them deeper."""
    names = ["a.jpg", "b.png", "sub/c.webp"]
    for name, color in zip(names, ("red", "green", "blue"), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        form = {"jpg": "JPEG"}.get(name[-3:], name.partition(".")[2].upper())
        (folder / name).write_bytes(encoded(Image.new("RGB", (4, 4), color), form))
    return names


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


def jsonl(folder: Path) -> Source:
    texts = zip(images(folder), TEXTS, strict=True)
    rows: list[dict[str, Any]] = [{"image": name, "prefix": p, "suffix": s} for name, (p, s) in texts]
    rows[0] |= {"id": "mine", "source": {"page": [1, None]}, "score": 0.5}
    rows[1] = {"image": "b.png", "question": "how many?", "suffix": ["two", 2, "two"]}
    return {"jsonl": lines(folder / "train.jsonl", rows)}


def delimited(folder: Path, key: str, delimiter: str) -> Source:
    names = images(folder / "images")
    with (folder / "train.txt").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["file", "query", "label", "note"])
        table.writerows([[name, p, s, "007"] for name, (p, s) in zip(names, TEXTS, strict=True)])
    columns = {"image": "file", "question": "query", "suffix": "label"}
    return {key: folder / "train.txt", "images": folder / "images", "columns": columns}


def chats(folder: Path) -> Source:
    names = images(folder)
    first = {"role": "user", "content": "<image>what is this?"}, {"role": "assistant", "content": "a cat"}
    rows = [{"messages": first, "images": [names[0]], "note": 1}]
    rows += [{"prompt": "what is this?", "completion": "a dog", "image": names[2]}]
    return {"messages": lines(folder / "chats.jsonl", rows)}


def metadata(folder: Path) -> Source:
    names = images(folder)
    rows = [{"file_name": name, "prefix": p, "suffix": s} for name, (p, s) in zip(names, TEXTS, strict=True)]
    lines(folder / "metadata.jsonl", rows)
    return {"folder": folder}


def classes(folder: Path) -> Source:
    for name in images(folder / "loose"):
        target = folder / "classes" / {"a": "cats", "b": "dogs", "s": "dogs"}[name[0]] / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "loose" / name, target)
    return {"folder": folder / "classes"}


def coco(folder: Path, boxes: bool) -> Source:
    names = images(folder)
    listed = [{"id": k, "file_name": name, "width": 4, "height": 4} for k, name in enumerate(names)]
    captions = [{"id": k, "image_id": k % 3, "caption": f"caption {k}"} for k in range(5)]
    found = [{"id": 1, "image_id": 0, "category_id": 7, "bbox": [0, 0, 2, 3], "iscrowd": 0}]
    content = {"images": listed, "annotations": found if boxes else captions, "categories": [{"id": 7, "name": "cat"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return {"coco": folder / "instances.json"}


def table_of(folder: Path) -> datasets.Dataset:
    """Images as bytes, and classes by name."""
    features = datasets.Features(
        image=datasets.Image(decode=False),
        prefix=datasets.Value("string"),
        suffix=datasets.ClassLabel(names=["cat", "dog"]),
        number=datasets.Value("int64"),
    )
    content = [(folder / name).read_bytes() for name in images(folder)]
    rows = {
        "image": [{"bytes": one, "path": None} for one in content],
        "prefix": [prefix for prefix, _ in TEXTS],
        "suffix": [0, 1, 1],
        "number": [1, 2, 3],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def parquet(folder: Path) -> Source:
    table_of(folder).to_parquet(folder / "train-0.parquet")
    return {"parquet": folder / "train-0.parquet"}


def parquet_with_paths(folder: Path) -> Source:
    names = images(folder)
    datasets.Dataset.from_dict({"image": names, "question": names, "suffix": names}).to_parquet(folder / "p.parquet")
    return {"parquet": folder / "p.parquet"}


def disk(folder: Path) -> Source:
    datasets.DatasetDict(train=table_of(folder)).save_to_disk(str(folder / "saved"))
    return {"disk": folder / "saved", "split": "train"}


def official(folder: Path) -> Source:
    write_scenes(folder, scenes=3, seed=1, split="train2014")
    return {
        "questions": folder / "v2_OpenEnded_mscoco_train2014_questions.json",
        "annotations": folder / "v2_mscoco_train2014_annotations.json",
        "images": folder / "images",
    }


SOURCES: dict[str, Callable[[Path], Source]] = {
    "jsonl": jsonl,
    "csv": lambda folder: delimited(folder, "csv", ","),
    "tsv": lambda folder: delimited(folder, "tsv", "\t"),
    "messages": chats,
    "folder with metadata": metadata,
    "folder of classes": classes,
    "coco boxes": lambda folder: coco(folder, boxes=True),
    "coco captions": lambda folder: coco(folder, boxes=False),
    "parquet": parquet,
    "parquet with paths": parquet_with_paths,
    "disk": disk,
    "official": official,
}


def content(record: dict[str, Any]) -> dict[str, Any]:
    """A record with what its image holds instead of where it is."""
    image = record["image"]
    held = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return {**record, "image": held, "image_id": None}


def grouped(records: list[dict[str, Any]]) -> list[int]:
    """Which records are about the same image: of each the place of the first one that is about its image."""
    ids = [record["image_id"] for record in records]
    return list(map(ids.index, ids))


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_written_is_read_as_the_same_records(tmp_path: Path, name: str) -> None:
    """Record by record, in the same order; images are those of the same content, grouped alike."""
    (tmp_path / "in").mkdir()
    source = SOURCES[name](tmp_path / "in")
    converted = convert.convert(source, tmp_path / "out/result.jsonl")
    cached = tmp_path / "cache"
    expected = load_records(**source, prompt="answer en {question}", cache_dir=cached).to_list()
    found = load_records(
        jsonl=tmp_path / "out/result.jsonl",
        images=converted.images,
        prompt="answer en {question}",
        cache_dir=cached,
    ).to_list()
    assert converted.count == len(expected) > 1
    assert not converted.skipped
    assert list(map(content, found)) == list(map(content, expected))
    groups = [
        [[one["image_id"] for one in records].index(one["image_id"]) for one in records]
        for records in (found, expected)
    ]
    assert groups[0] == groups[1]
    has_bytes = name in ("parquet", "parquet with paths", "disk")
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert len(written) == (4 if has_bytes else 1)
    if not has_bytes:
        assert [one["image"] for one in found] == [one["image"] for one in expected]


def test_a_data_set_of_the_hub_is_written_with_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table_of(tmp_path).to_parquet(tmp_path / "train.parquet")
    loading = datasets.load_dataset_builder
    monkeypatch.setattr(
        "datasets.load_dataset_builder",
        lambda *_, **__: loading("parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "c")),
    )
    source: Source = {"hub": "mine/captions", "split": "train"}
    convert.convert(source, tmp_path / "out.jsonl")
    expected = load_records(**source, cache_dir=tmp_path / "cache").to_list()
    found = load_records(jsonl=tmp_path / "out.jsonl", cache_dir=tmp_path / "cache").to_list()
    assert list(map(content, found)) == list(map(content, expected))


def test_annotators_answers_stay_what_they_are(tmp_path: Path) -> None:
    """Ten of them, not equally right, with their types; so the official accuracy scores them as before."""
    convert.convert(official(tmp_path), tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert row.keys() == {
        *("id", "image", "question", "suffix", "equally_right", "answer", "answer_type", "question_type")
    }
    assert (row["equally_right"], len(row["suffix"])) == (False, 10)
    (tmp_path / "wrong.jsonl").write_text(json.dumps(row | {"answer_type": 3}))
    with pytest.raises(ValueError, match="expected a text as answer_type, got 3"):
        load_records(jsonl=tmp_path / "wrong.jsonl", images=tmp_path / "images", cache_dir=tmp_path)


def test_rows_that_cannot_be_used_are_listed_and_the_exit_code_says_so(tmp_path: Path) -> None:
    """Through a shell, as a person calls it: a broken line and a missing image."""
    images(tmp_path)
    good = {"image": "a.jpg", "prefix": "x", "suffix": "y"}
    lines(tmp_path / "in.jsonl", [good, good | {"image": "gone.jpg"}, good | {"suffix": None}, good | {"id": 9}])
    command = [
        sys.executable,
        "-m",
        "data.convert",
        str(tmp_path / "in.jsonl"),
        "--to",
        "jsonl",
        str(tmp_path / "o.jsonl"),
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert (
        f"in.jsonl is read as jsonl\n2 examples written; read them with train: {{jsonl: {tmp_path}/o.jsonl}}"
        in ran.stdout
    )
    listed = ran.stderr.splitlines()
    assert any(line.startswith(f"  2: image {tmp_path}/gone.jpg does not exist") for line in listed)
    assert any(line.startswith(f"  {tmp_path}/in.jsonl, line 3: expected texts or whole numbers") for line in listed)
    assert listed[-1] == "2 rows cannot be used and were skipped"
    assert [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == ["1", "9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.png", "in.jsonl", "o.jsonl", "sub"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (again.returncode, "exists already: give another path" in again.stderr) == (2, True)


def test_where_nothing_can_be_used_nothing_is_written(tmp_path: Path) -> None:
    lines(tmp_path / "in.jsonl", [{"image": "gone.jpg", "prefix": "x", "suffix": "y"}])
    with pytest.raises(ValueError, match=r"(?s)1: image .*gone\.jpg does not exist"):
        convert.convert({"jsonl": tmp_path / "in.jsonl"}, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(ValueError, match="give their annotations too"):
        convert.convert({**official(tmp_path), "annotations": None}, tmp_path / "out.jsonl")


def test_a_further_column_that_would_be_taken_for_another_is_named(tmp_path: Path) -> None:
    images(tmp_path)
    row = {"image": "a.jpg", "prefix": "x", "label": "y", "suffix": "z"}
    source = {"jsonl": lines(tmp_path / "in.jsonl", [row]), "columns": {"suffix": "label"}}
    with pytest.raises(ValueError, match=r"example 1: beside what --columns names it has suffix, .*rename"):
        convert.convert(source, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, {"official": None}.get(name, name.partition(" ")[0])) for name in SOURCES if name not in ("csv", "tsv")],
)
def test_the_kind_is_told_by_what_a_file_holds(
    tmp_path: Path, name: str, key: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SOURCES[name](tmp_path)
    given = convert.parse([str(source.get(key or "questions")), str(tmp_path / "out.jsonl")])
    if key is None:
        with pytest.raises(ValueError, match="one of the official VQA files: give --questions, --annotations"):
            convert.source_of(given)
        return
    assert convert.source_of(given) == {key: source[key]}
    assert f"is read as {key}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "key"),
    [
        ("a.csv", "file,query\n", "csv"),
        ("a.tsv", "file\tquery\n", "tsv"),
        ("a.txt", "image,suffix\n", "csv"),
        ("a.jsonl", '{"image": "a", "text": "b"}', "jsonl"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "image": "c"}', "messages"),
        ("a.txt", "hello\n", r"it cannot be told what .*a\.txt is: name its kind, such as --csv"),
        ("a.json", "[{}]", "one JSON list"),
        ("a.zip", "PK\x03\x04", "a zip archive"),
    ],
)
def test_the_kind_of_other_files(tmp_path: Path, file: str, content: str, key: str) -> None:
    (tmp_path / file).write_text(content)
    given = convert.parse([str(tmp_path / file), "out.jsonl"])
    if len(key) < 9:
        assert convert.source_of(given) == {key: tmp_path / file}
    else:
        with pytest.raises(ValueError, match=key):
            convert.source_of(given)


def test_options_are_the_keys_of_a_source(tmp_path: Path) -> None:
    given = convert.parse(
        ["--csv", "a.csv", "--columns", "question=query,suffix=label", "--images", "d", "--to", "jsonl", "out.jsonl"]
    )
    columns = {"question": "query", "suffix": "label"}
    assert convert.source_of(given) == {"csv": Path("a.csv"), "images": Path("d"), "columns": columns}
    assert given.output == Path("out.jsonl")
    wrong = {"none": ["o"], "a, --csv": ["a", "o", "--csv", "c"], "--csv, --tsv": ["--csv", "a", "--tsv", "b", "o"]}
    for got, argv in wrong.items():
        with pytest.raises(ValueError, match=f"expected one source, .* got {got}$"):
            convert.source_of(convert.parse(argv))
    with pytest.raises(SystemExit):
        convert.parse(["a", "b", "--columns", "asked=query"])
