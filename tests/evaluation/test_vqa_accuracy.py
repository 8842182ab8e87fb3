"""The metric equals a literal reading of the official program, keeps to its traps, and reads and writes its files."""

import ast
import contextlib
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation import vqa_accuracy as module
from finetune.evaluation.answer import texts_alone
from finetune.evaluation.score import Score
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.vqa_accuracy import (
    normalize_answer,
    read_results,
    vqa_accuracy,
    write_results,
)
from tests.reference_vqa import REFERENCE, Case, ReferenceEvaluation, generated_cases, rules_hit


def score(texts: Mapping[str, str], records: Iterable[Mapping[str, Any]]) -> Score:
    """Of answers of which the texts are known."""
    return TASKS["vqa"].score(texts_alone(texts), records)


def annotations(cases: list[Case], *, ids: bool = True) -> list[dict[str, Any]]:
    """Cases in the form of the official annotation file, with the ids that tell two equal answers apart, or without."""
    return [
        {
            "question_id": number,
            "answers": [
                {"answer": answer, "answer_confidence": "yes"} | ({"answer_id": person} if ids else {})
                for person, answer in enumerate(answers, start=1)
            ],
            "answer_type": ("yes/no", "number", "other")[number % 3],
            "question_type": f"type {number % 7}",
        }
        for number, (_, answers) in enumerate(cases)
    ]


def reference(cases: list[Case], *, ids: bool = True) -> ReferenceEvaluation:
    results = [{"question_id": number, "answer": prediction} for number, (prediction, _) in enumerate(cases)]
    evaluation = ReferenceEvaluation(annotations(cases, ids=ids), results)
    evaluation.evaluate()
    return evaluation


def scored(cases: list[Case]) -> Score:
    records = [
        row | {"id": str(row["question_id"]), "answers": [answer["answer"] for answer in row["answers"]]}
        for row in annotations(cases)
    ]
    return score({str(number): prediction for number, (prediction, _) in enumerate(cases)}, records)


def test_equals_the_literal_evaluation_on_generated_cases() -> None:
    """3,000 cases: every question to the last bit, every reported figure to its two decimals."""
    cases = generated_cases(3000)
    expected = reference(cases)
    for number, (prediction, answers) in enumerate(cases):
        assert vqa_accuracy(prediction, answers) == expected.evalQA[number], (prediction, answers)
    result = scored(cases).to_dict()
    assert result["overall"] == expected.accuracy["overall"]
    assert result["by_answer_type"] == expected.accuracy["perAnswerType"]
    assert result["by_question_type"] == expected.accuracy["perQuestionType"]
    counts = Counter(round(value, 2) for value in expected.evalQA.values())
    assert set(counts) == {0.0, 0.3, 0.6, 0.9, 1.0}
    assert min(counts.values()) > 50


def test_normalises_every_generated_text_as_the_literal_program_does() -> None:
    """Also where no answer of the case would have shown it."""
    for text in {text for prediction, answers in generated_cases(3000) for text in (prediction, *answers)}:
        assert normalize_answer(text) == REFERENCE.normalize(text), text


