"""The most likely of the allowed answers: as each is scored in a row of its own; and what a file of them may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from data import Processor
from data.synthetic.scenes import write as write_scenes
from finetune.evaluation.candidates import LISTED, MOST_LABELS, Candidates, labels_of, most_likely, read_candidates
from finetune.evaluation.evaluate import choose_answers, evaluate
from finetune.evaluation.mixture import MixtureTask
from finetune.evaluation.tasks import TASKS
from finetune.system import distributed
from model import PaliGemma
from tests import rounding

BASE = Path(__file__).parents[2] / "assets/tiny-base"
CANDIDATES = ["a red circle", "a blue square", "red", "a green triangle and a red square", "yes"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two prompts about each of three scenes, in mixed order."""
    directory = tmp_path_factory.mktemp("scenes")
    write_scenes(directory, scenes=3, seed=3, split="val2014")
    images = sorted((directory / "images").iterdir())[:3]
    common = {"question": "", "answer_type": "", "question_type": "", "equally_right": True}
    return [
        common
        | {"id": f"{prompt}/{path.stem}", "image": str(path), "image_id": path.stem, "prefix": prompt}
        | {"answers": ["Yes"], "answer": "Yes"}
        for prompt in ("caption en", "answer en is there a circle?")
        for path in images
    ]


@pytest.fixture(scope="module")
def network() -> tuple[PaliGemma, Processor]:
    model = PaliGemma.from_pretrained(BASE, torch.float32)
    return rounding.in_dtype(model, torch.float64), Processor.from_pretrained(BASE)


def brute_force(model: PaliGemma, processor: Processor, record: dict[str, Any]) -> torch.Tensor:
    """Log-probability f64 [K] of each candidate in a row of its own: of its tokens, and <eos>."""
    found = []
    for text in CANDIDATES:
        row = processor([record["image"]], [record["prefix"]], [text])
        labels = row["labels"][0]
        with torch.inference_mode():
            out = model(**row | {"pixel_values": row["pixel_values"].double()})
        targets = labels[labels != -100]
        found.append(out.logits.double().log_softmax(-1).gather(1, targets[:, None]).sum())
    return torch.stack(found)


def test_the_chosen_one_is_the_most_likely_in_a_row_of_its_own(
    records: list[dict[str, Any]], network: tuple[PaliGemma, Processor]
) -> None:
    """Whatever the batch; its confidence is its share, and each image passes the vision tower once."""
    model, processor = network
    encoded: list[int] = []
    hook = model.vision_tower.register_forward_hook(lambda _module, inputs, _output: encoded.append(len(inputs[0])))
    with rounding.KeepFP64():
        answers = choose_answers(model, processor, records, CANDIDATES, batch_size=4)
        assert sum(encoded) == 3
        hook.remove()
        expected = {record["id"]: brute_force(model, processor, record) for record in records}
    assert list(answers) == [record["id"] for record in records]
    assert len({answer.text for answer in answers.values()}) > 1
    for name, answer in answers.items():
        shares, log_probs = expected[name].softmax(0), expected[name]
        assert answer.text == CANDIDATES[int(log_probs.argmax())]
        ranked = [CANDIDATES[k] for k in log_probs.argsort(descending=True).tolist()][:LISTED]
        assert [text for text, _ in answer.candidates] == ranked
        assert answer.confidence == pytest.approx(float(shares.max()), rel=1e-6)
        tokens = len(processor.answer_ids(answer.text))
        assert answer.log_prob == pytest.approx(float(log_probs.max()) / tokens, rel=1e-6)
        assert answer.finished


