"""Which of two answers is preferred, and which answers make no pair."""

from __future__ import annotations

import pytest

from data.answers_file import GivenAnswer
from data.preference_rules import LONG, RIGHT, Pair, Rules, says, words

RECORD = {"id": "1", "question": "how many cats?", "answer": "2", "answers": ["2", "2", "3"]}
TEMPLATE = "there are {answer} of them"


def given(text: str, score: float = 0.0, finished: bool = True) -> GivenAnswer:
    return GivenAnswer("f, line 1", text, score, finished)


def sentences(text: str) -> list[dict[str, GivenAnswer]]:
    return [{"1": given(text)}]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (given("dogs"), Pair(RIGHT, "2", "dogs")),
        (given("dogs", finished=False), Pair(RIGHT, "2", "dogs")),
        (given("there are 2"), Pair(RIGHT, "2", "there are 2")),  # short answers are wanted: the metric calls it wrong
        (given("3", 30.0), "score above 0 and below 90"),
        (given("3", 89.99), "score above 0 and below 90"),
        (given("two", 90.0), "are right"),
        (given(" "), "are empty"),
        (given(" 2"), "are the right answer, with the score of a wrong one"),
    ],
)
def test_right_beats_wrong(answer: GivenAnswer, expected: Pair | str) -> None:
    assert Rules().pair_of(RECORD, answer) == expected


def test_what_is_right_and_wrong_can_be_set() -> None:
    rules = Rules(right_from=60.0, wrong_up_to=30.0)
    assert rules.pair_of(RECORD, given("3", 30.0)) == Pair(RIGHT, "2", "3")
    assert rules.pair_of(RECORD, given("3", 60.0)) == "are right"
    assert rules.pair_of(RECORD, given("3", 45.0)) == "score above 30 and below 60"
    for right, wrong in ((30.0, 30.0), (float("nan"), 0.0)):
        with pytest.raises(
            ValueError, match=rf"--wrong-up-to is {wrong:g} and --right-from {right:g}; expected a lower"
        ):
            Rules(right_from=right, wrong_up_to=wrong)


def test_an_empty_answer_has_no_pair() -> None:
    nothing = RECORD | {"answer": "", "answers": [""]}
    assert Rules().pair_of(nothing, given("a cat")) == "should be empty, and no answer of a pair may be"
    assert Rules(long=TEMPLATE).pair_of(nothing, given("", 100.0)) == "are empty"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (given("2", 100.0), Pair(LONG, "there are 2 of them", "2")),
        (given("two", 100.0), Pair(LONG, "there are two of them", "two")),  # says what it says
        (given("two cats", 100.0), "are right and not blunt"),
        (given("2", 100.0, finished=False), "are right and blunt, and cut off"),
        (given("dogs"), Pair(RIGHT, "there are 2 of them", "dogs")),
        (given("I see two cats"), "say the right answer with other words around it"),
        (given("3", 30.0), "score above 0 and below 90"),
    ],
)
def test_long_beats_blunt_by_a_template(answer: GivenAnswer, expected: Pair | str) -> None:
    """And where an answer is wrong, the chosen one is long too."""
    assert Rules(long=TEMPLATE).pair_of(RECORD, answer) == expected


def test_a_template_takes_the_question_and_texts_with_braces() -> None:
    record = RECORD | {"question": "what is {answer}?", "answer": "{question}"}
    pair = Rules(long="{question} it is {answer}").pair_of(record, given("{question}", 100.0))
    assert pair == Pair(LONG, "what is {answer}? it is {question}", "{question}")


@pytest.mark.parametrize(
    "long", ["", "yes", "{answer}", " {answer}.", "the {question}", "it is {answer} {id}", "{ {answer}"]
)
def test_a_template_that_is_no_sentence_is_refused(long: str) -> None:
    with pytest.raises(ValueError, match=r'--long is .*; expected a sentence with \{answer\}, .* "the answer is'):
        Rules(long=long)


def test_long_beats_blunt_by_the_sentence_of_another_network() -> None:
    rules = Rules(sentences=sentences("I see two cats."))
    assert rules.pair_of(RECORD, given("2", 100.0)) == Pair(LONG, "I see two cats.", "2")
    assert rules.pair_of(RECORD, given("dogs")) == Pair(RIGHT, "I see two cats.", "dogs")


@pytest.mark.parametrize("text", ["I see 3 cats", "22 cats", "Two!", "the 2"])
def test_without_a_sentence_the_template_says_it_or_nothing(text: str) -> None:
    """None that says something else, or has no word more."""
    blunt, wrong = given("2", 100.0), given("dogs")
    alone, both = Rules(sentences=sentences(text)), Rules(sentences=sentences(text), long=TEMPLATE)
    assert alone.pair_of(RECORD, blunt) == "are right and blunt, and no sentence says them"
    assert alone.pair_of(RECORD, wrong) == "are wrong, and no sentence says the right answer"
    assert both.pair_of(RECORD, blunt) == Pair(LONG, "there are 2 of them", "2")
    other = Rules(sentences=[{"7": given("I see two cats")}])
    assert other.pair_of(RECORD, blunt) == "are right and blunt, and no sentence says them"


def test_the_first_file_with_a_sentence_counts() -> None:
    rules = Rules(sentences=[*sentences("no"), *sentences("just 2"), *sentences("I see 2")])
    assert rules.pair_of(RECORD, given("2", 100.0)) == Pair(LONG, "just 2", "2")


def test_a_sentence_about_another_example_is_refused() -> None:
    answer = GivenAnswer("g, line 4", "I see 2", 0.0, True, "how many dogs?", None)
    with pytest.raises(ValueError, match="g, line 4: question of id '1' is 'how many dogs"):
        Rules(sentences=[{"1": answer}]).pair_of(RECORD, given("2", 100.0))


def test_words_are_compared_as_they_sound() -> None:
    assert words("The cat's TWO mats, a mat: ß 猫!") == ["cat's", "2", "mats", "mat", "ss", "猫"]
    assert says("There is a red circle.", "The red circle")
    assert not says("a red and a circle", "red circle")
    assert not says("a cat", "?")
    assert not says("cat", "cat cat")
