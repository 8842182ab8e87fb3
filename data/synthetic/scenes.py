"""Generated scenes with captions and questions, written in VQAv2's own files: the data of the quickstart.

A scene is one to three plain figures on a light, noisy background. Everything about it - figures, image, captions,
questions, ten answers to each - is drawn from random numbers seeded by (split, seed, index): two splits or two seeds
never share a scene, and the first 100 of 2,000 scenes are the same as 100 made alone.

    python -m data.synthetic.scenes --output DIR --scenes 2000 --seed 1 --split train2014 [--level hard] [--dissent 6]

    DIR/images/COCO_{split}_{image_id:012d}.jpg
    DIR/v2_OpenEnded_mscoco_{split}_questions.json      as visualqa.org publishes them
    DIR/v2_mscoco_{split}_annotations.json
    DIR/captions_{split}.jsonl                          image, prefix, suffix: what the base checkpoint was trained on

Captions follow their prefix as PaliGemma's own pretraining tasks do: "caption en" tells everything, "caption en red" or
"caption en blue circle" that much of it, "no blue circles" included.

The ten answers imitate people: up to three of them differ from the rest, by spelling ("three" for "3"), synonym or
mistake, so the majority answer always scores 1.0 under the VQA metric. `--dissent` lets more of them differ, each
number up to it as often; the majority answer need not be the true one then.

All this is the level "easy"; hard_scenes.py has more figures and other questions. Not here: figures and images
(figures.py), reading these files (data/sources).
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.progress import progress_bar
from data.synthetic import hard_scenes
from data.synthetic.figures import COLORS, SHAPES, Figure, Question, Scene, draw_figure, render, rng_of

CANVAS = 112  # pixels a side
ID_SPAN = 1_000_000
ANNOTATORS = 10
DISSENT = (5, 3, 2, 1)  # how often none, one, two and three of them differ
GRID = 4  # figures stand in different cells of a GRID x GRID raster: they never overlap, each fills one 14-pixel patch
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALTERNATIVES = {  # what the few who disagree say: other words for the same thing, slips of the pen, mistakes
    "yes": ("yeah", "yep", "no"),
    "no": ("nope", "not really", "yes"),
    "0": ("zero", "none", "1"),
    "1": ("one", "2"),
    "2": ("two", "3"),
    "3": ("three", "2"),
    "red": ("crimson", "dark red"),
    "green": ("dark green", "gren"),
    "blue": ("navy", "dark blue"),
    "yellow": ("gold", "yelow"),
    "circle": ("round", "ball", "dot"),
    "square": ("box", "sqare"),
    "triangle": ("triangel", "pyramid"),
}


def make_scene(rng: random.Random) -> Scene:
    """One to three figures in cells of their own."""
    figures: list[Figure] = []
    for place in rng.sample(range(GRID * GRID), rng.randint(1, 3)):
        figures.append(draw_figure(figures, place, GRID, (9.5, 12), rng))
    return tuple(figures)


def caption_of(scene: Scene, color: str | None, shape: str | None) -> tuple[str, str]:
    """Prefix and caption for the figures of a color, of a shape, of both, or, with neither, for all."""
    chosen = [f for f in scene if color in (None, f.color) and shape in (None, f.shape)]
    chosen.sort(key=lambda f: (SHAPES.index(f.shape), list(COLORS).index(f.color)))
    thing = " ".join(filter(None, [color, shape or "shape"]))
    number = f"{NUMBERS[len(chosen)]} {thing}{'' if len(chosen) == 1 else 's'}"
    told = ", ".join(f.color if shape else f.shape if color else f"{f.color} {f.shape}" for f in chosen)
    listed = " and ".join(told.rsplit(", ", 1))  # red, blue and green
    whole = number if not told or (color and shape) else f"{number}: {listed}"
    return " ".join(filter(None, ["caption en", color, shape])), whole


def make_captions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Of everything once, then twice each of a color, of a shape and of both, one that is there and one by chance."""
    figure = rng.choice(scene)
    wanted: list[tuple[str | None, str | None]] = [(None, None)]
    for color, shape in ((figure.color, figure.shape), (rng.choice(list(COLORS)), rng.choice(SHAPES))):
        wanted += [(color, None), (None, shape), (color, shape)]
    return list(dict.fromkeys(caption_of(scene, color, shape) for color, shape in wanted))


