"""The official VQA accuracy, exactly, and the official result file.

An answer counts fully when at least three of the other nine people gave it; leaving out each of the ten people in turn
and taking the mean gives 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 or more matches. Source: VQA (arXiv 1505.00468) and its
evaluation program (GT-Vision-Lab/VQA), whose text rules are followed as they behave, also where they look like slips:

- If all answers of a question are identical, texts are compared as they stand: "Yes" does not match "yes".
- Whether a punctuation mark is deleted or becomes a space depends on the whole text, not on the mark's surroundings.
- Of the periods that no digit follows the first 32 are removed: a flag was passed where the count belongs.
- The program changes the ground truth in place, so scoring twice differs there. Here every call is like its first.
- The program leaves out every annotation equal to the one left out. Two people who say the same are two people here,
  as their distinct `answer_id` says in the official files; annotations without ids are scored as if they had them.

One annotated answer alone (not a VQA file) is scored as if everyone had given it: 1 if equal, else 0. Not here: other
metrics (tasks.py), means and intervals (score.py), reading annotations (`data`), producing answers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_FULL_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Each is recognised with any one of its apostrophes missing; one entry of the official table goes the other way.
# Left out are six entries without effect: four with capitals, as words are in lower case, and two that change nothing.
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    full[:place] + full[place + 1 :]: full
    for full in _FULL_CONTRACTIONS.split()
    for place in (match.start() for match in re.finditer("'", full))
}


def strip_answer(text: str) -> str:
    """What is done to every text, also where texts are otherwise compared as they stand."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """Whitespace, punctuation, periods, case, number words, articles and contractions, in this order."""
    plain = text = strip_answer(text)
    has_digit_comma = re.search("[0-9],[0-9]", text) is not None
    for mark in _PUNCTUATION:
        deleted = has_digit_comma or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if deleted else " ")
    plain = re.sub(r"\.(?![0-9])", "", plain, count=32)
    words = (_DIGITS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of one prediction against what people answered (ten of them in VQA)."""
    if isinstance(answers, str) or not answers:
        raise ValueError(f"expected a list with at least one annotated answer, got {answers!r}")
    prediction, answers = strip_answer(prediction), [strip_answer(answer) for answer in answers]
    if len(answers) == 1:
        return float(prediction == answers[0])
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    equal = [answer == prediction for answer in answers]
    # Summed as the official program does, so that not even the last bit can turn a rounded figure.
    return sum(min(1.0, (sum(equal) - skipped) / 3) for skipped in equal) / len(equal)


def write_results(path: str | Path, predictions: Mapping[str, str]) -> None:
    """Write the official file, `[{"question_id": int, "answer": str}, ...]`; ids that are not decimal stay text."""
    ids = {name: int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else name for name in predictions}
    rows = [{"question_id": ids[name], "answer": answer} for name, answer in predictions.items()]
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


def read_results(path: str | Path) -> dict[str, str]:
    """Read an official result file into id -> answer. Raises ValueError that names the file and the entry at fault."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON result file: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of results, got {json.dumps(rows)[:200]}")
    predictions: dict[str, str] = {}
    for index, row in enumerate(rows):
        name, answer = (row.get("question_id"), row.get("answer")) if isinstance(row, dict) else (None, None)
        if type(name) not in (int, str) or type(answer) is not str:
            raise ValueError(f"{path}: expected question_id and answer in entry {index}, got {json.dumps(row)[:200]}")
        if str(name) in predictions:
            raise ValueError(f"{path}: question_id {name} occurs a second time, in entry {index}")
        predictions[str(name)] = answer
    return predictions
