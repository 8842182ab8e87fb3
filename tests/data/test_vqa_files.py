"""The official files become records: the same content, any order, bounded memory, clear errors for what is wrong."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data.records import FEATURES, choose, load_records, majority
from data.sources.vqa_files import CHUNK
from tests.images import IMAGE

Files = dict[str, Any]
QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def make(images: int = 6, per_image: int = 3) -> Files:
    """Both files' content as the official ones have it, annotations in another order than questions."""
    ids = [(image, image * 1000 + k) for image in range(100, 100 + images) for k in range(per_image)]
    questions = [{"image_id": i, "question": f'Is "{q}" {{é}} [猫], here?', "question_id": q} for i, q in ids]
    annotations = [
        {
            "question_type": "is",
            "multiple_choice_answer": "yes",
            "answers": [
                {"answer": "no" if k < q % 4 else "yes", "answer_confidence": "maybe", "answer_id": k + 1}
                for k in range(10)
            ],
            "image_id": i,
            "answer_type": "yes/no",
            "question_id": q,
        }
        for i, q in ids
    ]
    random.Random(0).shuffle(annotations)
    head = {"info": {"year": 2017, "tags": ["a", "b"]}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    return {
        "questions": {**head, "task_type": "Open-Ended", "questions": questions},
        "annotations": {**head, "annotations": annotations},
    }


def write(folder: Path, files: Files, images: bool = True, **style: Any) -> dict[str, Any]:
    """The files on disk, as arguments for load_records."""
    folder.mkdir(exist_ok=True)
    (folder / QUESTIONS).write_text(json.dumps(files["questions"], **style), encoding="utf-8")
    (folder / ANNOTATIONS).write_text(json.dumps(files["annotations"], **style), encoding="utf-8")
    (folder / "images").mkdir(exist_ok=True)
    for question in files["questions"].get("questions", []) if images else []:
        (folder / "images" / f"COCO_val2014_{int(question['image_id']):012d}.jpg").write_bytes(IMAGE)
    return {
        "questions": folder / QUESTIONS,
        "annotations": folder / ANNOTATIONS,
        "images": folder / "images",
        "cache_dir": folder / "cache",
    }


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_every_column_is_what_the_files_say(tmp_path: Path, style: dict[str, Any]) -> None:
    files = make()
    records = load_records(**write(tmp_path, files, **style))
    annotations = {annotation["question_id"]: annotation for annotation in files["annotations"]["annotations"]}
    assert records.features == FEATURES
    assert len(records) == 18
    for question, record in zip(files["questions"]["questions"], records, strict=True):
        path = tmp_path / "images" / f"COCO_val2014_{question['image_id']:012d}.jpg"
        assert record == {
            "id": str(question["question_id"]),
            "image": {"path": str(path), "bytes": None},
            "image_id": str(question["image_id"]),
            "question": question["question"],
            "prefix": f"answer en {question['question']}",
            "answers": [answer["answer"] for answer in annotations[question["question_id"]]["answers"]],
            "equally_right": False,
            "answer": "yes",
            "rejected": "",
            "answer_type": "yes/no",
            "question_type": "is",
            "extra": "",
        }


def test_objects_longer_than_a_chunk_and_split_characters_are_read(tmp_path: Path) -> None:
    files = make(images=40)
    for k, question in enumerate(files["questions"]["questions"]):
        question["question"] = "猫é𐀀" * (k + 1 if k != 60 else CHUNK)
    records = load_records(**write(tmp_path, files, ensure_ascii=False))
    assert records["question"] == [question["question"] for question in files["questions"]["questions"]]


@pytest.mark.parametrize("chunk", [1, 5, 64, 300, 1000])
@pytest.mark.parametrize("style", [{"indent": 40}, {"ensure_ascii": False}])
def test_it_does_not_matter_where_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, style: dict[str, Any]
) -> None:
    """Within an object, a character or the space before an object, that before the last one included."""
    arguments = write(tmp_path, make(images=2), **style)
    expected = load_records(**{**arguments, "cache_dir": tmp_path / "other"}).to_list()
    monkeypatch.setattr("data.sources.vqa_files.CHUNK", chunk)
    assert load_records(**arguments).to_list() == expected


def test_without_annotations_answers_are_empty(tmp_path: Path) -> None:
    record = load_records(**{**write(tmp_path, make()), "annotations": None})[0]
    assert [record[name] for name in ("answers", "answer", "answer_type", "question_type")] == [[], "", "", ""]