def ask_whether(scene: Scene, rng: random.Random) -> Question:
    """Yes in half of all cases; most of the "no" are near misses: the color or the shape does occur."""
    yes = rng.random() < 0.5
    kind = rng.choice(("shape", "color", "both", "both"))
    pairs = [(f.color, f.shape) for f in scene]
    colors, shapes = zip(*pairs, strict=True)
    if kind == "shape":
        shape = rng.choice([s for s in SHAPES if (s in shapes) == yes] or SHAPES)
        return Question(f"is there a {shape}?", "yes" if shape in shapes else "no", "yes/no", "is there a")
    if kind == "color":
        color = rng.choice([c for c in COLORS if (c in colors) == yes] or list(COLORS))
        return Question(f"is there anything {color}?", "yes" if color in colors else "no", "yes/no", "is there")
    near = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in pairs and (c in colors or s in shapes)]
    color, shape = rng.choice(pairs if yes else near)
    return Question(f"is there a {color} {shape}?", "yes" if yes else "no", "yes/no", "is there a")


def ask_how_many(scene: Scene, rng: random.Random) -> Question:
    """All figures, those of one shape or those of one color; one time in six of a shape or color that may be absent."""
    kind = rng.choice(("all", "shape", "color"))
    things, number = "shapes", len(scene)
    absent = kind != "all" and rng.random() < 1 / 6
    if kind == "shape":
        shape = rng.choice(SHAPES if absent else [f.shape for f in scene])
        things, number = f"{shape}s", sum(f.shape == shape for f in scene)
    elif kind == "color":
        color = rng.choice(list(COLORS) if absent else [f.color for f in scene])
        things, number = f"{color} shapes", sum(f.color == color for f in scene)
    return Question(f"how many {things} are there?", str(number), "number", "how many")


def ask_which(scene: Scene, rng: random.Random) -> Question | None:
    """Color of the only figure of its shape, shape of the only one of its color; None where there is no such figure."""
    shapes, colors = [f.shape for f in scene], [f.color for f in scene]
    only = [f for f in scene if shapes.count(f.shape) == 1]
    questions = [Question(f"what color is the {f.shape}?", f.color, "other", "what color is the") for f in only]
    only = [f for f in scene if colors.count(f.color) == 1]
    questions += [Question(f"what is the {f.color} shape?", f.shape, "other", "what is the") for f in only]
    return rng.choice(questions) if questions else None


def make_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Up to two different questions of each answer type."""
    asked = [ask(scene, rng) for ask in (ask_whether, ask_how_many, ask_which) for _ in range(2)] + [
        ask_which(scene, rng)
    ]
    return list({question.text: question for question in asked if question is not None}.values())


class Level(NamedTuple):
    """What scenes of a kind are: pixels a side, how scenes and questions are made, what people say instead."""

    canvas: int
    make_scene: Callable[[random.Random], Scene]
    make_questions: Callable[[Scene, random.Random], list[Question]]
    alternatives: Mapping[str, Sequence[str]]


LEVELS = {
    "easy": Level(CANVAS, make_scene, make_questions, ALTERNATIVES),
    "hard": Level(
        hard_scenes.CANVAS,
        hard_scenes.make_scene,
        hard_scenes.make_questions,
        ALTERNATIVES | hard_scenes.ALTERNATIVES,
    ),
}


def make_answers(
    answer: str,
    rng: random.Random,
    alternatives: Mapping[str, Sequence[str]] = ALTERNATIVES,
    dissent: Sequence[int] = DISSENT,
) -> list[str]:
    """Ten people's answers. dissent: how often none of them, one, two and so on differ from the true one."""
    others = rng.choices(alternatives[answer], k=rng.choices(range(len(dissent)), weights=dissent)[0])
    answers = [answer] * (ANNOTATORS - len(others)) + others
    rng.shuffle(answers)
    return answers


