"""The hard level of the generated scenes: more figures, small ones among them, questions about places and sizes.

Three to nine figures stand in different cells of a 6 x 6 raster, half of them small. Five kinds of questions, which
their first words tell apart:

    is there a ...   whether a kind of figure exists             is there a small red circle?
    is any ...       whether one stands in a part of the image   is any circle in the top half?
    is the ...       how two figures stand to each other         is the red circle left of the blue square?
    how many ...     counts up to nine                           how many small shapes are there?
    what ...         color, shape or size of one figure          what color is the leftmost shape?

The first three are asked where the same words with another color or shape would have the other answer, and half of
their answers are "yes". A question about a single figure is asked where the description fits one figure only; one
about places where the figures are in different columns or rows. Captions: as of other scenes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from data.synthetic.figures import CELL, COLORS, SHAPES, Figure, Question, Scene, draw_figure

T = TypeVar("T")
GRID = 6
CANVAS = GRID * CELL  # pixels a side
MOST = 9  # figures of a scene
RADII = {"small": (4.5, 6.0), "large": (9.5, 12.0)}
ALTERNATIVES = {  # beside those of other scenes
    "4": ("four", "3", "5"),
    "5": ("five", "4", "6"),
    "6": ("six", "5", "7"),
    "7": ("seven", "6", "8"),
    "8": ("eight", "7", "9"),
    "9": ("nine", "8"),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
}
PARTS: dict[str, Callable[[Figure], bool]] = {
    "top half": lambda figure: row(figure) < GRID // 2,
    "bottom half": lambda figure: row(figure) >= GRID // 2,
    "left half": lambda figure: column(figure) < GRID // 2,
    "right half": lambda figure: column(figure) >= GRID // 2,
    "top row": lambda figure: row(figure) == 0,
    "bottom row": lambda figure: row(figure) == GRID - 1,
}
RELATIONS: dict[str, Callable[[Figure, Figure], int]] = {  # above 0 where it holds, 0 where nothing is asked
    "left of": lambda a, b: column(b) - column(a),
    "right of": lambda a, b: column(a) - column(b),
    "above": lambda a, b: row(b) - row(a),
    "below": lambda a, b: row(a) - row(b),
}
OUTERMOST: dict[str, Callable[[Figure], int]] = {  # the figure with the least
    "leftmost": lambda figure: column(figure),
    "rightmost": lambda figure: -column(figure),
    "highest": lambda figure: row(figure),
    "lowest": lambda figure: -row(figure),
}


class Kind(NamedTuple):
    """A description of figures; None: any."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, [self.size, self.color, self.shape or "shape"]))

    def fits(self, figure: Figure) -> bool:
        found = (size(figure), figure.color, figure.shape)
        return all(wanted in (None, has) for wanted, has in zip(self, found, strict=True))


KINDS = [Kind(size, color, shape) for size in (None, *RADII) for color in (None, *COLORS) for shape in (None, *SHAPES)]
BY_WORDS = [  # kinds that are described by as much: two of size, color and shape, or all; then color and shape alone
    [kind for kind in KINDS if tuple(value is not None for value in kind) == told]
    for told in ((1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 1, 0), (0, 0, 1))
]
COLOR_AND_SHAPE = BY_WORDS[2]