def test_without_images_no_image_needs_to_exist(tmp_path: Path) -> None:
    arguments = write(tmp_path, make(), images=False)
    with pytest.raises(ValueError, match="18 of 18 records cannot be used"):
        load_records(**arguments)
    assert len(load_records(**{**arguments, "images": None})) == 18


def test_what_real_files_have_is_tolerated(tmp_path: Path) -> None:
    """Ids that are texts, fields that are missing, keys that are unknown, annotations of other questions."""
    files, plain = make(), make()
    for annotation in files["annotations"]["annotations"]:
        annotation["question_id"] = str(annotation["question_id"])
        annotation["coco_split"] = {"nested": ["}", "]"]}
        for key in ("question_type", "answer_type", "multiple_choice_answer"):
            del annotation[key]
        for answer in annotation["answers"]:
            del answer["answer_id"], answer["answer_confidence"]
    for question in files["questions"]["questions"]:
        question["image_id"] = str(question["image_id"])
    del files["questions"]["questions"][-1]
    tolerant = load_records(**write(tmp_path / "a", files))
    strict = load_records(**write(tmp_path / "b", plain)).select(range(17))
    for name in ("id", "image_id", "prefix", "answers", "answer"):
        assert tolerant[name] == strict[name]
    assert set(tolerant["answer_type"]) == set(tolerant["question_type"]) == {""}


def test_the_majority_is_the_most_frequent_answer_then_the_first() -> None:
    assert majority(["b", "a", "a", "b", "c"]) == "b"
    assert majority(["c", "a", "a"]) == "a"


def test_the_prompt_is_a_persons_and_one_line(tmp_path: Path) -> None:
    files = make()
    files["questions"]["questions"][0]["question"] = "two\nlines {question}?\n"
    records = load_records(**write(tmp_path, files), prompt="réponds fr {question} !")
    assert records[0]["prefix"] == "réponds fr two lines {question}? !".replace("? !", "?  !")
    assert records[0]["question"] == "two\nlines {question}?\n"
    with pytest.raises(ValueError, match=r"prompt is 'caption en'; expected one with \{question\}"):
        load_records(**write(tmp_path, files), prompt="caption en")


def test_images_may_lie_in_a_folder_of_their_split(tmp_path: Path) -> None:
    arguments = write(tmp_path, make())
    os.rename(tmp_path / "images", tmp_path / "val2014")
    (tmp_path / "images").mkdir()
    os.rename(tmp_path / "val2014", tmp_path / "images" / "val2014")
    record = load_records(**arguments)[0]
    assert record["image"]["path"] == str(tmp_path / "images" / "val2014" / "COCO_val2014_000000000100.jpg")


def test_the_split_is_in_the_file_or_its_name_or_given(tmp_path: Path) -> None:
    files = make()
    del files["questions"]["data_subtype"], files["annotations"]["data_subtype"]
    arguments = write(tmp_path, files)
    assert len(load_records(**arguments)) == 18
    for name in ("questions", "annotations"):
        os.rename(arguments[name], tmp_path / f"{name}.json")
        arguments[name] = tmp_path / f"{name}.json"
    with pytest.raises(
        ValueError, match=r"expected a split such as train2014.* in the data_subtype of .* add data_subtype"
    ):
        load_records(**arguments)
    assert len(load_records(**arguments, split="val2014")) == 18


def test_questions_of_test_dev_ask_about_images_of_test(tmp_path: Path) -> None:
    files = make(images=1)
    files["questions"]["data_subtype"] = "test-dev2015"
    (tmp_path / "q_test-dev2015_.json").write_text(json.dumps(files["questions"]))
    (tmp_path / "COCO_test2015_000000000100.jpg").write_bytes(IMAGE)
    records = load_records(questions=tmp_path / "q_test-dev2015_.json", images=tmp_path, cache_dir=tmp_path)
    assert records[0]["image"]["path"].endswith("COCO_test2015_000000000100.jpg")


def with_named_images(names: Mapping[int, str | None]) -> Files:
    """Files as TextVQA's: images are named by texts, and nothing says of which split they are."""
    files = make(images=len(names))
    for name in ("questions", "annotations"):
        del files[name]["data_subtype"]
        for one in files[name][name]:
            one["image_id"] = names[one["image_id"]]
    return files


