"""The generated question set: reproducible, true to its scenes, balanced, and in VQAv2's own files."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from data.synthetic import hard_scenes, scenes
from data.synthetic.figures import Figure, outline
from data.synthetic.scenes import Question, Scene
from data.synthetic.scenes import write as write_scenes

SCENES = 400


def scene_of(index: int, split: str = "train2014", seed: int = 1) -> Scene:
    return scenes.make_scene(scenes.rng_of(split, seed, index, "scene"))


def questions_of(index: int) -> list[Question]:
    return scenes.make_questions(scene_of(index), scenes.rng_of("train2014", 1, index, "questions"))


def true_answer(scene: Scene, question: str) -> str:
    """The answer worked out from the words of the question alone, apart from the code that asked it."""
    words = re.findall("[a-z]+", question)
    singular = {f"{shape}s": shape for shape in scenes.SHAPES}
    named = {singular.get(word, word) for word in words}
    colors, kinds = named & set(scenes.COLORS), named & set(scenes.SHAPES)
    meant = [f for f in scene if (not colors or f.color in colors) and (not kinds or f.shape in kinds)]
    if words[0] == "is":
        return "yes" if meant else "no"
    if words[0] == "how":
        return str(len(meant))
    assert len(meant) == 1, f"{question!r} is about {meant}"
    return meant[0].color if words[1] == "color" else meant[0].shape


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, written through the command line."""
    output = tmp_path_factory.mktemp("shapes")
    scenes.main(["--output", str(output), "--scenes", "12", "--seed", "7", "--split", "val2014"])
    return output


def test_every_answer_is_true_to_its_scene() -> None:
    for index in range(SCENES):
        for question in questions_of(index):
            assert question.answer == true_answer(scene_of(index), question.text), (index, question)


def captions_of(index: int, split: str = "train2014", seed: int = 1) -> list[tuple[str, str]]:
    return scenes.make_captions(scene_of(index, split, seed), scenes.rng_of(split, seed, index, "captions"))


def test_captions_tell_what_their_prefix_asks_for() -> None:
    """Worked out from the words of prefix and caption alone, apart from the code that wrote them."""
    absent = 0
    for index in range(SCENES):
        scene = scene_of(index)
        for prefix, caption in captions_of(index):
            colors, kinds = (set(prefix.split()) & set(names) for names in (scenes.COLORS, scenes.SHAPES))
            meant = [f for f in scene if (not colors or f.color in colors) and (not kinds or f.shape in kinds)]
            assert scenes.NUMBERS.index(caption.split()[0]) == len(meant), (prefix, caption, scene)
            absent += not meant
            if ":" in caption:
                told = sorted(re.split(", | and ", caption.split(": ")[1]))
                expected = [" ".join([f.color] * (not colors) + [f.shape] * (not kinds)) for f in meant]
                assert told == sorted(expected), (prefix, caption, scene)
    assert 0.2 < absent / sum(len(captions_of(index)) for index in range(SCENES)) < 0.5


def test_figures_neither_overlap_nor_leave_the_image() -> None:
    for index in range(SCENES):
        boxes = []
        for figure in scene_of(index):
            xs, ys = zip(*outline(figure), strict=True)
            boxes.append((min(xs), min(ys), max(xs), max(ys)))
            assert min(boxes[-1]) >= 0
            assert max(boxes[-1]) <= scenes.CANVAS
        for a, b in combinations(boxes, 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1], (index, a, b)