def test_the_generated_cases_hit_every_rule() -> None:
    hit = rules_hit(generated_cases(3000))
    fates = [
        f"{mark} {fate}" for mark in REFERENCE.punct for fate in ("deleted", "deleted by a digit comma", "to space")
    ]
    words = [f"word {word.lower()}" for word in (*REFERENCE.contractions, *REFERENCE.manualMap, *REFERENCE.articles)]
    others = [
        "unanimous, equal",
        "unanimous, unequal only as written",
        "unanimous but for outer whitespace",
        "newline or tab",
        "digit,digit of other scripts",
        "more than 32 periods",
        "period before a digit",
        "whitespace of other kinds",
    ]
    assert not [rule for rule in (*fates, *words, *others) if hit[rule] < 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000 t-shirt", "1000 tshirt"),  # a digit comma anywhere deletes every mark
        ("t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),  # one of its kind beside a space deletes them all
        ("t-shirt/jeans, blue", "t shirt jeans blue"),  # each mark has its own fate
        ("Is it? Yes!", "is it yes"),
        ("The U.S.A.", "usa"),
        ("3.5 oz.", "3.5 oz"),  # the period before a digit stays
        ("version .5", "version .5"),
        ("." * 40, "." * 8),
        ("None", "0"),
        ("zero one ten eleven", "0 1 10 eleven"),
        ("an apple a day", "apple day"),
        ("A.", ""),  # periods go before articles
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("Im", "im"),  # the table's capitals never match
        ("o'clock: 12:30", "o'clock: 12:30"),  # neither apostrophe nor colon is a mark
        ("\tblack\nand  white ", "black and white"),
    ],
)
def test_normalisation_by_hand(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


TEN_YES = ["yes"] * 10


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("yes", TEN_YES, 1.0),
        ("Yes", TEN_YES, 0.0),  # unanimous: compared as it stands
        ("yes.", TEN_YES, 0.0),
        ("\nyes ", TEN_YES, 1.0),  # but whitespace goes
        ("yes", ["yes", " yes\n", *["yes\t"] * 8], 1.0),  # unanimous after whitespace
        ("Yes.", ["yes"] * 9 + ["no"], 1.0),  # one dissenter, and everything is normalised
        ("no", ["yes"] * 9 + ["no"], 0.3),  # left out once (0), counted nine times (1/3)
        ("no", ["yes"] * 8 + ["No", "no."], 0.6),  # (2 * 1/3 + 8 * 2/3) / 10
        ("no", ["yes"] * 7 + ["no"] * 3, 0.9),  # (3 * 2/3 + 7 * 1) / 10
        ("no", ["yes"] * 6 + ["no"] * 4, 1.0),
        ("maybe", ["yes"] * 6 + ["no"] * 4, 0.0),
        ("two", ["2"] * 5 + ["Two"] * 5, 1.0),
        ("two", ["2"] * 10, 0.0),
        ("", [""] * 10, 1.0),
        ("the", ["a"] * 5 + ["an"] * 5, 1.0),  # all become empty
        ("1000", ["1,000"] * 3 + ["999"] * 7, 0.9),
        ("red", ["red", "red", "blue"], (1 / 3 + 1 / 3 + 2 / 3) / 3),  # the same mean over fewer people
        ("cat", ["cat"], 1.0),  # a single annotation stands for everyone, hence as it stands
        ("Cat", ["cat"], 0.0),
    ],
)
def test_accuracy_by_hand(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


def test_annotations_without_ids_are_scored_as_if_they_had_them() -> None:
    """The literal program drops equal records together if nothing tells them apart; two people are two people here."""
    cases = [("no", ["no"] * matches + ["yes"] * (10 - matches)) for matches in range(10)]
    without_ids = [round(100 * value, 1) for value in reference(cases, ids=False).evalQA.values()]
    assert without_ids == [0, 30, 53.3, 70, 60, 50, 40, 30, 20, 10]
    assert [vqa_accuracy(*case) for case in cases] == list(reference(cases).evalQA.values())
    assert [round(100 * vqa_accuracy(*case)) for case in cases] == [0, 30, 60, 90, 100, 100, 100, 100, 100, 100]


def test_scoring_twice_gives_what_scoring_once_gives() -> None:
    """The literal program finds its changed ground truth unanimous the second time, and then compares as it stands."""
    cases = [("Yes", ["yes"] * 5 + ["Yes"] * 5)]
    evaluation = reference(cases)
    assert evaluation.accuracy["overall"] == 100
    evaluation.evaluate()
    assert evaluation.accuracy["overall"] == 0
    assert scored(cases) == scored(cases)
    assert scored(cases).overall == 100


@settings(deadline=None)
@given(st.text(), st.lists(st.text(), min_size=10, max_size=10), st.integers(0, 10))
def test_any_text_scores_as_the_literal_program_does(prediction: str, answers: list[str], agreeing: int) -> None:
    answers = [prediction] * agreeing + answers[agreeing:]
    accuracy = vqa_accuracy(prediction, answers)
    assert accuracy == reference([(prediction, answers)]).evalQA[0]
    assert round(accuracy, 9) in (0, 0.3, 0.6, 0.9, 1)
    assert accuracy == pytest.approx(vqa_accuracy(prediction, answers[::-1]))


@settings(deadline=None)
@given(st.text(alphabet="aA the'one1,.-;? \n\t\u0661", max_size=60))
def test_dense_texts_normalise_as_the_literal_program_does(text: str) -> None:
    assert normalize_answer(text) == REFERENCE.normalize(text)


@pytest.mark.parametrize("answers", [[], (), "yes"])
def test_answers_must_be_a_list_that_is_not_empty(answers: Any) -> None:
    with pytest.raises(ValueError, match="expected a list with at least one annotated answer, got"):
        vqa_accuracy("yes", answers)


def record(name: str, answers: list[str], **columns: str) -> dict[str, Any]:
    return {"id": name, "answers": answers, "answer_type": "other", "question_type": "what"} | columns


def test_score_reports_percentages_and_counts_by_type() -> None:
    records = [
        record("1", TEN_YES, answer_type="yes/no", image_id="7"),
        record("2", TEN_YES, answer_type="yes/no", image_id="7"),
        record("3", ["1"] * 3 + ["2"] * 7, answer_type="number", question_type="how many", image_id="8"),
        record("4", TEN_YES, answer_type="", question_type="", image_id="9"),
    ]
    result = score({"4": "no", "3": "one", "2": "no", "1": "yes"}, records)
    assert result.overall == pytest.approx(47.5)
    assert result.by_answer_type == {"yes/no": 50, "number": pytest.approx(90)}
    assert result.by_question_type == {"what": 50, "how many": pytest.approx(90)}
    assert result.counts == {"answer_type": {"yes/no": 2, "number": 1}, "question_type": {"what": 2, "how many": 1}}
    assert (result.questions, result.images) == (4, 3)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict() | {"overall": 47.5}


def test_any_of_the_answers_that_are_equally_right_scores_in_full() -> None:
    """A list of suffixes has no annotators to leave out: with two of them, one match would count a sixth."""
    answers = ["7", "digit seven"]
    either = [{**record(name, answers), "equally_right": True} for name in "1234"]
    assert score({"1": "7", "2": "digit seven", "3": " 7\n", "4": "7"}, either).overall == 100
    assert score({"1": "8", "2": "Digit seven", "3": "", "4": "7 digit seven"}, either).overall == 0
    people = [record("1", answers)]
    assert score({"1": "7"}, people).overall == pytest.approx(100 / 6)


def test_score_takes_any_iterable_of_records_once() -> None:
    assert score({"1": "yes"}, iter([record("1", TEN_YES)])).overall == 100


@pytest.mark.parametrize(
    ("predictions", "ids", "complaint"),
    [
        (["1"], ["1", "2", "3"], "each of 3 questions: 2 without a prediction ('2', '3')"),
        (["1", "2"], ["1"], "1 predicted but not asked ('2')"),
        (["1", "x"], ["1", "2"], "1 without a prediction ('2'); 1 predicted but not asked ('x')"),
        (["1"], ["1", "1"], "1 asked more than once ('1')"),
        ([], [], "nothing to score"),
        (["0"], list(map(str, range(100))), "99 without a prediction ('1', '2', '3', '4', '5', '6', ...)"),
    ],
)
def test_ids_must_agree_exactly(predictions: list[str], ids: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        score(dict.fromkeys(predictions, "yes"), [record(name, TEN_YES) for name in ids])


def test_a_question_without_annotations_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="question 'q2' has no annotated answers"):
        score({"q1": "yes", "q2": "yes"}, [record("q1", TEN_YES), record("q2", [])])


def simulated(rng: random.Random, images: int, per_image: int) -> list[dict[str, Any]]:
    """Questions of which those of one image mostly go right or wrong together; 70% right on average."""
    records = []
    for image in range(images):
        together = rng.random() < 0.7
        for question in range(per_image):
            right = together if rng.random() < 0.8 else rng.random() < 0.7
            answers = TEN_YES if right else ["no"] * 10
            records.append(record(f"{image}-{question}", answers, image_id=str(image)))
    return records


def test_the_interval_covers_the_truth_when_questions_of_an_image_agree() -> None:
    """About 95% of 300 samples; without the images the interval would be far too sure of itself."""
    rng, covered = random.Random(3), Counter[str]()
    for _ in range(300):
        records = simulated(rng, images=40, per_image=5)
        predictions = {row["id"]: "yes" for row in records}
        for name, rows in (("by image", records), ("naive", [row | {"image_id": ""} for row in records])):
            low, high = score(predictions, rows).interval
            covered[name] += low <= 70 <= high
    assert 0.91 <= covered["by image"] / 300 <= 0.99
    assert covered["naive"] / 300 < 0.8


def test_the_interval_of_independent_questions_is_wilsons() -> None:
    records = [record(str(number), TEN_YES if number < 80 else ["no"] * 10) for number in range(100)]
    low, high = score({row["id"]: "yes" for row in records}, records).interval
    assert (low, high) == pytest.approx((71.12, 86.66), abs=0.1)  # Wilson, 80 of 100


def test_the_interval_is_no_surer_than_the_number_of_questions_allows() -> None:
    """99 right and one nearly right vary less than any 100 answers that are right or wrong could."""
    records = [record(str(number), TEN_YES) for number in range(99)] + [record("99", ["yes"] * 3 + ["no"] * 7)]
    low, _ = score({row["id"]: "yes" for row in records}, records).interval
    assert low == pytest.approx(96.2, abs=0.2)  # Wilson, 99.9 of 100


@pytest.mark.parametrize(("prediction", "bounds"), [("yes", (88, 100)), ("no", (0, 12))])
def test_the_interval_has_a_width_when_all_is_right_or_wrong(prediction: str, bounds: tuple[float, float]) -> None:
    low, high = score({str(n): prediction for n in range(30)}, [record(str(n), TEN_YES) for n in range(30)]).interval
    assert (low, high) == pytest.approx(bounds, abs=1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.sampled_from(["", "1", "2", "3"])), min_size=1, max_size=40))
