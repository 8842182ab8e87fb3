"""Captions: CIDEr-D and BLEU-4 against literal restatements, and what is refused."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from typing import Any

import pytest

from finetune.evaluation.answer import texts_alone
from finetune.evaluation.captions import CaptionTask, bleu_4, cider_d, words

TASK = CaptionTask()
VOCABULARY = ["a", "the", "red", "blue", "big", "circle", "square", "dog", "cat", "on", "near", "and"]


def record(id: str, *answers: str, image: str = "") -> dict[str, Any]:
    return {"id": id, "answers": answers, "image_id": image or id, "answer_type": "", "question_type": ""}


def runs(text: str, length: int) -> Counter[tuple[str, ...]]:
    found = text.split()
    return Counter(tuple(found[k : k + length]) for k in range(len(found) - length + 1))


def literal_cider_d(references: dict[str, list[str]], written: dict[str, list[str]]) -> dict[str, float]:
    """Section 3 and equation 8 of arXiv 1411.5726, with the length of a caption in pairs of words, as the authors'
    program has it.
    """
    scores = {}
    for id, (candidate,) in written.items():
        found = 0.0
        for length in range(1, 5):
            holding = Counter(
                run for texts in references.values() for run in set().union(*(runs(text, length) for text in texts))
            )

            weights = {run: math.log(len(references) / count) for run, count in holding.items()}
            mine, *others = (
                {run: count * weights.get(run, math.log(len(references))) for run, count in runs(text, length).items()}
                for text in (candidate, *references[id])
            )
            for text, other in zip(references[id], others, strict=True):
                both = sum(min(value, other.get(run, 0)) * other.get(run, 0) for run, value in mine.items())
                norms = [math.sqrt(sum(value**2 for value in one.values())) for one in (mine, other)]
                gap = runs(candidate, 2).total() - runs(text, 2).total()
                if all(norms):
                    found += math.exp(-(gap**2) / 72) * both / math.prod(norms) / len(references[id])
        scores[id] = 10 * found / 4
    return scores


def drawn(seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """References, and captions that resemble one of them or are empty."""
    draw = random.Random(seed)
    references, written = {}, {}
    for number in range(12):
        texts = [" ".join(draw.choices(VOCABULARY, k=draw.randint(3, 9))) for _ in range(draw.randint(1, 5))]
        kept = [word if draw.random() < 0.8 else draw.choice(VOCABULARY) for word in texts[0].split()]
        references[str(number)] = texts
        written[str(number)] = [" ".join(kept[draw.randint(0, 1) :]) if number else ""]
    return references, written


@pytest.mark.parametrize("seed", range(4))
def test_cider_d_is_that_of_its_definition(seed: int) -> None:
    references, written = drawn(seed)
    found = cider_d(references, written)
    assert found == pytest.approx(literal_cider_d(references, written))
    assert found["0"] == 0
    assert max(found.values()) > 1


@pytest.mark.parametrize("seed", range(4))
def test_bleu_4_is_that_of_its_definition(seed: int) -> None:
    """The geometric mean of clipped precisions, times the penalty for being shorter than the closest references."""
    references, written = drawn(seed)
    logs, mine, others = 0.0, 0, 0
    for length in range(1, 5):
        hits = total = 0
        for id, (text,) in written.items():
            most = Counter[tuple[str, ...]]()
            for other in references[id]:
                most |= runs(other, length)
            hits += (runs(text, length) & most).total()
            total += runs(text, length).total()
        logs += math.log(hits / total) / 4
    for id, (text,) in written.items():
        size = len(text.split())
        mine += size
        others += min((abs(len(other.split()) - size), len(other.split())) for other in references[id])[1]
    assert bleu_4(references, written) == pytest.approx(math.exp(logs + min(0, 1 - others / mine)), rel=1e-6)


def test_words_are_in_lower_case_and_without_marks() -> None:
    assert words("A red-and-white dog's, 2.5 m.") == ["a", "red", "and", "white", "dog", "s", "2", "5", "m"]
    assert words("«Ñandú» — ¿qué? ✓ 😀") == ["ñandú", "qué"]
    assert words("एक लाल कुत्ता।") == ["एक", "लाल", "कुत्ता"]  # vowel signs belong to their words
    assert words(" ... ") == []


def test_a_score_is_the_mean_over_captions_and_takes_images_as_independent() -> None:
    records = [record(str(k), f"A {word} dog.", f"the {word} one") for k, word in enumerate(VOCABULARY[2:8])]
    texts = {one["id"]: one["answers"][0].upper() if k % 2 else "a cat" for k, one in enumerate(records)}
    found = TASK.score(texts_alone(texts), records)
    references = {one["id"]: [" ".join(words(text)) for text in one["answers"]] for one in records}
    values = literal_cider_d(references, {id: [" ".join(words(text))] for id, text in texts.items()})
    assert found.values == pytest.approx({id: 100 * value for id, value in values.items()})
    assert found.overall == pytest.approx(100 * sum(values.values()) / 6)
    assert (found.metric, found.unit, list(found.others)) == ("CIDEr-D", "times 100", ["BLEU-4"])
    assert found.overall > 100  # no percentage
    deviation = math.sqrt(sum((100 * value - found.overall) ** 2 for value in values.values()) / 5 / 6)
    low, high = found.interval
    assert (low, high) == pytest.approx((max(0, found.overall - 1.96 * deviation), found.overall + 1.96 * deviation))
    pairs = [one | {"image_id": str(k // 2)} for k, one in enumerate(records)]  # one good and one bad caption in each
    assert TASK.score(texts_alone(texts), pairs).interval[1] < high
    alone = [one | {"image_id": "one"} for one in records]
    assert TASK.score(texts_alone(texts), alone).interval == (0, 1000)


def test_a_single_caption_scores_0_and_is_warned_of() -> None:
    """Its words occur in every record there is."""
    with pytest.warns(UserWarning, match="CIDEr-D of a single record is 0, whatever is answered: score more of them"):
        found = TASK.score(texts_alone({"1": "a red dog runs"}), [record("1", "a red dog runs")])
    assert (found.overall, found.interval) == (0, (0, 1000))
    assert found.others["BLEU-4"] == pytest.approx(100)


def test_what_cannot_be_scored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'\.\.\.', a right answer to '2', has no words that a caption could be"):
        TASK.require([record("1", "a dog"), record("2", "a cat", "...")])
    with pytest.raises(ValueError, match="question '1' has no annotated answers"):
        TASK.score(texts_alone({"1": "a dog"}), [record("1")])
    with pytest.raises(ValueError, match="1 without a prediction"):
        TASK.score({}, [record("1", "a dog")])
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ValueError, match=r"needs pycocoevalcap: pip install .*\[caption\].*data\.validation\.task"):
        TASK.require()
