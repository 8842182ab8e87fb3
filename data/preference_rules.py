"""The rules by which an answer of a network and the right one make a preference pair.

preferences.py says them in words. Not here: reading and writing (answers_file.py, preferences.py).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data.answers_file import GivenAnswer

RIGHT_FROM = 90.0  # percent: of ten annotators three gave the answer
WRONG_UP_TO = 0.0
RIGHT, LONG = "right beats wrong", "long beats blunt"
DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An answer that is preferred to another one, and the rule that says so."""

    rule: str
    chosen: str
    rejected: str


@dataclasses.dataclass(frozen=True)
class Rules:
    """What makes a pair of an answer.

    Attributes:
        right_from, wrong_up_to: scores in percent.
        long: the sentence with {answer} and {question}, or None.
        sentences: answers that were not cut off, by id, of each file that may have a sentence.
    """

    right_from: float = RIGHT_FROM
    wrong_up_to: float = WRONG_UP_TO
    long: str | None = None
    sentences: Sequence[Mapping[str, GivenAnswer]] = ()

    def __post_init__(self) -> None:
        """ValueError where a score is both right and wrong, or `long` is no sentence with an answer."""
        if not self.wrong_up_to < self.right_from:
            raise ValueError(
                f"--wrong-up-to is {self.wrong_up_to:g} and --right-from {self.right_from:g}; expected a lower score "
                "for wrong answers than for right ones"
            )
        if self.long is None:
            return
        places = set(re.findall(r"\{[^{}]*\}", self.long))
        if "{answer}" not in places or places - {"{answer}", "{question}"} or not words(_filled(self.long, "", "")):
            raise ValueError(
                f"--long is {self.long!r}; expected a sentence with {{answer}}, and {{question}} if you like, such as "
                '"the answer is {answer}"'
            )

    def pair_of(self, record: Record, given: GivenAnswer) -> Pair | str:
        """The pair that an answer makes, or why it makes none: "are right" of answers."""
        longer = self.long is not None or bool(self.sentences)
        if given.score >= self.right_from:
            return self._of_right(record, given) if longer else "are right"
        if given.score > self.wrong_up_to:
            return f"score above {self.wrong_up_to:g} and below {self.right_from:g}"
        if not given.text.strip():
            return "are empty"
        if not record["answer"].strip():
            return "should be empty, and no answer of a pair may be"
        if longer and says(given.text, record["answer"]):
            return "say the right answer with other words around it"
        chosen: str | None = self._sentence(record, record["answer"]) if longer else record["answer"]
        if chosen is None:
            return "are wrong, and no sentence says the right answer"
        if chosen.strip() == given.text.strip():
            return "are the right answer, with the score of a wrong one"
        return Pair(RIGHT, chosen, given.text)

    def _of_right(self, record: Record, given: GivenAnswer) -> Pair | str:
        if not given.text.strip():
            return "are empty"
        if len(words(given.text)) > len(words(record["answer"])):
            return "are right and not blunt"
        if not given.finished:
            return "are right and blunt, and cut off"
        sentence = self._sentence(record, given.text)
        return (
            "are right and blunt, and no sentence says them" if sentence is None else Pair(LONG, sentence, given.text)
        )

    def _sentence(self, record: Record, answer: str) -> str | None:
        """A sentence that says the answer."""
        for answers in self.sentences:
            found = answers.get(record["id"])
            if found and says(found.text, answer) and len(words(found.text)) > len(words(answer)):
                found.require_about(record)
                return found.text
        return None if self.long is None else _filled(self.long, answer.strip(), record["question"].strip())


def _filled(sentence: str, answer: str, question: str) -> str:
    """The sentence with both in their places; what stands in braces in them stays."""
    texts = {"{answer}": answer, "{question}": question}
    return re.sub(r"\{answer\}|\{question\}", lambda place: texts[place[0]], sentence)


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles, with numbers up to ten as digits."""
    found = re.findall(r"\w+(?:'\w+)*", text.casefold())
    return [DIGITS.get(word, word) for word in found if word not in ("a", "an", "the")]


def says(text: str, answer: str) -> bool:
    """Whether the words of an answer, of which there is one at least, stand in a text one after the other."""
    searched, wanted = words(text), words(answer)
    starts = range(len(searched) - len(wanted) + 1)
    return bool(wanted) and any(searched[start : start + len(wanted)] == wanted for start in starts)