def annotation(question: Question, answers: Sequence[str], ids: dict[str, int]) -> dict[str, Any]:
    return {
        **ids,
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "multiple_choice_answer": question.answer,
        "answers": [
            {"answer_id": i, "answer": answer, "answer_confidence": "yes" if answer == question.answer else "maybe"}
            for i, answer in enumerate(answers, start=1)
        ],
    }


def write(output: Path, scenes: int, seed: int, split: str, level: str = "easy", dissent: int | None = None) -> None:
    """Writes the images and the three files named above; an image id is seed x 1,000,000 + index + 1.

    Args:
        level: one of LEVELS.
        dissent: the most annotators of a question who differ, 0 to 10, each number as often; None: as DISSENT says.

    Raises:
        ValueError: too many scenes, too large a seed, or more who differ than there are.
    """
    canvas, make_scene, make_questions, alternatives = LEVELS[level]
    if not (0 < scenes < ID_SPAN and 0 <= seed < ID_SPAN):
        wanted = f"1 to {ID_SPAN - 1} scenes and a seed of 0 to {ID_SPAN - 1}"
        raise ValueError(f"scenes={scenes}, seed={seed}: image ids have six digits for each; give {wanted}")
    if dissent is not None and not 0 <= dissent <= ANNOTATORS:
        raise ValueError(f"dissent={dissent}: a question has {ANNOTATORS} annotators; give 0 to {ANNOTATORS}")
    differing = DISSENT if dissent is None else (1,) * (dissent + 1)
    (output / "images").mkdir(parents=True, exist_ok=True)
    questions, annotations, captions = [], [], []
    for index in progress_bar(range(scenes), "making scenes", unit="scene"):
        scene = make_scene(rng_of(split, seed, index, "scene"))
        image_id = seed * ID_SPAN + index + 1
        name = f"images/COCO_{split}_{image_id:012d}.jpg"
        render(scene, rng_of(split, seed, index, "picture"), canvas).save(output / name, quality=95, subsampling=0)
        told = make_captions(scene, rng_of(split, seed, index, "captions"))
        captions += [{"image": name, "prefix": prefix, "suffix": caption} for prefix, caption in told]
        rng = rng_of(split, seed, index, "questions")
        for number, question in enumerate(make_questions(scene, rng)):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append({**ids, "question": question.text})
            annotations.append(annotation(question, make_answers(question.answer, rng, alternatives, differing), ids))
    description = f"Scenes generated with seed {seed}" + (f", level {level}" if level != "easy" else "")
    description += "" if dissent is None else f", up to {dissent} annotators differ"
    head = {
        "info": {"description": description, "version": "1.0", "contributor": "data/synthetic/scenes.py"},
        "license": {"name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        "data_type": "mscoco",
        "data_subtype": split,
    }
    task = {**head, "task_type": "Open-Ended", "questions": questions}
    (output / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(task))
    (output / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({**head, "annotations": annotations}))
    (output / f"captions_{split}.jsonl").write_text("".join(json.dumps(caption) + "\n" for caption in captions))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write generated scenes, questions and answers as VQAv2's own files.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--scenes", type=int, required=True, help="number of images (about 5.5 questions each)")
    parser.add_argument("--seed", type=int, required=True, help="another seed, other scenes")
    parser.add_argument("--split", required=True, help="named in the files, as train2014 is; another one, other scenes")
    parser.add_argument("--level", choices=LEVELS, default="easy", help="hard: up to nine figures, places and sizes")
    parser.add_argument("--dissent", type=int, help="the most of ten annotators who differ; default: 3, mostly fewer")
    write(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