def row(figure: Figure) -> int:
    return int(figure.y // CELL)


def column(figure: Figure) -> int:
    return int(figure.x // CELL)


def size(figure: Figure) -> str:
    return next(name for name, (_, most) in RADII.items() if figure.radius <= most)


def chosen(scene: Scene, kind: Kind) -> list[Figure]:
    """The figures that a description fits."""
    return [figure for figure in scene if kind.fits(figure)]


def make_scene(rng: random.Random) -> Scene:
    """Three to nine figures in cells of their own."""
    figures: list[Figure] = []
    for place in rng.sample(range(GRID * GRID), rng.randint(3, MOST)):
        figures.append(draw_figure(figures, place, GRID, rng.choice(list(RADII.values())), rng))
    return tuple(figures)


def yes_or_no(true: Sequence[T], false: Sequence[T], rng: random.Random) -> tuple[T, str] | None:
    """One of what is true or one of what is not, and which; None where there is nothing to choose."""
    yes = rng.random() < 0.5
    return (rng.choice(true if yes else false), "yes" if yes else "no") if true and false else None


def ask_whether(scene: Scene, rng: random.Random) -> Question | None:
    """Whether a kind of figure exists."""
    kinds = rng.choice(BY_WORDS[:4])
    true, false = ([kind for kind in kinds if bool(chosen(scene, kind)) == yes] for yes in (True, False))
    if (found := yes_or_no(true, false, rng)) is None:
        return None
    return Question(f"is there a {found[0]}?", found[1], "yes/no", "is there a")


def ask_in_part(scene: Scene, rng: random.Random) -> Question | None:
    """Whether a kind of figure that exists does so in a part of the image."""
    part, within = rng.choice(list(PARTS.items()))
    kinds = [kind for kind in rng.choice((COLOR_AND_SHAPE, *BY_WORDS[4:])) if chosen(scene, kind)]
    true, false = ([k for k in kinds if any(map(within, chosen(scene, k))) == yes] for yes in (True, False))
    if (found := yes_or_no(true, false, rng)) is None:
        return None
    return Question(f"is any {found[0]} in the {part}?", found[1], "yes/no", "is any")


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """How two figures, each the only one of its color and shape, stand to each other."""
    words, holds = rng.choice(list(RELATIONS.items()))
    single = [(kind, chosen(scene, kind)[0]) for kind in COLOR_AND_SHAPE if len(chosen(scene, kind)) == 1]
    pairs = [(a, b, holds(one, other)) for a, one in single for b, other in single]
    true, false = ([(a, b) for a, b, by in pairs if by * sign > 0] for sign in (1, -1))
    if (found := yes_or_no(true, false, rng)) is None:
        return None
    (a, b), answer = found
    return Question(f"is the {a} {words} the {b}?", answer, "yes/no", "is the")


def ask_how_many(scene: Scene, rng: random.Random) -> Question:
    """All figures, those of a size, a color, a shape, or in a half; one time in six of a kind that may be absent."""
    asked, known = rng.choice(("all", "size", "color", "shape", "half")), rng.choice(scene)
    kind, where = Kind(), "are there"
    values = {"size": (size(known), list(RADII)), "color": (known.color, list(COLORS)), "shape": (known.shape, SHAPES)}
    if asked in values:
        found, every = values[asked]
        kind = Kind(**{asked: rng.choice(every) if rng.random() < 1 / 6 else found})
    figures = chosen(scene, kind)
    if asked == "half":
        part = rng.choice([part for part in PARTS if part.endswith("half")])
        figures, where = list(filter(PARTS[part], figures)), f"are in the {part}"
    return Question(f"how many {kind}s {where}?", str(len(figures)), "number", "how many")


def descriptions(scene: Scene) -> Iterator[tuple[str, Figure]]:
    """Words that fit one figure of the scene only, and leave out its size, its color or its shape."""
    for kind in KINDS:
        if None in kind and len(figures := chosen(scene, kind)) == 1:
            yield str(kind), figures[0]
    for words, place in OUTERMOST.items():
        least = min(map(place, scene))
        if len(figures := [figure for figure in scene if place(figure) == least]) == 1:
            yield f"{words} shape", figures[0]


def ask_which(scene: Scene, rng: random.Random) -> Question | None:
    """Color, shape or size of the only figure that a description fits, where it does not say that itself."""
    asked: dict[str, tuple[Sequence[str], Callable[[Figure], str]]] = {
        "what color is the": (list(COLORS), lambda figure: figure.color),
        "what is the": (SHAPES, lambda figure: figure.shape),
        "what size is the": (list(RADII), size),
    }
    first, (values, of) = rng.choice(list(asked.items()))
    fitting = [(words, of(figure)) for words, figure in descriptions(scene) if not set(words.split()) & set(values)]
    if not fitting:
        return None
    words, answer = rng.choice(fitting)
    return Question(f"{first} {words}?", answer, "other", first)


ASK = (ask_whether, ask_in_part, ask_relation, ask_how_many, ask_how_many, ask_which, ask_which, ask_which)


def make_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Up to eight different questions: three that are answered with yes or no, two counts, and three others."""
    asked = [ask(scene, rng) for ask in ASK]
    return list({question.text: question for question in asked if question is not None}.values())