def test_images_show_each_figure_in_its_color() -> None:
    for index in range(20):
        scene = scene_of(index)
        image = scenes.render(scene, scenes.rng_of("train2014", 1, index, "picture"), scenes.CANVAS)
        for figure in scene:
            pixel = image.getpixel((round(figure.x), round(figure.y)))
            assert isinstance(pixel, tuple)
            assert max(abs(a - b) for a, b in zip(pixel, figure.rgb, strict=True)) < 25
        corner = image.getpixel((scenes.CANVAS // 3, 0))
        assert isinstance(corner, tuple)
        assert min(corner) > 180


def test_answers_are_balanced() -> None:
    """No answer is so frequent that a blind guess would come near the bar; every template and every answer occurs."""
    questions = [question for index in range(SCENES) for question in questions_of(index)]
    share = Counter(question.answer_type for question in questions)
    assert min(share.values()) / len(questions) > 0.2, share
    for answer_type in ("yes/no", "number", "other"):
        answers = Counter(q.answer for q in questions if q.answer_type == answer_type)
        assert max(answers.values()) / sum(answers.values()) < 0.58, answers
    assert {q.answer for q in questions} == set(scenes.ALTERNATIVES)
    existence = Counter(q.answer for q in questions if q.answer_type == "yes/no")
    assert abs(existence["yes"] - existence["no"]) < 0.1 * existence.total(), existence


def test_the_majority_of_ten_answers_is_the_true_one_and_scores_fully() -> None:
    disagreeing = 0
    for index in range(SCENES):
        for answer in scenes.ALTERNATIVES:
            answers = scenes.make_answers(answer, scenes.rng_of("train2014", 1, index, answer))
            assert len(answers) == 10
            # Leave-one-out leaves at least six matches where three are enough.
            assert answers.count(answer) >= 7
            disagreeing += answers.count(answer) < 10
    assert 0.3 < disagreeing / (SCENES * len(scenes.ALTERNATIVES)) < 0.7


def test_more_annotators_differ_where_that_is_asked_for(written: Path, tmp_path: Path) -> None:
    """None to six of the ten, each as often; images and questions are the same ones."""
    for output, dissent in ((tmp_path / "six", 6), (tmp_path / "all", 10)):
        write_scenes(output, scenes=60, seed=7, split="val2014", dissent=dissent)
        annotations = json.loads((output / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
        differ = Counter(
            sum(given["answer"] != row["multiple_choice_answer"] for given in row["answers"]) for row in annotations
        )
        assert set(differ) == set(range(dissent + 1))
        assert max(differ.values()) < 2.5 * min(differ.values())
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    fewer, more = (json.loads((path / name).read_text())["questions"] for path in (written, tmp_path / "six"))
    asked = [question["question"] for question in more if question["image_id"] == fewer[0]["image_id"]]
    assert asked == [question["question"] for question in fewer if question["image_id"] == fewer[0]["image_id"]]
    with pytest.raises(ValueError, match="dissent=11: a question has 10 annotators; give 0 to 10"):
        write_scenes(tmp_path / "none", scenes=1, seed=7, split="val2014", dissent=11)


def test_same_command_same_bytes(written: Path, tmp_path: Path) -> None:
    """Run in another process, whose string hashes differ."""
    command = ["--output", ".", "--scenes", "12", "--seed", "7", "--split", "val2014"]
    root = Path(scenes.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "data.synthetic.scenes", *command],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
    )
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) == 12 + 3
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in files:
        assert (written / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_a_larger_set_begins_with_the_smaller(written: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, scenes=3, seed=7, split="val2014")
    for image in (tmp_path / "images").iterdir():
        assert image.read_bytes() == (written / "images" / image.name).read_bytes()
    few, many = (json.loads((d / "v2_mscoco_val2014_annotations.json").read_text()) for d in (tmp_path, written))
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]


def test_other_seeds_and_other_splits_hold_other_scenes() -> None:
    sets = [
        {scene_of(index, split, seed) for index in range(SCENES)}
        for split, seed in (("train2014", 1), ("train2014", 2), ("val2014", 1))
    ]
    assert [len(scenes) for scenes in sets] == [SCENES] * 3
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]


def test_image_ids_of_other_seeds_differ(written: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, scenes=12, seed=8, split="val2014")
    names = [{path.name for path in (directory / "images").iterdir()} for directory in (written, tmp_path)]
    assert not names[0] & names[1]


def test_files_have_the_official_keys(written: Path) -> None:
    head = {"info", "license", "data_type", "data_subtype"}
    task = json.loads((written / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    truth = json.loads((written / "v2_mscoco_val2014_annotations.json").read_text())
    assert set(task) == head | {"task_type", "questions"}
    assert set(truth) == head | {"annotations"}
    assert (task["data_type"], task["data_subtype"], task["task_type"]) == ("mscoco", "val2014", "Open-Ended")
    assert len(task["questions"]) == len(truth["annotations"]) > 40
    for asked, answered in zip(task["questions"], truth["annotations"], strict=True):
        assert set(asked) == {"image_id", "question", "question_id"}
        assert asked["question_id"] // 1000 == asked["image_id"]
        assert {key: answered[key] for key in ("image_id", "question_id")} == {
            key: asked[key] for key in ("image_id", "question_id")
        }
        assert set(answered) == {
            "image_id",
            "question_id",
            "question_type",
            "answer_type",
            "multiple_choice_answer",
            "answers",
        }
        assert asked["question"].startswith(answered["question_type"])
        assert answered["answer_type"] in {"yes/no", "number", "other"}
        assert [answer["answer_id"] for answer in answered["answers"]] == list(range(1, 11))
        assert all(set(answer) == {"answer_id", "answer", "answer_confidence"} for answer in answered["answers"])
        spoken = Counter(answer["answer"] for answer in answered["answers"])
        assert spoken.most_common(1)[0][0] == answered["multiple_choice_answer"]
    question_ids = [asked["question_id"] for asked in task["questions"]]
    assert len(set(question_ids)) == len(question_ids)


def test_every_question_has_its_image(written: Path) -> None:
    task = json.loads((written / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    for asked in task["questions"]:
        with Image.open(written / "images" / f"COCO_val2014_{asked['image_id']:012d}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (scenes.CANVAS, scenes.CANVAS))


def test_captions_are_image_prefix_suffix_lines(written: Path) -> None:
    lines = [json.loads(line) for line in (written / "captions_val2014.jsonl").read_text().splitlines()]
    assert {path.name for path in (written / "images").iterdir()} == {Path(line["image"]).name for line in lines}
    for line in lines:
        assert set(line) == {"image", "prefix", "suffix"}
        assert (written / line["image"]).is_file()
        index = int(Path(line["image"]).stem.rsplit("_", 1)[1]) % scenes.ID_SPAN - 1
        assert (line["prefix"], line["suffix"]) in captions_of(index, "val2014", 7)


@pytest.mark.parametrize(("scenes", "seed"), [(0, 1), (1_000_000, 1), (5, -1), (5, 1_000_000)])
def test_numbers_out_of_range_are_refused(tmp_path: Path, scenes: int, seed: int) -> None:
    with pytest.raises(ValueError, match=f"scenes={scenes}, seed={seed}"):
        write_scenes(tmp_path, scenes=scenes, seed=seed, split="train2014")


def test_the_easy_level_stays_as_it_is(written: Path) -> None:
    """The quickstart's scenes, the tiny base's, and figures measured with them: bit for bit what they have always been.
    Of images the pixels before they are compressed, which depends on the JPEG library.
    """
    texts, pixels = hashlib.sha256(), hashlib.sha256()
    for path in sorted(written.glob("*.json*")):
        texts.update(path.read_bytes())
    for index in range(12):
        rng = scenes.rng_of("val2014", 7, index, "picture")
        pixels.update(scenes.render(scene_of(index, "val2014", 7), rng, scenes.CANVAS).tobytes())
    assert texts.hexdigest() == "9909d8c2b6000b2c56da4389db9832e2636ea6a923dfceeaf35623a7e61d7380"
    assert pixels.hexdigest() == "0cfca05872e8bb51cda43cfab7ae7ffe9ce5d60053c05399c0791f61023a2b67"


# The hard level.


def hard_scene_of(index: int, split: str = "train2014", seed: int = 1) -> Scene:
    return hard_scenes.make_scene(scenes.rng_of(split, seed, index, "scene"))


def hard_questions_of(index: int) -> list[Question]:
    return hard_scenes.make_questions(hard_scene_of(index), scenes.rng_of("train2014", 1, index, "questions"))


def described(scene: Scene, words: str) -> list[Figure]:
    """The figures that some words fit, by radius and by pixels alone."""
    named = words.replace("shapes", "shape").removesuffix("s").split()
    for place, key in (
        ("leftmost", lambda f: f.x // 28),
        ("rightmost", lambda f: -(f.x // 28)),
        ("highest", lambda f: f.y // 28),
        ("lowest", lambda f: -(f.y // 28)),
    ):
        if place in named:
            least = min(key(f) for f in scene)
            scene = tuple(f for f in scene if key(f) == least)
    found = [f for f in scene if all(word in (f.shape, f.color) for word in named if word in NAMES)]
    return [f for f in found if ("small" not in named or f.radius < 7) and ("large" not in named or f.radius > 7)]


NAMES = {*scenes.COLORS, *scenes.SHAPES}
INSIDE = {  # pixels of an image of 168
    "top half": lambda f: f.y < 84,
    "bottom half": lambda f: f.y > 84,
    "left half": lambda f: f.x < 84,
    "right half": lambda f: f.x > 84,
    "top row": lambda f: f.y < 28,
    "bottom row": lambda f: f.y > 140,
}
HOLDS = {
    "left of": lambda a, b: a.x < b.x,
    "right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}


def hard_answer(scene: Scene, question: str) -> str:
    """The answer worked out from the words of the question and the figures, apart from the code that asked it."""
    if asked := re.fullmatch(r"is there a (.+)\?", question):
        return "yes" if described(scene, asked[1]) else "no"
    if asked := re.fullmatch(r"is any (.+) in the (.+)\?", question):
        return "yes" if any(map(INSIDE[asked[2]], described(scene, asked[1]))) else "no"
    if asked := re.fullmatch(f"is the (.+) ({'|'.join(HOLDS)}) the (.+)\\?", question):
        (one,), (other,) = described(scene, asked[1]), described(scene, asked[3])
        return "yes" if HOLDS[asked[2]](one, other) else "no"
    if asked := re.fullmatch(r"how many (.+) are (?:there|in the (.+))\?", question):
        return str(sum(map(INSIDE[asked[2]] if asked[2] else bool, described(scene, asked[1]))))
    asked = re.fullmatch(r"what (color is|size is|is) the (.+)\?", question)
    assert asked, question
    (figure,) = described(scene, asked[2])
    size = "small" if figure.radius < 7 else "large"
    return {"color is": figure.color, "size is": size, "is": figure.shape}[asked[1]]


def test_every_hard_answer_is_true_to_its_scene() -> None:
    for index in range(SCENES):
        for question in hard_questions_of(index):
            assert question.answer == hard_answer(hard_scene_of(index), question.text), (index, question)


def test_hard_questions_are_of_every_kind_and_balanced() -> None:
    """Counts go to nine, half of the yes/no questions of each kind are yes, whichever words they use."""
    questions = [question for index in range(3 * SCENES) for question in hard_questions_of(index)]
    kinds = {kind: [q for q in questions if q.question_type == kind] for kind in {q.question_type for q in questions}}
    assert set(kinds) == {
        *("is there a", "is any", "is the", "how many"),
        *("what color is the", "what is the", "what size is the"),
    }
    assert min(map(len, kinds.values())) > 0.05 * len(questions)
    for kind in ("is there a", "is any", "is the"):
        yes = sum(q.answer == "yes" for q in kinds[kind])
        assert abs(yes / len(kinds[kind]) - 0.5) < 0.06, kind
    for length in (2, 3):  # a longer description fits fewer figures, and is not the more often answered with no
        told = [q for q in kinds["is there a"] if len(q.text.split()) == 3 + length]
        assert abs(sum(q.answer == "yes" for q in told) / len(told) - 0.5) < 0.08
    assert {q.answer for q in kinds["how many"]} == set("0123456789")
    for words in (*hard_scenes.PARTS, *hard_scenes.RELATIONS, *hard_scenes.OUTERMOST, *hard_scenes.RADII):
        assert any(words in q.text for q in questions), words
    alternatives = scenes.LEVELS["hard"].alternatives
    assert {q.answer for q in questions} == set(alternatives)
    assert all(q.answer not in alternatives[q.answer] for q in questions)


def test_hard_scenes_have_small_and_large_figures_in_cells_of_their_own() -> None:
    numbers = Counter(len(hard_scene_of(index)) for index in range(SCENES))
    assert set(numbers) == set(range(3, 10))
    radii = [figure.radius for index in range(SCENES) for figure in hard_scene_of(index)]
    assert min(radii) < 5
    assert max(radii) > 11
    assert 0.4 < sum(radius < 7 for radius in radii) / len(radii) < 0.6
    for index in range(SCENES):
        cells = set()
        for figure in hard_scene_of(index):
            xs, ys = zip(*outline(figure), strict=True)
            assert {min(xs) // 28, max(xs) // 28} == {figure.x // 28}
            assert {min(ys) // 28, max(ys) // 28} == {figure.y // 28}
            cells.add((figure.x // 28, figure.y // 28))
        assert len(cells) == len(hard_scene_of(index))
        assert all(0 <= place < 6 for cell in cells for place in cell)


def test_the_hard_level_is_written_as_the_easy_one_and_the_same_every_time(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        scenes.main([*f"--output {tmp_path}/{name} --scenes 4 --seed 7 --split val2014 --level hard".split()])
        paths = sorted((path.relative_to(tmp_path / name), path) for path in (tmp_path / name).rglob("*.*"))
        written.append({str(relative): path.read_bytes() for relative, path in paths})
    assert written[0] == written[1]
    assert len(written[0]) == 4 + 3
    truth = json.loads(written[0]["v2_mscoco_val2014_annotations.json"])["annotations"]
    asked = json.loads(written[0]["v2_OpenEnded_mscoco_val2014_questions.json"])["questions"]
    for question, annotation in zip(asked, truth, strict=True):
        index = question["image_id"] - 7 * scenes.ID_SPAN - 1
        true = hard_answer(hard_scene_of(index, "val2014", 7), question["question"])
        assert annotation["multiple_choice_answer"] == true
        assert question["question"].startswith(annotation["question_type"])
    with Image.open(tmp_path / "one/images/COCO_val2014_000007000001.jpg") as image:
        assert image.size == (168, 168)
