"""Examples in files of `datasets`: Parquet, a folder of save_to_disk, a data set on the Hub. Their images are bytes."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.image_check
from data.invalid import SkippedRecords
from data.records import FEATURES, ImagesById, decodable, load_records
from data.sources import hub, source_contents
from data.synthetic import scenes
from finetune.config.load import ConfigError, dump_config, load_config
from tests.images import IMAGE, encoded

COMMIT, LATER = "1" * 40, "2" * 40
TRUNCATED = encoded(Image.effect_noise((64, 64), 60), "JPEG")[:-400]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """Captions of three scenes, as a person's own data set with images."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, scenes=3, seed=1, split="train2014")
    lines = [json.loads(line) for line in (folder / "captions_train2014.jsonl").read_text().splitlines()]
    rows = [line | {"image": {"bytes": (folder / line["image"]).read_bytes(), "path": "x.jpg"}} for line in lines]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def contents(dataset: datasets.Dataset) -> list[bytes]:
    """The encoded images of a data set."""
    return [image["bytes"] for image in dataset.cast_column("image", datasets.Image(decode=False))["image"]]


def of_rows(*rows: dict[str, Any], **features: Any) -> datasets.Dataset:
    """A data set of rows, whose images are bytes."""
    given = [{"image": {"bytes": IMAGE, "path": None}, "prefix": "caption en", "suffix": "x"} | row for row in rows]
    dataset = datasets.Dataset.from_list(given)
    for column, feature in ({"image": datasets.Image(decode=False)} | features).items():
        dataset = dataset.cast_column(column, feature)
    return dataset


def same_as(records: datasets.Dataset, captions: datasets.Dataset) -> None:
    """The records say what the data set says, and hold its images byte by byte."""
    assert records.features == FEATURES
    assert [record["image"] for record in records] == [{"bytes": one, "path": None} for one in contents(captions)]
    assert records["prefix"][:] == captions["prefix"][:]
    assert records["answers"][:] == [[suffix] for suffix in captions["suffix"]]
    assert len(set(records["image_id"])) == 3
    assert records["id"][:] == [str(number + 1) for number in range(len(captions))]


# Parquet


def test_rows_of_parquet_hold_their_images(captions: datasets.Dataset, tmp_path: Path) -> None:
    captions.to_parquet(tmp_path / "train.parquet")
    records = load_records(parquet=tmp_path / "train.parquet", cache_dir=tmp_path / "cache")
    same_as(records, captions)
    assert decodable(records, cache_dir=tmp_path / "cache") is records


@pytest.mark.parametrize("given", ["", "*.parquet", "train-*"])
def test_a_folder_or_a_pattern_stands_for_its_files_in_order(
    captions: datasets.Dataset, tmp_path: Path, given: str
) -> None:
    half = len(captions) // 2
    captions.select(range(half, len(captions))).to_parquet(tmp_path / "train-1.parquet")
    captions.select(range(half)).to_parquet(tmp_path / "train-0.parquet")
    (tmp_path / "README.md").write_text("not mine")
    same_as(load_records(parquet=tmp_path / given, cache_dir=tmp_path / "cache"), captions)


def test_images_may_be_bare_bytes_or_paths_and_columns_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    table = {"picture": ["a.png"], "query": ["what?"], "label": ["red"]}
    columns = {"image": "picture", "question": "query", "suffix": "label"}
    for image in ("a.png", IMAGE):
        pq.write_table(pa.table(table | {"picture": [image]}), tmp_path / "one.parquet")
        (record,) = load_records(parquet=tmp_path / "one.parquet", columns=columns, cache_dir=tmp_path / "cache")
        stored = {"bytes": IMAGE, "path": None} if image == IMAGE else {"bytes": None, "path": str(tmp_path / "a.png")}
        assert (record["image"], record["prefix"], record["answers"]) == (stored, "answer en what?", ["red"])


