"""Which answer an epoch learns from, and that every example is one to learn from."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from data import PaliGemmaDataset, Processor, collate
from data.dataset import Answers
from data.invalid import InvalidRecord, SkippedRecords
from data.records import FEATURES

BASE = Path(__file__).parents[2] / "assets" / "tiny-base"
TEN = ["3", "three", "4", "3 circles", "2", "1", "0", "five", "many", "six"]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BASE, 24, truncate_answers=True)


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    rows = []
    for k in range(4):
        path = tmp_path / f"{k}.png"
        Image.fromarray(np.full((8, 8, 3), 60 * k, np.uint8)).save(path)
        rows.append(
            {
                "id": f"q{k}",
                "image": {"path": str(path), "bytes": None},
                "image_id": f"i{k // 2}",
                "question": "how many?",
                "prefix": "answer en how many?",
                "answers": TEN if k < 3 else ["yes"],
                "equally_right": False,
                "answer": "3" if k < 3 else "yes",
                "rejected": "",
                "answer_type": "number",
                "extra": "",
                "question_type": "how many",
            }
        )
    return rows


def learned(example: dict[str, Any], processor: Processor) -> str:
    return processor.decode(example["labels"][example["labels"] != -100])


def test_an_example_is_the_processors_tensors_and_two_names(
    processor: Processor, records: list[dict[str, Any]]
) -> None:
    example = PaliGemmaDataset(records, processor, answers="majority")[1]
    assert sorted(example) == ["id", "image_id", "input_ids", "labels", "pixel_values", "token_type_ids"]
    assert (example["id"], example["image_id"]) == ("q1", "i0")
    for name, row in processor.encode("answer en how many?", "3").items():
        assert torch.equal(example[name], row)
    assert torch.equal(example["pixel_values"], processor.pixels(records[1]["image"]))


def test_ten_epochs_learn_ten_different_answers_and_then_again(
    processor: Processor, records: list[dict[str, Any]]
) -> None:
    dataset = PaliGemmaDataset(records, processor)
    first = [learned(dataset[0, epoch], processor) for epoch in range(10)]
    assert sorted(first) == sorted(TEN)
    assert [learned(dataset[0, epoch], processor) for epoch in range(10, 20)] == first
    assert [learned(dataset[3, epoch], processor) for epoch in range(3)] == ["yes"] * 3


def test_an_answer_is_a_pure_function_of_seed_record_and_epoch(
    processor: Processor, records: list[dict[str, Any]]
) -> None:
    def orders(seed: int) -> list[tuple[str, ...]]:
        dataset = PaliGemmaDataset(records, processor, seed=seed)
        backwards = {(i, v): learned(dataset[i, v], processor) for i in (2, 1, 0) for v in reversed(range(10))}
        return [tuple(backwards[i, v] for v in range(10)) for i in range(3)]

    assert orders(5) == orders(5)
    assert len(set(orders(5) + orders(6))) == 6  # another order for each record and seed


def test_a_bare_index_is_epoch_0_and_negative_ones_name_the_same_record(
    processor: Processor, records: list[dict[str, Any]]
) -> None:
    dataset = PaliGemmaDataset(records, processor)
    assert len(dataset) == 4
    assert torch.equal(dataset[2]["labels"], dataset[2, 0]["labels"])
    for epoch in range(10):
        assert torch.equal(dataset[-2, epoch]["labels"], dataset[2, epoch]["labels"])
    with pytest.raises(IndexError):
        dataset[4]


def test_the_majority_is_learned_in_every_epoch(processor: Processor, records: list[dict[str, Any]]) -> None:
    dataset = PaliGemmaDataset(records, processor, answers="majority")
    assert {learned(dataset[0, epoch], processor) for epoch in range(10)} == {"3"}


@pytest.mark.parametrize("suffix", ["", "yes", "a b " * 5, "a b " * 200])
@pytest.mark.parametrize("prefix", ["", "answer en how many?", "q " * 9])
def test_every_label_row_ends_in_eos_and_no_answer_leaks_into_the_prefix(
    processor: Processor, records: list[dict[str, Any]], prefix: str, suffix: str
) -> None:
    row = {**records[0], "prefix": prefix, "answers": [suffix], "answer": suffix}
    batch = collate([PaliGemmaDataset([row, records[3]], processor)[i] for i in range(2)], processor.pad_id)
    for ids, mask, types, labels in zip(
        *(batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")), strict=True
    ):
        supervised = labels != -100
        assert labels[supervised][-1] == processor.eos_id
        assert (labels == processor.eos_id).sum() == 1
        assert torch.equal(labels[supervised], ids[supervised])
        assert torch.equal(supervised, types == 1)  # every supervised position is causal, every other is prompt
        assert torch.equal(supervised.nonzero().max() + 1, mask.sum())
        assert ids[types == 0][mask[types == 0] == 1][-1] == processor.newline_id
        assert (ids == processor.bos_id).sum() == 1
        assert (ids == processor.image_token_id).sum() == processor.num_image_tokens


def test_all_distinct_answers_are_learned_in_one_row_weighted_by_their_share(
    processor: Processor, records: list[dict[str, Any]]
) -> None:
    """The same in every epoch. As often as each was drawn by ten epochs of rotate, letter by letter."""
    records[1]["answers"] = ["3", "three", "3", "Three", "3", "3", "three", "3", "4", "3"]
    dataset, rotating = PaliGemmaDataset(records, processor, "all"), PaliGemmaDataset(records, processor)
    example = dataset[1, 0]
    ids, types, weights = (example[name] for name in ("input_ids", "token_type_ids", "loss_weights"))
    learned_now = {
        processor.decode(ids[types == number]): weights[types == number].unique().tolist() for number in range(1, 5)
    }
    drawn = Counter(learned(rotating[1, epoch], processor) for epoch in range(10))
    assert drawn == {"3": 6, "three": 2, "Three": 1, "4": 1}
    assert learned_now == {answer: [pytest.approx(count / 10)] for answer, count in drawn.items()}
    assert torch.equal(example["labels"] != -100, types > 0)
    assert all(torch.equal(dataset[1, 7][name], example[name]) for name in ("input_ids", "loss_weights"))
    only = dataset[3]  # ["yes"]
    assert only["loss_weights"].tolist() == (only["labels"] != -100).tolist()
    ten = PaliGemmaDataset(records, Processor.from_pretrained(BASE), "all")[0]
    assert ten["token_type_ids"].max() == 10


def test_a_record_without_answers_is_refused_by_name(processor: Processor, records: list[dict[str, Any]]) -> None:
    records[1]["answers"] = []
    for answers in get_args(Answers):
        dataset = PaliGemmaDataset(records, processor, answers)
        with pytest.raises(ValueError, match=r"1 of 4 records .*\n  q1: record 'q1' has no answer to learn from"):
            dataset[1]
    with pytest.raises(ValueError, match="answers is 'some'; expected one of rotate, majority, all"):
        PaliGemmaDataset(records, processor, answers="some")  # type: ignore[arg-type]


def test_a_pickled_mapped_dataset_gives_the_same_examples(processor: Processor, records: list[dict[str, Any]]) -> None:
    """What a worker of a DataLoader gets."""
    records[0]["prefix"] = "<image>what is this?"
    mapped = datasets.Dataset.from_list(records, features=FEATURES)
    worker = pickle.loads(pickle.dumps(PaliGemmaDataset(mapped, processor)))
    here = PaliGemmaDataset(records, processor)
    for key in [(i, epoch) for i in range(4) for epoch in range(2)]:
        example = worker[key]
        for name, value in here[key].items():
            assert torch.equal(example[name], value) if isinstance(value, torch.Tensor) else example[name] == value


def test_another_record_takes_the_place_of_one_that_cannot_be_used(
    processor: Processor, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The same in every epoch, in every process; the others are what they would have been."""
    whole = PaliGemmaDataset(records, processor)
    Path(records[2]["image"]["path"]).write_bytes(b"broken")
    datasets = [
        PaliGemmaDataset(records, processor, skipped=SkippedRecords(tmp_path / "left.jsonl", 0.5)) for _ in range(2)
    ]
    taken = {dataset[2, epoch]["id"] for dataset in datasets for epoch in range(5)}
    assert len(taken) == 1
    assert taken < {"q0", "q1", "q3"}
    assert list(datasets[0].skipped.reasons) == ["q2"]
    assert "cannot identify" in datasets[0].skipped.reasons["q2"]
    for index in (0, 1, 3):
        assert torch.equal(datasets[0][index, 1]["input_ids"], whole[index, 1]["input_ids"])
    for index in (0, 1, 3):
        Path(records[index]["image"]["path"]).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"3 of 4 records .* more than the 50\.0%"):
        datasets[0][0]


def test_what_is_listed_as_skipped_is_never_learned_from(processor: Processor, records: list[dict[str, Any]]) -> None:
    """Also in the epochs whose answer would fit: the list says what was skipped. And nothing valid is an error."""
    skipped = SkippedRecords(share=0.5)
    skipped.add([InvalidRecord("q1", "one of its answers does not fit")], 4)
    dataset = PaliGemmaDataset(records, processor, skipped=skipped)
    taken = {dataset[1, epoch]["id"] for epoch in range(10)}
    assert len(taken) == 1
    assert taken < {"q0", "q2", "q3"}
    assert [dataset[index]["id"] for index in (0, 2, 3)] == ["q0", "q2", "q3"]
    with pytest.raises(ValueError, match="hardly any is valid"):
        PaliGemmaDataset(records[1:2], processor, skipped=skipped)[0]