NAMES = {100: "003a8ae2ef43b901", 101: "1234567890123456", 102: "a.b-c_d"}


def write_named(folder: Path, files: Files) -> dict[str, Any]:
    arguments = write(folder, files, images=False)
    for name in ("questions", "annotations"):
        arguments[name] = arguments[name].rename(folder / f"TextVQA_{name}.json")
    for name in NAMES.values():
        (folder / "images" / f"{name}.jpg").write_bytes(IMAGE)
    return arguments


def test_images_may_be_named_by_texts(tmp_path: Path) -> None:
    """Also by digits alone, in a file in which others are texts."""
    arguments = write_named(tmp_path, with_named_images(NAMES))
    records, plain = load_records(**arguments), load_records(**write(tmp_path / "plain", make(images=3)))
    assert records["image_id"][:] == [NAMES[int(name)] for name in plain["image_id"]]
    assert records[0]["image"]["path"] == str(tmp_path / "images" / "003a8ae2ef43b901.jpg")
    for column in ("id", "question", "prefix", "answers", "answer", "answer_type", "question_type"):
        assert records[column][:] == plain[column][:]
    drawn = load_records(**arguments, count=3, seed=1)
    assert len(set(drawn["image_id"])) == 1  # a whole image


@pytest.mark.parametrize("name", ["../a", "a/b", ".a", "", None])
def test_an_image_cannot_be_named_by_a_path(tmp_path: Path, name: str | None) -> None:
    arguments = write_named(tmp_path, with_named_images({**NAMES, 101: name}))
    with pytest.raises(ValueError, match=r"questions\.json: expected .*image_id"):
        load_records(**arguments)


def test_annotations_of_another_named_image_are_refused(tmp_path: Path) -> None:
    files = with_named_images(NAMES)
    files["annotations"]["annotations"][0]["image_id"] = "other"
    with pytest.raises(ValueError, match="has another image_id for it"):
        load_records(**write_named(tmp_path, files))


def test_files_may_be_compressed(tmp_path: Path) -> None:
    """By gzip; a broken one is named."""
    arguments = write(tmp_path, make())
    expected = load_records(**arguments).to_list()
    for name in ("questions", "annotations"):
        file = arguments[name].with_name(f"{arguments[name].name}.gz")
        file.write_bytes(gzip.compress(arguments[name].read_bytes()))
        arguments[name] = file
    assert load_records(**arguments).to_list() == expected
    whole = file.read_bytes()
    empty = gzip.compress(b"")
    for broken in (whole[:-20], whole[:40] + b"xxxxxxxx" + whole[48:], empty):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"annotations\.json\.gz cannot be decompressed: .*download it again"):
            load_records(**arguments)


def duplicated(files: Files, name: str) -> None:
    files[name][name].append(files[name][name][3])


def unanswered(files: Files) -> None:
    files["annotations"]["annotations"] = [a for a in files["annotations"]["annotations"] if a["image_id"] > 100]


def set_subtype(files: Files, name: str, split: str) -> None:
    files[name]["data_subtype"] = split


