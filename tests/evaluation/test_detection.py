"""Boxes are scored as COCO's program scores them, and as its definition says on small cases."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.boxes import Box, boxes_in, boxes_text
from finetune.evaluation.detection import AnsweredBoxes, score_boxes, scored_boxes

LABELS = ["cat", "dog", "red circle"]
Corner = tuple[int, int, int, int]


def text_of(*boxes: tuple[Corner, str]) -> str:
    return " ; ".join("".join(f"<loc{at:04d}>" for at in corners) + f" {label}" for corners, label in boxes)


def moved(box: Box, by: float, draw: random.Random) -> Box:
    changed = [at + by * draw.uniform(-1, 1) for at in box[1:]]
    return Box(draw.choice(LABELS) if draw.random() < 0.2 else box.label, *changed)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_what_the_program_prints_for_pixels_of_images_of_all_sizes(
    tmp_path: Path, seed: int
) -> None:
    """It reads files of its own, with boxes in pixels of each image; in one image nothing is expected."""
    draw = random.Random(seed)
    images, expected, answered = [], {}, {}
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number in range(1, 13):
        size = width, height = draw.randint(200, 900), draw.randint(200, 900)
        boxes = []
        for _ in range(0 if number == 5 else draw.randint(1, 5)):
            left, top = draw.uniform(0, width / 2), draw.uniform(0, height / 2)
            across, down = draw.uniform(40, width / 2), draw.uniform(40, height / 2)
            boxes.append(Box(draw.choice(LABELS), left, top, left + across, top + down))
        given = [moved(box, 12, draw) for box in boxes if draw.random() < 0.8]
        expected[str(number)] = boxes_text(boxes, size, LABELS)
        text, log_prob = boxes_text(given, size, LABELS), draw.uniform(-2, 0)
        answered[str(number)] = AnsweredBoxes(text, log_prob)
        images.append({"id": number, "width": width, "height": height})
        for found, target in ((boxes_in(expected[str(number)], size), annotations), (boxes_in(text, size), results)):
            for box in found:
                bbox = [box.left, box.top, box.right - box.left, box.bottom - box.top]
                about = {"image_id": number, "category_id": LABELS.index(box.label) + 1, "bbox": bbox}
                more = {"id": len(target) + 1, "iscrowd": 0, "area": bbox[2] * bbox[3]}
                target.append(about | (more if target is annotations else {"score": math.exp(log_prob)}))
    categories = [{"id": k, "name": name} for k, name in enumerate(LABELS, start=1)]
    file = tmp_path / "expected.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        program = COCOeval(truth, truth.loadRes(results), "bbox")
        program.evaluate()
        program.accumulate()
        program.summarize()
    scored = score_boxes(expected, answered)
    assert scored.map == pytest.approx(100 * program.stats[0])
    assert scored.map_50 == pytest.approx(100 * program.stats[1])
    assert scored.map is not None
    assert 5 < scored.map < 95
    assert (scored.images, scored.expected, scored.answered) == (12, len(annotations), len(results))


def iou(a: Corner, b: Corner) -> float:
    height, width = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    both = max(height, 0) * max(width, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def literal(
    expected: dict[str, list[tuple[Corner, str]]], answered: dict[str, list[tuple[Corner, str, float]]], least: float
) -> tuple[float, int]:
    """Mean average precision at an IoU of `least`, and how many boxes are right, from the definition: from the highest
    score on, each box takes the free expected one of its label that it covers best; precision at a recall is the best
    one at that recall or a higher one; the mean over the recalls 0, 0.01, ..., 1.
    """
    labels = sorted({label for boxes in expected.values() for _, label in boxes})
    precisions, right = [], 0
    for label in labels:
        ranked = sorted(
            ((score, id, box) for id, boxes in answered.items() for box, name, score in boxes if name == label),
            key=lambda found: -found[0],
        )
        free = {id: [box for box, name in boxes if name == label] for id, boxes in expected.items()}
        total, hits, curve = sum(map(len, free.values())), 0, []
        for seen, (_, id, box) in enumerate(ranked, start=1):
            best = max(free[id], key=lambda other: iou(box, other), default=None)
            if best is not None and iou(box, best) >= least:
                free[id].remove(best)
                hits += 1
            curve.append((hits / total, hits / seen))
        right += hits
        points = [max((p for r, p in curve if r >= k / 100 - 1e-12), default=0.0) for k in range(101)]
        precisions.append(sum(points) / 101)
    return sum(precisions) / len(precisions), right


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    expected, answered = {}, {}
    for id in "abcdef":
        places = [(draw.randrange(0, 800), draw.randrange(0, 800)) for _ in range(draw.randint(0, 4))]
        expected[id] = [((y, x, y + 100, x + 200), draw.choice(LABELS)) for y, x in places]
        near = [(box[0] + draw.randrange(40), *box[1:], label) for box, label in expected[id] if draw.random() < 0.8]
        score = draw.uniform(0.1, 0.9)
        answered[id] = [((y0, x0, y1, x1), label, score) for y0, x0, y1, x1, label in near]
        answered[id].append(((0, 0, 50, 50), draw.choice([*LABELS, "unknown"]), score))
    texts = {id: text_of(*boxes) for id, boxes in expected.items()}
    written = {
        id: AnsweredBoxes(text_of(*[(box, label) for box, label, _ in boxes]), math.log(boxes[-1][2]))
        for id, boxes in answered.items()
    }
    scored = score_boxes(texts, written)
    at_50, right = literal(expected, answered, 0.5)
    assert scored.map_50 == pytest.approx(100 * at_50)
    assert scored.map == pytest.approx(
        10 * sum(literal(expected, answered, least / 100)[0] for least in range(50, 100, 5))
    )
    count, found = (sum(map(len, boxes.values())) for boxes in (expected, answered))
    assert scored.precision == pytest.approx(100 * right / found)
    assert scored.recall == pytest.approx(100 * right / count)
    assert scored.f1 == pytest.approx(2 * 100 * right / (found + count))


def test_a_case_by_hand() -> None:
    """Two cats and a dog; found are one cat, once more the same cat, and a dog at IoU 0.6, by the surer answer."""
    a, b, c = (0, 0, 100, 100), (0, 500, 100, 600), (500, 0, 600, 100)
    expected = {"1": text_of((a, "cat"), (b, "cat")), "2": text_of((c, "dog")), "3": ""}
    answered = {
        "1": AnsweredBoxes(text_of((a, "cat"), (a, "cat")), math.log(0.5)),
        "2": AnsweredBoxes(text_of(((500, 0, 560, 100), "dog")), math.log(0.9)),
        "3": AnsweredBoxes("<loc0001><loc0002> cat ; <loc0005><loc0005><loc0001><loc0001> dog", -1.0),
    }
    scored = score_boxes(expected, answered)
    cat = 51 / 101  # precision 1 up to recall 0.5
    dog = 3 / 10  # right at 0.5, 0.55 and 0.6
    assert scored.map == pytest.approx(100 * (cat + dog) / 2)
    assert scored.map_50 == pytest.approx(100 * (cat + 1) / 2)
    assert (scored.precision, scored.recall, scored.f1) == pytest.approx((200 / 3,) * 3)
    assert scored.by_category == pytest.approx({"cat": 100 * cat, "dog": 100 * dog})
    assert (scored.images, scored.expected, scored.answered, scored.incomplete, scored.empty) == (3, 3, 3, 1, 1)


def test_perfect_answers_and_none() -> None:
    text = text_of(((0, 0, 9, 9), "cat"), ((5, 5, 900, 900), "dog"))
    perfect = score_boxes({"1": text, "2": ""}, {"1": AnsweredBoxes(text, 0.0), "2": AnsweredBoxes("", 0.0)})
    assert (perfect.map, perfect.map_50, perfect.precision, perfect.recall, perfect.f1) == pytest.approx((100,) * 5)
    silent = score_boxes({"1": text}, {"1": AnsweredBoxes("", 0.0)})
    assert (silent.map, silent.map_50, silent.precision, silent.recall, silent.f1) == (0, 0, None, 0, 0)
    absent = score_boxes({"1": ""}, {"1": AnsweredBoxes(text, 0.0)})
    assert (absent.map, absent.map_50, absent.precision, absent.recall, absent.f1) == (None, None, 0, None, 0)
    nothing = score_boxes({"1": ""}, {"1": AnsweredBoxes("", 0.0)})
    assert {nothing.map, nothing.map_50, nothing.precision, nothing.recall, nothing.f1} == {None}


def test_the_interval_is_that_of_images_drawn_again() -> None:
    """Against scoring each draw anew, an image that is drawn twice being two images."""
    draw = random.Random(1)
    expected, answered = {}, {}
    for number in range(7):  # two records about one image now and then
        places = [(draw.randrange(0, 800), draw.randrange(0, 800)) for _ in range(draw.randint(1, 3))]
        boxes = [((y, x, y + 100, x + 200), draw.choice([*LABELS, "cow", "hen"])) for y, x in places]
        near = [((box[0] + draw.randrange(40), *box[1:]), label) for box, label in boxes if draw.random() < 0.8]
        expected[str(number)] = text_of(*boxes)
        answered[str(number)] = AnsweredBoxes(text_of(*near), -draw.random())
    images = {"0": "a", "1": "b", "2": "a", "3": "c", "4": "d", "5": "e", "6": "d"}
    members = [[id for id in expected if images[id] == image] for image in "abcde"]
    drawing, found = np.random.default_rng(0), []
    for _ in range(40):
        drawn = {f"{place} {id}": id for place, k in enumerate(drawing.integers(5, size=5)) for id in members[k]}
        again = {name: expected[id] for name, id in drawn.items()}
        found.append(score_boxes(again, {name: answered[id] for name, id in drawn.items()}).map)
    scored = score_boxes(expected, answered, images, resamples=40)
    known = [value for value in found if value is not None]
    assert scored.interval == pytest.approx(tuple(np.percentile(known, [2.5, 97.5])))
    assert scored.interval is not None
    assert scored.map is not None
    assert scored.interval[0] < scored.map < scored.interval[1]
    assert score_boxes(expected, answered).interval is None
    text = text_of(((0, 0, 9, 9), "cat"))
    assert score_boxes({"1": text}, {"1": AnsweredBoxes(text, 0.0)}, resamples=5).interval == (0, 100)


def test_the_order_of_images_and_the_text_around_boxes_change_nothing() -> None:
    box = ((10, 10, 200, 200), "cat")
    expected = {str(k): text_of(box) for k in range(3)}
    answered = {str(k): AnsweredBoxes(f"I see {text_of(box)} ;", -float(k)) for k in range(3)}
    for order in itertools.permutations("012"):
        assert score_boxes(expected, {id: answered[id] for id in order}).map == pytest.approx(100)


def test_a_box_is_scored_by_its_own_tokens_where_they_are_known() -> None:
    cat = [
        ("<loc0001>", -1.0),
        ("<loc0002>", -2.0),
        ("<loc0003>", -3.0),
        ("<loc0004>", -4.0),
        (" c", -5.0),
        ("at", -6.0),
    ]
    dog = [("<loc0005>", -0.1), ("<loc0006>", -0.1), ("<loc0007>", -0.1), ("<loc0008>", -0.1), (" dog", -0.6)]
    tokens = [("oh", -50.0), (" ", -50.0), *cat, (" ;", -50.0), (" ", -50.0), *dog, ("<eos>", -50.0)]
    text = "".join(part for part, _ in tokens[:-1])
    first, second = scored_boxes(AnsweredBoxes(text, -7.0, tokens))
    assert (first.box.label, second.box.label) == ("cat", "dog")
    assert (first.score, second.score) == pytest.approx((math.exp(-21 / 6), math.exp(-0.2)))
    for other in (None, [], tokens[:5]):  # of another text
        assert [scored.score for scored in scored_boxes(AnsweredBoxes(text, -7.0, other))] == [math.exp(-7.0)] * 2
    # A sure wrong box before an unsure right one costs precision; the other way round it costs nothing.
    right = "<loc0005><loc0006><loc0007><loc0008> dog"
    wrong = [(part.replace("cat", "dog").replace("at", "og").replace(" c", " d"), log) for part, log in cat]
    answer = AnsweredBoxes(text.replace("cat", "dog"), -7.0, [*tokens[:2], *wrong, *tokens[8:]])
    assert score_boxes({"1": right}, {"1": answer}).map_50 == pytest.approx(100)
    assert score_boxes({"1": right}, {"1": answer._replace(tokens=None)}).map_50 == pytest.approx(50)


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="1 ids were not answered and 1 not expected, such as 'a', 'b'"):
        score_boxes({"a": ""}, {"b": AnsweredBoxes("", 0.0)})
    for text in ("<loc0001> cat", "<loc0003><loc0003><loc0001><loc0001> cat", "<loc0001><loc0001><loc0003><loc0003>"):
        with pytest.raises(ValueError, match="the expected text of 'a' has a box that is none, or has no label"):
            score_boxes({"a": text}, {"a": AnsweredBoxes("", 0.0)})
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(ValueError, match=r"needs pycocotools: pip install .*--editable '\.\[detection\]'"):
        score_boxes({"a": ""}, {"a": AnsweredBoxes("", 0.0)})


def test_the_program_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(((0, 0, 9, 9), "cat"))
    score_boxes({"1": text}, {"1": AnsweredBoxes(text, 0.0)})
    assert capsys.readouterr().out == ""
