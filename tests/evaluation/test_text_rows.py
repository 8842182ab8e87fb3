"""Records of text alone among records with images: each answers, scores and counts as it does by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data import Processor, collate
from data.text_rows import own_image_id
from finetune.evaluation.answer import Answer
from finetune.evaluation.batches import Batches
from finetune.evaluation.evaluate import choose_answers, generate_answers, mean_loss
from finetune.evaluation.mixture import MixtureTask
from finetune.evaluation.tasks import TASKS
from finetune.system import distributed
from model import PaliGemma
from tests import rounding
from tests.images import IMAGE

BASE = Path(__file__).parents[2] / "assets/tiny-base"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BASE)


@pytest.fixture
def model() -> PaliGemma:
    return PaliGemma.from_pretrained(BASE, torch.float32)


def record(id: str, prefix: str, image: dict[str, Any] | None = None) -> dict[str, Any]:
    about = {"image": image, "image_id": "logo" if image else own_image_id(id)}
    types = {"answer_type": "", "question_type": "", "equally_right": True}
    return {"id": id, **about, **types, "prefix": prefix, "question": prefix, "answers": ["2"], "answer": "2"}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """In mixed order: four about one image, five of text alone."""
    prefixes = ["caption en", "caption en red", "answer en is it?", "answer en how many red circles?"]
    of_image = [record(f"{i}", prefix, {"bytes": IMAGE, "path": None}) for i, prefix in enumerate(prefixes)]
    of_text = [record(f"t{i}", prefix) for i, prefix in enumerate([*prefixes, "answer en 1 and 1"])]
    mixed: list[dict[str, Any]] = [one for pair in zip(of_text, of_image, strict=False) for one in pair]
    return [*mixed, of_text[-1]]


def asked_alone(processor: Processor, one: dict[str, Any]) -> dict[str, Any]:
    row = processor.encode(one["prefix"], image=one["image"] is not None)
    return collate([row if one["image"] is None else row | {"pixel_values": processor.pixels(one["image"])}], 0)


def test_records_of_both_kinds_answer_as_each_alone(
    model: PaliGemma, processor: Processor, records: list[dict[str, Any]]
) -> None:
    encoded: list[int] = []
    hook = model.vision_tower.register_forward_hook(lambda _module, inputs, _output: encoded.append(len(inputs[0])))
    answers = generate_answers(model, processor, records, batch_size=3, max_new_tokens=8)
    hook.remove()
    assert encoded == [1]
    assert list(answers) == [one["id"] for one in records]
    for one in records:
        inputs = asked_alone(processor, one)
        inputs.pop("token_type_ids")
        assert answers[one["id"]].text == processor.decode(model.generate(**inputs, max_new_tokens=8)[0])
    assert answers["0"].text != answers["t0"].text  # the same prompt, with an image and without


def test_the_most_likely_candidate_is_that_of_each_alone(
    model: PaliGemma, processor: Processor, records: list[dict[str, Any]]
) -> None:
    candidates = ["yes", "no", "two squares"]
    chosen = choose_answers(model, processor, records, candidates, batch_size=4)
    tokens = [processor.answer_ids(text) for text in candidates]
    for one in records:
        inputs = asked_alone(processor, one)
        scores = model.score(inputs["input_ids"], [tokens], inputs.get("pixel_values"))
        assert chosen[one["id"]].text == candidates[int(scores.log_probs[0].argmax())]


def test_the_loss_does_not_depend_on_the_batches(
    model: PaliGemma, processor: Processor, records: list[dict[str, Any]]
) -> None:
    exact = rounding.in_dtype(model, torch.float64)
    with rounding.KeepFP64():
        sizes = [torch.tensor(mean_loss(exact, processor, records, size), dtype=torch.float64) for size in (1, 3, 9)]
    for found in sizes[1:]:
        rounding.assert_exact(found, sizes[0])


def test_of_two_processes_each_has_a_share_of_the_texts(
    model: PaliGemma, processor: Processor, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine])
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(set(generate_answers(model, processor, records, max_new_tokens=1, batch_size=2)))
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == {one["id"] for one in records}
    assert sorted(len([name for name in share if name.startswith("t")]) for share in shares) == [2, 3]


@pytest.mark.parametrize("border", [0, 1, 8, 10, 21])
@pytest.mark.parametrize("fails", [(), (0,), (1, 2)])
def test_no_batch_is_of_both_kinds_and_each_index_comes_once(border: int, fails: tuple[int, ...]) -> None:
    batches, done = Batches(list(range(21)), 8, border), list[int]()
    expected = -(-border // 8) + -(-(21 - border) // 8)
    assert len(batches) == expected
    for attempt, batch in enumerate(batches):
        assert len({index < border for index in batch}) == 1
        if attempt in fails and len(batch) > 1:
            with pytest.warns(UserWarning, match=f"with {len(batch)} questions at once .why.: repeated"):
                batches.halve("why")
        else:
            done += batch
    assert done == list(range(21))


def test_a_score_counts_images_and_takes_each_text_for_itself(records: list[dict[str, Any]]) -> None:
    answers = {one["id"]: Answer("2" if i % 2 else "3", True, -0.1) for i, one in enumerate(records)}
    score = TASKS["answer"].score(answers, records)
    assert (score.questions, score.images) == (9, 1)
    of_texts = TASKS["answer"].score({f"t{i}": answers[f"t{i}"] for i in range(5)}, records[::2])
    assert (of_texts.questions, of_texts.images) == (5, 0)
    spread = [one | {"image_id": f"image {i}"} for i, one in enumerate(records[::2])]
    assert (
        of_texts.interval == TASKS["answer"].score({one["id"]: answers[one["id"]] for one in spread}, spread).interval
    )
    named = [one | {"id": f"all/{one['id']}"} for one in records]
    mixed = MixtureTask({"all": TASKS["answer"]}).score({f"all/{id}": one for id, one in answers.items()}, named)
    assert mixed.images == 1