def change(files: Files, name: str, key: str, value: Any) -> None:
    files[name][name][5][key] = value


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda f: duplicated(f, "questions"), r"101000: .*val2014_questions\.json holds 2 objects of question 101000"),
        (lambda f: duplicated(f, "annotations"), r"annotations\.json holds 2 objects of question \d+; expected one"),
        (unanswered, r"3 of 18 records .*\n  100000: .*annotations\.json has no annotation for it; give the two files"),
        (
            lambda f: set_subtype(f, "questions", "train2014"),
            r"one split, found train2014 \(by the data_subtype of .*questions\.json",
        ),
        (lambda f: change(f, "annotations", "image_id", 7), r"has another image_id for it"),
        (lambda f: change(f, "annotations", "answers", []), r"annotations\.json: expected answers like"),
        (lambda f: change(f, "annotations", "answers", ["yes"]), r"annotations\.json: expected answers like"),
        (lambda f: change(f, "annotations", "answers", [{"answer": 3}]), r"annotations\.json: expected answers like"),
        (lambda f: change(f, "annotations", "answers", None), r"annotations\.json: expected answers like"),
        (lambda f: change(f, "annotations", "question_id", "q7"), r"expected a whole number as question_id"),
        (lambda f: change(f, "questions", "image_id", None), r"expected a whole number as image_id"),
        (lambda f: change(f, "questions", "question", 5), r"101002: .*expected a text as question, got 5"),
        (lambda f: change(f, "questions", "question", " "), r"101002: .*expected a text as question"),
        (lambda f: change(f, "questions", "question", "\ud800?"), r"101002'?: its text is no Unicode"),
        (lambda f: change(f, "questions", "question_id", 2**63), r"expected a whole number as question_id"),
        (lambda f: change(f, "questions", "question_id", "9" * 5000), r"expected a whole number as question_id"),
        (lambda f: f["questions"].update(questions=[]), r"questions\.json holds no questions"),
        (lambda f: f.update(questions=f["annotations"]), r'no list "questions"; give the official file of questions'),
        (lambda f: f["questions"].update(questions=[1]), r"expected a whole number as question_id in 1"),
    ],
)
def test_files_that_are_wrong_are_named_with_the_reason(
    tmp_path: Path, corrupt: Callable[[Files], object], message: str
) -> None:
    files = make()
    write(tmp_path, files)  # images
    corrupt(files)
    with pytest.raises(ValueError, match=message):
        load_records(**write(tmp_path, files, images=False))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]  # nothing half written


def test_files_of_two_splits_are_refused(tmp_path: Path) -> None:
    files = make()
    set_subtype(files, "annotations", "train2014")
    arguments = write(tmp_path, files)
    os.rename(arguments["annotations"], tmp_path / "a.json")
    with pytest.raises(
        ValueError,
        match=r"of one split, found val2014 \(.*train2014 \(by the data_subtype of .*a\.json\); give files that belong",
    ):
        load_records(**{**arguments, "annotations": tmp_path / "a.json"})


@pytest.mark.parametrize("kept", [0, 1, 200, 1000])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    arguments = write(tmp_path, make())
    content = arguments["annotations"].read_bytes()[:kept]
    arguments["annotations"].write_bytes(content)
    with pytest.raises(ValueError, match=r"annotations\.json"):
        load_records(**arguments)


def test_text_that_is_no_utf8_and_broken_json_are_refused(tmp_path: Path) -> None:
    arguments = write(tmp_path, make(), ensure_ascii=False)
    good = arguments["questions"].read_bytes()
    for bad in (good.replace("é".encode(), b"\xe9", 1), good.replace(b'"question":', b'"question"', 1)):
        arguments["questions"].write_bytes(bad)
        with pytest.raises(ValueError, match=r"questions\.json is cut off or no JSON at byte \d+"):
            load_records(**arguments)


def test_records_without_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    arguments = write(tmp_path, make())
    for image_id in (101, 102, 103, 105):
        (tmp_path / "images" / f"COCO_val2014_{image_id:012d}.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"12 of 18 records .*\n  101000: image .*COCO_val2014_000000000101\.jpg does not exist"
    ):
        load_records(**arguments)
    with pytest.raises(ValueError, match=r"no_such\.json does not exist"):
        load_records(**{**arguments, "questions": tmp_path / "no_such.json"})


def test_only_chosen_images_need_to_exist(tmp_path: Path) -> None:
    arguments = write(tmp_path, make())
    few = load_records(**arguments, count=3)
    for path in (tmp_path / "images").iterdir():
        if str(path) != few[0]["image"]["path"]:
            path.unlink()
    assert len(load_records(**{**arguments, "cache_dir": tmp_path / "other"}, count=3)) == 3


def test_a_fraction_takes_whole_images_and_is_reproducible(tmp_path: Path) -> None:
    arguments = write(tmp_path, make(images=40, per_image=5))
    everything = load_records(**arguments)
    tenth = load_records(**arguments, fraction=0.1, seed=1)
    assert len(tenth) == 20
    assert sorted(Counter(tenth["image_id"]).values()) == [5, 5, 5, 5]
    assert tenth["id"] == [i for i in everything["id"] if i in set(tenth["id"])]  # in the order of the file
    again = load_records(**{**arguments, "cache_dir": tmp_path / "other"}, fraction=0.1, seed=1)
    assert again["id"] == tenth["id"]
    assert load_records(**arguments, fraction=0.1, seed=2)["id"] != tenth["id"]


