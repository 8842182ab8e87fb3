"""Preference pairs from the answers of a network: a source of examples and answers.jsonl -> JSON lines of pairs.

    python -m data.preferences mine/asked.jsonl pairs.jsonl --answers runs/mine/asked/answers.jsonl
    python -m data.preferences ... --long "the answer is {answer}"
    python -m data.preferences ... --sentences runs/base/asked/answers.jsonl

evaluate.py writes answers.jsonl. An answer belongs to the example with its id; each distinct answer to an example makes
one pair or none, by one of two rules:

right beats wrong   an answer that scores at most --wrong-up-to is rejected; the right answer is chosen: that of the
                    example, of several the most frequent one.
long beats blunt    with --long or --sentences: an answer that scores at least --right-from in no more words than the
                    example's is rejected; a sentence that says the same is chosen. It is the answer of --sentences,
                    where that has more words and among them those of the right answer in their order; else --long
                    with {answer} and {question} filled in.

With --long or --sentences the first rule chooses such a sentence, too: a short answer would teach again that answers
are short. Words are compared without case, punctuation and articles, and "two" is "2". What else a sentence says is
not looked at: "no cat" says "cat". A cut-off answer is never chosen, but may be rejected. The exit code is 0, 1 if rows
of the source were skipped, 2 after an error (OUT is left as it was), 130 after Ctrl-C. Not here: what makes a pair
(data/preference_rules.py), the options of the source (data/convert.py), and learning from pairs.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.answers_file import GivenAnswer, read_answers
from data.convert import Converted, add_source_and_output, folder_to_name, report, rewriting, source_of
from data.files import path_argument
from data.invalid import SkippedRecords
from data.preference_rules import RIGHT_FROM, WRONG_UP_TO, Pair, Rules
from data.script import run
from data.sources import source_contents

NAMED = 3  # ids that a message spells out


@dataclasses.dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        rules: pairs by rule.
        none: answers that made no pair, by the reason.
        without_answer: ids of examples that have no answer.
        without_example: ids of answers that are to no example.
    """

    converted: Converted
    rules: Mapping[str, int]
    none: Mapping[str, int]
    without_answer: Sequence[str]
    without_example: Sequence[str]

    def lines(self) -> list[str]:
        """What a person should know of it."""
        said = [f"{rule}: {count:,} pairs" for rule, count in self.rules.items()]
        said += [f"no pair: {count:,} answers {reason}" for reason, count in Counter(self.none).most_common()]
        if self.without_answer:
            said.append(f"{len(self.without_answer):,} examples have no answer: {shown(self.without_answer)}")
        if self.without_example:
            said.append(f"{len(self.without_example):,} answers are to no example: {shown(self.without_example)}")
        return said


def make_pairs(
    source: Mapping[str, Any], files: Sequence[Mapping[str, GivenAnswer]], output: Path, rules: Rules
) -> Made:
    """Write the pairs that answers to the examples of a source make.

    Args:
        source: arguments of `load_records`.
        files: answers by id, of each file.
        output: the file; one that exists is replaced when all is well.

    Raises:
        ValueError: the source cannot be read, answers are to other examples, or there is no pair.
    """
    answered = {id for answers in files for id in answers}
    made, none = Counter[str](), Counter[str]()
    seen, used = set[str](), set[str]()
    without_answer: list[str] = []
    skipped, text_rows = SkippedRecords(share=math.inf), 0
    with rewriting(source, output, skipped) as (records, write):
        for record in records:
            given = [answers[record["id"]] for answers in files if record["id"] in answers]
            seen.add(record["id"])
            if not given:
                without_answer.append(record["id"])
            for answer in given:
                answer.require_about(record)
            different = distinct(given)
            if repeated := len(given) - len(different):
                none["are the same in another file"] += repeated
            for answer in different:
                pair = rules.pair_of(record, answer)
                if isinstance(pair, Pair):
                    write(as_record(pair, record, unused(record["id"], used, answered)))
                    made[pair.rule] += 1
                    text_rows += record["image"] is None
                else:
                    none[pair] += 1
        without_example = [id for id in answered if id not in seen and id not in skipped.reasons]
        converted = Converted(made.total(), skipped.reasons, folder_to_name(source, output), text_rows)
        result = Made(converted, made, none, without_answer, sorted(without_example))
        if not made:
            raise ValueError("\n  ".join(["no pair can be made:", *result.lines()]))
    return result


def as_record(pair: Pair, record: Mapping[str, Any], id: str) -> dict[str, Any]:
    """The record with the answers of the pair instead of its own."""
    return {**record, "id": id, "answers": [pair.chosen], "equally_right": True, "rejected": pair.rejected}


def distinct(given: Sequence[GivenAnswer]) -> list[GivenAnswer]:
    """The answers whose texts differ; of two with one text that which was not cut off, or the first."""
    found: dict[str, GivenAnswer] = {}
    for answer in sorted(given, key=lambda one: not one.finished):
        found.setdefault(answer.text.strip(), answer)
    return list(found.values())


def unused(id: str, used: set[str], ids: set[str]) -> str:
    """An id for a pair, which is put into `used`: that of the example, from its second pair on with a number.

    ids: of all examples that may have pairs.
    """
    found, number = id, 1
    while found in used or (number > 1 and found in ids):
        number += 1
        found = f"{id}-{number}"
    used.add(found)
    return found


def shown(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more


def require_output(output: Path, force: bool, inputs: Iterable[Path]) -> None:
    """ValueError where the output would replace a file that is read, or another one without --force."""
    if not output.exists():
        return
    for path in inputs:
        with contextlib.suppress(OSError):
            if path.samefile(output):
                raise ValueError(f"{output} is one of the files that are read; give another path")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; expected a path for the file of pairs")
    if not force:
        raise ValueError(f"{output} exists already: give another path, or replace it with --force")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.preferences", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source_and_output(parser)
    parser.add_argument(
        "--answers",
        metavar="FILE",
        type=path_argument,
        action="append",
        required=True,
        help="answers.jsonl of a network; several times for several",
    )
    parser.add_argument("--long", metavar="TEXT", help='a sentence to choose, such as "the answer is {answer}"')
    parser.add_argument(
        "--sentences",
        metavar="FILE",
        type=path_argument,
        action="append",
        default=[],
        help="answers.jsonl with sentences to choose; several times for several",
    )
    parser.add_argument(
        "--right-from",
        metavar="PERCENT",
        type=float,
        default=RIGHT_FROM,
        help="the lowest score of a right answer (default: %(default)g)",
    )
    parser.add_argument(
        "--wrong-up-to",
        metavar="PERCENT",
        type=float,
        default=WRONG_UP_TO,
        help="the highest score of a wrong answer (default: %(default)g)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    source = source_of(given)
    contents = [file for files, _ in source_contents(source).values() for file in files]
    require_output(given.output, given.force, [*given.answers, *given.sentences, *contents])
    answers = [read_answers(file) for file in given.answers]
    sentences = []
    for file in given.sentences:
        found = read_answers(file)
        sentences.append({id: answer for id, answer in found.items() if answer.finished})
        if cut_off := len(found) - len(sentences[-1]):
            print(f"{cut_off:,} of {len(found):,} answers in {file} are cut off and cannot be chosen")
    made = make_pairs(source, answers, given.output, Rules(given.right_from, given.wrong_up_to, given.long, sentences))
    print("\n".join(made.lines()))
    report(made.converted, "pairs", given.output)


if __name__ == "__main__":
    sys.exit(run(main))