def test_the_interval_holds_the_accuracy_and_stays_a_percentage(questions: list[tuple[int, str]]) -> None:
    records = [
        record(str(number), ["yes"] * matches + ["no"] * (10 - matches), image_id=image)
        for number, (matches, image) in enumerate(questions)
    ]
    result = score({row["id"]: "yes" for row in records}, records)
    low, high = result.interval
    assert 0 <= low <= result.overall + 1e-9
    assert result.overall - 1e-9 <= high <= 100
    assert high - low > 1
    assert all(map(math.isfinite, result.interval))


def test_results_are_written_in_the_official_form(tmp_path: Path) -> None:
    write_results(
        tmp_path / "results.json", {"262148000": "no", "0": "2", "0042": "é", "-1": "", "9" * 30: "a", "x/1": "b"}
    )
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"question_id": 262148000, "answer": "no"},
        {"question_id": 0, "answer": "2"},
        {"question_id": "0042", "answer": "é"},
        {"question_id": "-1", "answer": ""},
        {"question_id": "9" * 30, "answer": "a"},
        {"question_id": "x/1", "answer": "b"},
    ]


@settings(deadline=None)
@given(predictions=st.dictionaries(st.text() | st.integers(0).map(str), st.text()))
def test_results_read_back_are_the_results_written(
    tmp_path_factory: pytest.TempPathFactory, predictions: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "results.json"
    write_results(path, predictions)
    assert read_results(path) == predictions


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "expected a JSON result file"),
        ("[" * 100_000, "expected a JSON result file"),
        ("\ufeffx", "expected a JSON result file"),
        ('{"question_id": 1, "answer": "a"}', "expected a list of results, got"),
        ('[{"question_id": 1, "answer": "a"}, {"question_id": 2}]', 'entry 1, got {"question_id": 2}'),
        ('[{"question_id": true, "answer": "a"}]', "entry 0"),
        ('[{"question_id": 1, "answer": 2}]', "entry 0"),
        ("[3]", "entry 0, got 3"),
        (
            '[{"question_id": 1, "answer": "a"}, {"question_id": "1", "answer": "b"}]',
            "1 occurs a second time, in entry 1",
        ),
    ],
)
def test_a_faulty_results_file_is_an_error_that_names_file_and_entry(
    tmp_path: Path, content: str, complaint: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"results\.json: .*{re.escape(complaint)}"):
        read_results(path)


@settings(deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_results_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert all(isinstance(text, str) for pair in read_results(path).items() for text in pair)


def test_the_metric_needs_the_standard_library_alone() -> None:
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]  # type: ignore[union-attr]
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= sys.stdlib_module_names