def test_a_count_is_exact_and_cuts_only_the_last_image(tmp_path: Path) -> None:
    arguments = write(tmp_path, make(images=40, per_image=5))
    chosen = load_records(**arguments, count=23)
    assert sorted(Counter(chosen["image_id"]).values()) == [3, 5, 5, 5, 5]
    fewer = load_records(**arguments, count=12)
    assert set(fewer["id"]) < set(chosen["id"])  # more questions means more, not others


def test_single_questions_touch_many_more_images(tmp_path: Path) -> None:
    arguments = write(tmp_path, make(images=40, per_image=5))
    spread = load_records(**arguments, fraction=0.1, sample_by="question")
    assert len(spread) == 20
    assert len(set(spread["image_id"])) > 12
    assert len(load_records(**arguments, count=23, sample_by="question")) == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction is 0.0; expected above 0, at most 1"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"count": 0}, "count is 0"),
        ({"count": 19}, "count is 19; there are only 18 examples"),
        ({"count": 3, "fraction": 0.5}, "count is 3, fraction 0.5; expected a count from 1, or a fraction"),
        ({"sample_by": "picture"}, "sample_by is 'picture'"),
    ],
)
def test_impossible_selections_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_records(**write(tmp_path, make()), **options)


def test_a_small_fraction_takes_at_least_one_image() -> None:
    assert len(choose([1, 1, 2, 2, 3, 3], fraction=0.001, count=None, sample_by="image", seed=0)) == 2


def test_a_second_load_reads_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = write(tmp_path, make())
    first = load_records(**arguments, seed=1)
    monkeypatch.setattr("data.sources.vqa_files.ObjectList", lambda *_: pytest.fail("read again"))
    assert load_records(**arguments, seed=1).to_list() == first.to_list()
    assert load_records(**arguments, seed=2).to_list() == first.to_list()  # all questions: nothing is drawn
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_records_are_made_again_when_what_they_depend_on_changes(tmp_path: Path) -> None:
    arguments = write(tmp_path, make())
    first = load_records(**arguments)
    assert load_records(**arguments, prompt="{question}")[0]["prefix"] != first[0]["prefix"]
    assert load_records(**{**arguments, "annotations": None})[0]["answers"] == []
    assert len(load_records(**arguments, count=4)) == 4
    files = make()
    files["annotations"]["annotations"][0]["answer_type"] = "other"
    content = json.dumps(files["annotations"])
    arguments["annotations"].write_text(content)
    os.utime(arguments["annotations"], ns=(1, 1))
    assert set(load_records(**arguments)["answer_type"]) == {"yes/no", "other"}


MEASURE = """
import sys, tracemalloc
import pyarrow
from data.records import load_records
names = "questions", "annotations", "images", "cache_dir"
small, large = (dict(zip(names, given, strict=True)) for given in (sys.argv[1:5], sys.argv[5:]))
load_records(**small)  # what the first use imports is not what is measured
allocated = pyarrow.total_allocated_bytes()
tracemalloc.start()
records = load_records(**large)
print(len(records), tracemalloc.get_traced_memory()[1], pyarrow.total_allocated_bytes() - allocated)
print(records.cache_files[0]["filename"])
"""


def test_memory_is_bounded_and_the_result_is_mapped(tmp_path: Path) -> None:
    """8,000 questions, 7 MB of JSON, 30 MB as objects; in a process of its own, where nothing else allocates."""
    arguments = write(tmp_path, make(images=1600, per_image=5), images=False)
    for image_id in range(100, 1700):
        (tmp_path / "images" / f"COCO_val2014_{image_id:012d}.jpg").write_bytes(IMAGE)
    assert sum(os.path.getsize(arguments[name]) for name in ("questions", "annotations")) > 7_000_000
    small = write(tmp_path / "small", make())
    command = [sys.executable, "-c", MEASURE, *map(str, [*small.values(), *arguments.values()])]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    figures, file = ran.stdout.splitlines()
    count, peak, arrow = map(int, figures.split())
    assert count == 8_000
    assert peak < 2_500_000
    assert arrow < 1_000_000
    assert os.path.getsize(file) > 2_000_000


def test_the_folder_of_a_split_may_be_a_link(tmp_path: Path) -> None:
    arguments = write(tmp_path, make())
    (tmp_path / "images").rename(tmp_path / "coco")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val2014").symlink_to(tmp_path / "coco")
    assert len(load_records(**arguments)) == 18