def test_a_class_is_learned_by_its_name(tmp_path: Path) -> None:
    """Not by the number that the file holds."""
    one = datasets.ClassLabel(names=["cat", "dog"])
    of_rows({"suffix": 1}, {"suffix": 0}, suffix=one).to_parquet(tmp_path / "one.parquet")
    of_rows({"suffix": [1, 0]}, suffix=datasets.List(one)).to_parquet(tmp_path / "list.parquet")
    cache = tmp_path / "cache"
    assert load_records(parquet=tmp_path / "one.parquet", cache_dir=cache)["answers"][:] == [["dog"], ["cat"]]
    assert load_records(parquet=tmp_path / "list.parquet", cache_dir=cache)["answers"][:] == [["dog", "cat"]]


def test_what_else_a_row_has_is_kept_without_its_bytes(tmp_path: Path) -> None:
    of_rows({"source": "web", "mask": {"bytes": IMAGE, "path": "m.png"}}).to_parquet(tmp_path / "one.parquet")
    (record,) = load_records(parquet=tmp_path / "one.parquet", cache_dir=tmp_path)
    said = f"({len(IMAGE)} bytes)"
    assert json.loads(record["extra"]) == {"source": "web", "mask": {"bytes": said, "path": "m.png"}}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": {"bytes": None, "path": None}}, "row 2: expected a path as image, got None"),
        ({"image": {"bytes": None, "path": "/etc/passwd"}}, "row 2: image '/etc/passwd' is an absolute path"),
        ({"suffix": None}, r"row 2: expected texts .* got \{'image': '\(\d+ bytes\)', 'prefix': 'caption en'"),
        ({"image": {"bytes": b"", "path": None}}, r"\n  2: image of 0 bytes cannot be used"),
    ],
)
def test_a_row_that_is_no_example_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    of_rows({}, row).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=said):
        load_records(parquet=tmp_path / "train.parquet", cache_dir=tmp_path)