def test_out_of_memory_and_several_processes_choose_the_same(
    records: list[dict[str, Any]], network: tuple[PaliGemma, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = network

    def choose(size: int) -> dict[str, str]:
        found = choose_answers(model, processor, records, CANDIDATES, size)
        return {name: answer.text for name, answer in found.items()}

    def small(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.AcceleratorError("CUDA error: out of memory")

    with rounding.KeepFP64():
        one = choose(6)
        hook = model.language_model.model.register_forward_pre_hook(small)
        with pytest.warns(UserWarning, match="out of memory with 6 questions at once"):
            assert choose(6) == one
        hook.remove()
        shares: list[Any] = []

        def gather(answers: Any) -> list[Any]:
            """By way of JSON, as `distributed.gather`; the last process has all."""
            shares.append(json.loads(json.dumps(answers)))
            return shares

        monkeypatch.setattr(distributed, "count", lambda: 2)
        monkeypatch.setattr(distributed, "gather", gather)
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            answers = choose_answers(model, processor, records, CANDIDATES)
    assert [len(share) for share in shares] == [4, 2]
    assert {name: answer.text for name, answer in answers.items()} == one
    assert all(
        len(answer.candidates) == LISTED and answer.candidates[0][0] == answer.text for answer in answers.values()
    )


def test_candidates_take_the_place_of_generated_answers_and_are_written(
    records: list[dict[str, Any]], network: tuple[PaliGemma, Processor], tmp_path: Path
) -> None:
    with rounding.KeepFP64():
        found = evaluate(*network, records, TASKS["answer"], 2, Candidates(["yes", "no"]))
    assert set(found.answers.values()) <= {"yes", "no"}
    found.save(tmp_path, records)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["candidates"], "max_new_tokens" in metrics) == (["yes", "no"], False)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for line in lines:
        assert [one["answer"] for one in line["candidates"]] in (["yes", "no"], ["no", "yes"])
        assert sum(one["probability"] for one in line["candidates"]) == pytest.approx(1, abs=1e-3)
        assert (line["candidates"][0]["answer"], line["candidates"][0]["probability"]) == (
            line["answer"],
            line["confidence"],
        )


def test_labels_are_looked_at_beside_generated_answers(
    records: list[dict[str, Any]], network: tuple[PaliGemma, Processor], tmp_path: Path
) -> None:
    """The metric stays that of what is generated; of several sources the one whose answers are labels has them."""
    labels = ["yes", "a red circle"]
    with rounding.KeepFP64():
        found = evaluate(*network, records, TASKS["classify"], 1, Candidates(labels={"": labels}))
        plain = evaluate(*network, records, TASKS["classify"], 1)
        chosen = choose_answers(*network, records, labels)
        mixture = MixtureTask({"caption en": TASKS["answer"], "answer en is there a circle?": TASKS["classify"]})
        asked = {"answer en is there a circle?": labels}
        mixed = evaluate(*network, records, mixture, 1, Candidates(labels=asked))
    right = [answer.text == "yes" for answer in chosen.values()]
    assert found.score.others.pop("accuracy among labels") == pytest.approx(100 * sum(right) / 6)
    assert found.score == plain.score
    assert found.given == plain.given
    assert "accuracy among labels" not in mixed.score.by_source["caption en"].others
    of_source = mixed.score.by_source["answer en is there a circle?"].others
    assert of_source["accuracy among labels"] == pytest.approx(100 * sum(right[3:]) / 3)
    lines = list(mixed.answered(records))
    assert ["candidates" in line for line in lines] == [False] * 3 + [True] * 3


def test_of_equally_likely_candidates_the_first_is_taken() -> None:
    answer = most_likely(["a", "b", "c", "d"], torch.tensor([-2.0, -1.0, -1.0, -3.0]), torch.tensor([1, 2, 1, 1]))
    assert (answer.text, answer.log_prob, [text for text, _ in answer.candidates]) == ("b", -0.5, ["b", "c", "a"])


def test_a_file_has_an_answer_a_line(tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    file.write_bytes("\ufeffyes\r\n no \r\nvielleicht\u2028ja\n".encode())
    assert read_candidates(file) == ["yes", "no", "vielleicht\u2028ja"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"yes\n\nno\n", "line 2, is empty; expected one answer a line: delete that line"),
        (b"yes\nno\n yes\n", "line 3, is 'yes', as line 1 is; expected each answer once"),
        (b"", "line 1, is empty"),
        (b"yes\n", "has the one answer 'yes'; expected at least two"),
        (b"yes\n\xff\n", "is not valid UTF-8 .*save the file as UTF-8"),
        (None, "cannot be read .No such file or directory.; expected a file with one answer a line"),
    ],
)
def test_what_a_file_may_not_hold_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "answers.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"answers\.txt,? {message}"):
        read_candidates(file)


def test_a_candidate_with_a_special_token_is_refused(network: tuple[PaliGemma, Processor]) -> None:
    with pytest.raises(ValueError, match="holds the special token <eos>"):
        choose_answers(*network, [], ["yes", "no<eos>"])


def test_labels_are_the_distinct_right_answers_and_not_too_many() -> None:
    def rows(*answers: list[str]) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"answer": (a or [""])[0], "answers": a} for a in answers])

    assert labels_of(rows(["cat"], [], ["dog", "hound"], ["cat"]), rows(["cow"])) == ["cat", "dog", "cow"]
    assert len(labels_of(rows(*([str(k)] for k in range(MOST_LABELS))))) == MOST_LABELS
    with pytest.raises(ValueError, match=r"201 distinct right answers; at most 200 .*: --candidates FILE, with"):
        labels_of(rows(*([str(k)] for k in range(MOST_LABELS + 1))))
