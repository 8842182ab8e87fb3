"""Answers in batches, questions of one image together: the same as one by one, and each image encoded once."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from data import Processor
from data.image_form import ImageForm
from data.records import load_records
from data.synthetic.scenes import write as write_scenes
from finetune.evaluation.answer import Answer
from finetune.evaluation.batches import Batches
from finetune.evaluation.evaluate import generate_answers, mean_loss
from finetune.system import distributed
from model import ConnectorConfig, PaliGemma
from model.convert import changed, convert
from tests import rounding

BASE = Path(__file__).parents[2] / "assets/tiny-base"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Two captions (the tiny base can do those) of each of five scenes, in mixed order."""
    directory = tmp_path_factory.mktemp("scenes")
    write_scenes(directory, scenes=5, seed=3, split="val2014")
    source = load_records(
        questions=f"{directory}/v2_OpenEnded_mscoco_val2014_questions.json",
        annotations=f"{directory}/v2_mscoco_val2014_annotations.json",
        images=f"{directory}/images",
    )
    images = {record["image_id"]: record for record in source}
    return [
        {**record, "id": f"{record['id']}-{start}", "prefix": f"caption en {start}".strip(), "answer": "a red circle"}
        for start in ("", "red")
        for record in images.values()
    ]


def test_a_batch_of_several_images_answers_as_each_record_alone(records: list[dict[str, object]]) -> None:
    model, processor = PaliGemma.from_pretrained(BASE, torch.float32), Processor.from_pretrained(BASE)
    encoded: list[int] = []
    model.vision_tower.register_forward_hook(lambda _module, inputs, _output: encoded.append(len(inputs[0])))
    answers = generate_answers(model, processor, records, batch_size=3, max_new_tokens=12)
    assert sum(encoded) == 5
    assert list(answers) == [record["id"] for record in records]
    assert len({answer.text for answer in answers.values()}) > 4  # the images differ, and so do their captions
    for answer in answers.values():
        pieces = [piece for piece, _ in answer.tokens]
        assert "".join(pieces).removesuffix("<eos>").strip() == answer.text
        assert (pieces[-1] == "<eos>") == answer.finished
        assert statistics.fmean(found for _, found in answer.tokens) == pytest.approx(answer.log_prob)
    for record in records:
        batch = processor(images=[record["image"]], prefixes=[record["prefix"]])  # type: ignore[list-item]
        alone = processor.decode(model.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=12)[0])
        assert answers[str(record["id"])].text == alone


def test_the_mean_loss_does_not_depend_on_the_batches(records: list[dict[str, object]]) -> None:
    model, processor = PaliGemma.from_pretrained(BASE, torch.float32), Processor.from_pretrained(BASE)
    exact = rounding.in_dtype(model, torch.float64)
    with rounding.KeepFP64():
        losses = [torch.tensor(mean_loss(exact, processor, records, size), dtype=torch.float64) for size in (3, 10)]
    rounding.assert_exact(*losses)


@pytest.mark.parametrize("connector", [None, ConnectorConfig("pixel_shuffle")], ids=["linear", "pixel_shuffle"])
def test_images_with_tiles_are_answered_as_each_record_alone(
    records: list[dict[str, object]], connector: ConnectorConfig | None
) -> None:
    """And each image passes the vision tower once, five views at a time; the loss does not depend on the batches."""
    model = PaliGemma.from_pretrained(BASE, torch.float32)
    convert(model, changed(model.config, connector, tiles=4))
    form = ImageForm(model.config.vision.image_size, 4, "squash", model.config.num_image_tokens)
    processor = Processor.from_pretrained(BASE, image_form=form)
    encoded: list[int] = []
    hook = model.vision_tower.register_forward_hook(lambda _module, inputs, _output: encoded.append(len(inputs[0])))
    answers = generate_answers(model, processor, records, batch_size=3, max_new_tokens=6)
    assert sum(encoded) == 5 * 5
    hook.remove()
    assert list(answers) == [record["id"] for record in records]
    assert len({answer.text for answer in answers.values()}) > 2
    for record in records:
        batch = processor(images=[record["image"]], prefixes=[record["prefix"]])  # type: ignore[list-item]
        alone = processor.decode(model.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=6)[0])
        assert answers[str(record["id"])].text == alone
    exact = rounding.in_dtype(model, torch.float64)
    with rounding.KeepFP64():
        losses = [torch.tensor(mean_loss(exact, processor, records, size), dtype=torch.float64) for size in (3, 10)]
    rounding.assert_exact(*losses)


@pytest.mark.parametrize("where", ["language_model", "vision_tower"])
def test_out_of_memory_the_batch_is_repeated_in_halves(records: list[dict[str, object]], where: str) -> None:
    """No answer is lost or given twice, and the smaller batches are kept; the loss likewise."""
    model, processor = PaliGemma.from_pretrained(BASE, torch.float32), Processor.from_pretrained(BASE)
    expected = generate_answers(model, processor, records, max_new_tokens=4, batch_size=8)
    loss = mean_loss(model, processor, records, batch_size=8)
    most = 2 if where == "language_model" else 1  # five images, ten questions
    sizes: list[int] = []

    def small(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.AcceleratorError("CUDA error: out of memory")

    part = model.language_model.model if where == "language_model" else model.vision_tower
    part.register_forward_pre_hook(small)
    with pytest.warns(UserWarning, match="out of memory with 8 questions at once"):
        found = generate_answers(model, processor, records, max_new_tokens=4, batch_size=8)
    assert found == expected
    assert sizes[0] > most >= max(sizes[4:])
    with pytest.warns(UserWarning, match=r"\(CUDA error: out of memory\): repeated, and from here on 4 at once"):
        assert mean_loss(model, processor, records, 8) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("fails", [(), (0,), (1,), (2,), (0, 1), (0, 1, 2, 3), (2, 3)])
def test_batches_give_each_index_once(fails: tuple[int, ...]) -> None:
    """Whichever attempts run out of memory."""
    batches, done = Batches(list(range(21)), 8, 21), list[int]()
    for attempt, batch in enumerate(batches):
        if attempt in fails and len(batch) > 1:
            with pytest.warns(UserWarning, match=f"with {len(batch)} questions at once .why.: repeated"):
                batches.halve("why")
        else:
            done += batch
    assert done == list(range(21))


def test_one_question_that_does_not_fit_and_other_errors_are_raised(records: list[dict[str, object]]) -> None:
    model, processor = PaliGemma.from_pretrained(BASE, torch.float32), Processor.from_pretrained(BASE)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: device-side assert")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        handle = model.vision_tower.register_forward_pre_hook(fail)
        with pytest.raises(type(error), match="CUDA"):
            generate_answers(model, processor, records, max_new_tokens=4, batch_size=1)
        handle.remove()


def test_processes_share_the_images(records: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two takes other images, with all their questions, and what both have is what one process would."""
    model, processor = PaliGemma.from_pretrained(BASE, torch.float32), Processor.from_pretrained(BASE)
    encoded: list[int] = []
    model.vision_tower.register_forward_hook(lambda _module, inputs, _output: encoded.append(len(inputs[0])))
    one = generate_answers(model, processor, records, max_new_tokens=4)
    shares: list[dict[str, Answer]] = []

    def gather(answers: dict[str, Answer]) -> Any:
        """By way of JSON, as `distributed.gather`."""
        shares.append(answers)
        return json.loads(json.dumps([one]))

    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert generate_answers(model, processor, records, max_new_tokens=4) == one
    assert encoded == [5, 3, 2]
    assert [len(share) for share in shares] == [6, 4]
    assert {**shares[0], **shares[1]} == one