def test_files_that_are_no_parquet_are_refused(tmp_path: Path) -> None:
    def refused(name: str, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            load_records(parquet=tmp_path / name, cache_dir=tmp_path)

    (tmp_path / "lines.jsonl").write_text("{}")
    refused("gone.parquet", r"gone\.parquet does not exist; correct its path")
    refused("lines.jsonl", r"lines\.jsonl is not a Parquet file, or not a whole one")
    refused("", r"the folder .* has no file \*\.parquet; give one that has some, or a pattern such as")
    refused("train-*.parquet", r"no file matches .*train-\*\.parquet; correct the pattern")
    of_rows({}).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    refused("a.parquet", r"a\.parquet cannot be read: .*; copy or write it again")


def test_bytes_that_are_no_image_are_skipped_up_to_a_share(tmp_path: Path) -> None:
    """As files are: by the header when records are loaded, the rest when all are decoded."""
    images = [IMAGE, b"nothing", TRUNCATED, b"nothing", encoded(Image.new("RGB", (5, 5), "blue"))]
    of_rows(*({"image": {"bytes": one, "path": None}} for one in images)).to_parquet(tmp_path / "train.parquet")
    source: dict[str, Any] = {"parquet": tmp_path / "train.parquet", "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match=r"2 of 5 records cannot be used(.|\n)*2: image of 7 bytes(.|\n)*4: image of"):
        load_records(**source)
    skipped = SkippedRecords(share=0.9)
    records = load_records(**source, skipped=skipped)
    assert list(skipped.reasons) == ["2", "4"]
    assert decodable(records, skipped, tmp_path / "cache")["id"][:] == ["1", "5"]
    assert decodable(records.select([4, 2]), skipped, tmp_path / "cache")["id"][:] == ["5"]
    assert list(skipped.reasons) == ["2", "4", "3"]


def test_bytes_are_looked_at_once(captions: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions.to_parquet(tmp_path / "train.parquet")
    opened: list[str] = []

    def watch(name: str) -> None:
        plain = getattr(data.image_check, name)

        def look(content: bytes) -> None:
            opened.append(name)
            plain(content)

        monkeypatch.setattr(data.image_check, name, look)

    watch("check_header")
    watch("open_image")
    for _ in range(2):
        records = load_records(parquet=tmp_path / "train.parquet", cache_dir=tmp_path / "cache")
        decodable(records, cache_dir=tmp_path / "cache")
    assert opened == ["check_header"] * 3 + ["open_image"] * 3


def test_images_are_found_by_their_id(captions: datasets.Dataset, tmp_path: Path) -> None:
    captions.to_parquet(tmp_path / "train.parquet")
    records = load_records(parquet=tmp_path / "train.parquet", cache_dir=tmp_path / "cache")
    images = ImagesById(records)
    assert dict(images) == {record["image_id"]: record["image"] for record in records}
    assert ("elsewhere" in images, len(images)) == (False, 3)


# A folder of save_to_disk


def test_a_saved_data_set_and_one_of_its_splits(captions: datasets.Dataset, tmp_path: Path) -> None:
    captions.save_to_disk(tmp_path / "one")
    same_as(load_records(disk=tmp_path / "one", cache_dir=tmp_path / "cache"), captions)
    both = datasets.DatasetDict(train=captions, validation=captions.select(range(2)))
    both.save_to_disk(tmp_path / "two")
    same_as(load_records(disk=tmp_path / "two", split="train", cache_dir=tmp_path / "cache"), captions)
    assert len(load_records(disk=tmp_path / "two", split="validation", cache_dir=tmp_path / "cache")) == 2
    datasets.DatasetDict(train=captions).save_to_disk(tmp_path / "single")
    same_as(load_records(disk=tmp_path / "single", cache_dir=tmp_path / "cache"), captions)


def test_folders_that_save_to_disk_did_not_write_are_refused(tmp_path: Path) -> None:
    def refused(name: str, said: str, **more: str) -> None:
        with pytest.raises(ValueError, match=said):
            load_records(disk=tmp_path / name, cache_dir=tmp_path, **more)  # type: ignore[arg-type]

    of_rows({}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=of_rows({}), test=of_rows({})).save_to_disk(tmp_path / "two")
    refused("gone", "gone does not exist; expected the folder that save_to_disk wrote")
    refused("", r"has no state\.json; expected a folder that save_to_disk wrote")
    refused("two", r"two has the splits train, test, and none was named: give one with split")
    refused("two", r"two has the splits train, test, and there is no split 'val': give one", split="val")
    refused("one", r"split is 'train', and .*one is one data set without splits: leave split out", split="train")
    (tmp_path / "one/state.json").write_text("{}")
    refused("one", r"one cannot be opened: .*; save the data set again")
    (tmp_path / "one/state.json").write_text("{")
    refused("one", r"state\.json cannot be read: .*; save the data set again")


def test_rows_that_name_an_image_need_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    rows = [{"image": "a.png", "prefix": "caption en", "suffix": "x"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"image 'a\.png' is a path, and there is no folder .*; give images"):
        load_records(disk=tmp_path / "saved", cache_dir=tmp_path)
    (record,) = load_records(disk=tmp_path / "saved", images=tmp_path, cache_dir=tmp_path)
    assert record["image"] == {"bytes": None, "path": str(tmp_path / "a.png")}


# The Hub


@pytest.fixture
def on_the_hub(captions: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two data sets "on the Hub", made of Parquet files here; what was asked for."""
    asked: list[Any] = []
    folders = {"mine/captions": tmp_path / "hub" / "captions", "mine/single": tmp_path / "hub" / "single"}
    for folder in folders.values():
        folder.mkdir(parents=True)
        captions.to_parquet(folder / "train-0.parquet")
    captions.select(range(2)).to_parquet(folders["mine/captions"] / "test-0.parquet")

    def load(id: str, name: str | None = None, revision: str | None = None) -> datasets.DatasetBuilder:
        asked.append((id, name, revision))
        files = {split: f"{folders[id]}/{split}-*" for split in ("train", "test") if [*folders[id].glob(f"{split}-*")]}
        builder = loading("parquet", data_files=files, cache_dir=str(tmp_path / "cache_of_datasets"))
        builder.hash = COMMIT
        return builder

    loading = datasets.load_dataset_builder
    monkeypatch.setattr("datasets.load_dataset_builder", load)
    return asked


def test_a_data_set_of_the_hub_is_read(on_the_hub: list[Any], captions: datasets.Dataset, tmp_path: Path) -> None:
    one: dict[str, Any] = {"hub": "mine/captions", "cache_dir": tmp_path / "cache"}
    same_as(load_records(**one, split="train", subset="en", revision="v1"), captions)
    assert on_the_hub == [("mine/captions", "en", "v1")]
    assert len(load_records(**one, split="test")) == 2
    same_as(load_records(hub="mine/single", cache_dir=tmp_path / "cache"), captions)
    with pytest.raises(
        ValueError, match=r"mine/captions has the splits train, test, and none was named: give one with"
    ):
        load_records(**one)
    with pytest.raises(ValueError, match=rf"needed at commit {LATER}.* the cache holds commit {COMMIT}"):
        load_records(**one, split="train", revision=LATER)
    assert hub.commit_of("mine/captions", None, None) == COMMIT
    assert hub.commit_of("mine/captions", None, LATER) == LATER


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "give revision: refs/convert/parquet",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "a/b cannot be reached .*: try again with a connection"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset"), "accept its terms on the Hub"),
        (
            ValueError("Config name is missing. Pick one of: ['en']"),
            r"(?s)a/b cannot be loaded: .*\['en'\]; name one of them with subset",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_at_the_hub_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    with pytest.raises(ValueError, match=said):
        load_records(hub="a/b", cache_dir=tmp_path)


def test_without_a_network_the_hub_is_not_reached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        load_records(hub="nobody/nothing", cache_dir=tmp_path)
    with pytest.raises(
        ValueError, match="which is a path here; read a file or folder of your own with parquet or disk"
    ):
        load_records(hub=str(tmp_path), cache_dir=tmp_path)


def test_images_that_were_downloaded_as_files_become_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in the caches; what else a data set may name stays closed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for folder in ("datasets", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(IMAGE)
    inside, outside = ({"bytes": None, "path": f"{tmp_path}/{folder}/a.png"} for folder in ("datasets", "elsewhere"))
    (tmp_path / "datasets" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    link = {"bytes": None, "path": f"{tmp_path}/datasets/link.png"}
    assert hub.with_bytes(inside) == inside | {"bytes": IMAGE}
    assert [hub.with_bytes(one) for one in (outside, link, None)] == [outside, link, None]


# All of them


def test_the_files_of_a_source(captions: datasets.Dataset, tmp_path: Path) -> None:
    for name in ("b", "a"):
        captions.to_parquet(tmp_path / f"{name}.parquet")
    captions.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"of a map, not of the data set")
    assert source_contents({"parquet": str(tmp_path)}) == {
        "parquet": ([tmp_path / "a.parquet", tmp_path / "b.parquet"], "")
    }
    names = sorted(file.name for file in source_contents({"disk": str(tmp_path / "saved")})["disk"][0])
    assert names == ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]
    assert source_contents({"hub": "a/b", "jsonl": None}) == {}
    assert source_contents({"parquet": str(tmp_path / "gone")}) == {}
    questions = tmp_path / "q.json"
    questions.write_text("{}")
    official = {"questions": str(questions), "annotations": str(tmp_path / "gone"), "images": str(tmp_path)}
    assert source_contents(official) == {"questions": ([questions], "")}


MINIMAL = "model: {path: p}\ndata: {train: {jsonl: f}}\ntrain: {epochs: 3}\noutput: o\n"


@pytest.mark.parametrize(
    "source",
    [
        "{parquet: 'data/train-*.parquet', columns: {suffix: label}}",
        "{disk: saved, split: train}",
        "{hub: owner/name, split: train, subset: en, revision: v1, count: 5}",
    ],
)
def test_a_configuration_names_them(tmp_path: Path, source: str) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    config = load_config(tmp_path / "mine.yaml", [f"data.train={source}"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.data.title("train") in ("train-*.parquet", "saved", "owner/name")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "{parquet: a, disk: b}",
            "data.train.disk: expected either questions, .* or one of jsonl.* parquet, disk.* hub",
        ),
        ("{parquet: a, split: train}", "data.train.split: it is for the official files, disk, hub, not for parquet"),
        ("{disk: a, revision: v1}", r"data.train.revision: it is for a data set on the Hub \(hub\), not for disk"),
        ("{jsonl: a, subset: en}", r"data.train.subset: it is for a data set on the Hub \(hub\), not for jsonl"),
        ("{hub: 'https://huggingface.co/datasets/a/b'}", "data.train.hub: got .*; expected text matching"),
        ("{hub: ./mine}", r'data.train.hub: got "\./mine"; expected text matching'),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "mine.yaml", [f"data.train={source}"])
