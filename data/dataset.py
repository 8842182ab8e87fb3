"""Records -> examples: which answers of a record are learned in an epoch, and their tensors.

Not here: which records make up a step (finetune/training/batch_sampler.py), and batches (data/collate.py).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.invalid import InvalidRecord, SkippedRecords
from data.processor import Processor

TRIES = 10_000  # records drawn in the place of one that is skipped
Answers = Literal["rotate", "majority", "all", "pair", "prompt"]


class PaliGemmaDataset(Dataset[dict[str, Any]]):
    """`dataset[index, epoch]` is an example; a bare `index` is that of epoch 0.

    An example is a pure function of (seed, index, epoch), the same in every worker, rank and resumed run. It holds
    `input_ids`, `token_type_ids` and `labels`, i64[S], `pixel_values`, f32[3, H, W] or with tiles f32[5, 3, H, W],
    unless its record has no image, and the strings `id` and `image_id`. Its labels end in <eos>. With "all" it holds
    `loss_weights`, f32[S], too. With "prompt" it holds the tokens of the prefix alone, and no `labels`, but `record`,
    which is the record without its image.

    "rotate" learns one of a record's answers at a time, and the loss of its step is L / n: L the sum over the
    tokens of all answers drawn, n the number of those tokens. "all" has in place of both their expectations over the
    annotators: every distinct answer is a suffix of the one row, and each of its tokens weighs p, the share of the
    annotators who gave that answer, in L and in n. The shares of a record add up to 1. So a step of "all" is what a
    "rotate" of the same records would come to if it drew each of them once with each of its annotators. Which answers
    are distinct is a matter of their letters: "3" and "three" are two.

    Args:
        records: rows as data/records.py describes them, a `datasets.Dataset` or a list.
        processor: turns images and texts into tensors.
        answers: "rotate" learns another one of a record's answers in each epoch, in an order drawn by `seed`, until
            all were learned; "majority" learns `answer` always; "all" learns all of them in every epoch; "pair"
            gives `answer` and `rejected` as the two suffixes of a row, in this order; "prompt" asks, for an answer that
            is compared with those of the record.
        skipped: where records that cannot be used go. Another one takes the place of each, drawn by `seed` and its
            index, the same in every epoch; of those that are listed already, too. By default there may be none, and
            the first one is a ValueError.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        processor: Processor,
        answers: Answers = "rotate",
        seed: int = 0,
        skipped: SkippedRecords | None = None,
    ) -> None:
        if answers not in get_args(Answers):
            raise ValueError(f"answers is {answers!r}; expected one of {', '.join(get_args(Answers))}")
        self.records, self.processor, self.answers, self.seed = records, processor, answers, seed
        self.skipped = skipped or SkippedRecords()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        index = range(len(self))[index]  # -1 is another name of the last record, not another record
        others = random.Random(f"{self.seed}/{index}/instead")
        for _ in range(TRIES):  # or until more were skipped than may be
            record = self.records[index]
            if record["id"] not in self.skipped.reasons:
                try:
                    return self._example(record, index, epoch)
                except ValueError as error:
                    self.skipped.add([InvalidRecord(record["id"], str(error))], len(self))
            index = others.randrange(len(self))
        raise ValueError(f"{TRIES:,} records drawn in place of {record['id']} were all skipped: hardly any is valid")

    def _example(self, record: Mapping[str, Any], index: int, epoch: int) -> dict[str, Any]:
        answers, has_image = record["answers"], record["image"] is not None
        about: dict[str, Any] = {"id": record["id"], "image_id": record["image_id"]}
        if not answers:
            raise ValueError(f"record {record['id']!r} has no answer to learn from; give the annotations file")
        if self.answers == "all":
            shares = {answer: count / len(answers) for answer, count in Counter(answers).items()}
            texts = self.processor.encode_suffixes(record["prefix"], list(shares), list(shares.values()), has_image)
        elif self.answers == "pair":
            texts = self.processor.encode_suffixes(record["prefix"], pair_of(record), image=has_image)
            require_two(texts)
        elif self.answers == "prompt":
            texts = self.processor.encode(record["prefix"], image=has_image)
            about["record"] = {name: value for name, value in record.items() if name != "image"}
        else:
            order = random.Random(f"{self.seed}/{index}").sample(range(len(answers)), len(answers))
            suffix = answers[order[epoch % len(answers)]] if self.answers == "rotate" else record["answer"]
            texts = self.processor.encode(record["prefix"], suffix, has_image)
        pixels = {"pixel_values": self.processor.pixels(record["image"])} if has_image else {}
        return {**texts, **pixels, **about}


def pair_of(record: Mapping[str, Any]) -> list[str]:
    """The chosen and the rejected answer of a record. ValueError where it has no rejected one."""
    if not record.get("rejected"):
        raise ValueError(
            "it has no rejected answer, and preferences are learned from pairs: give the row a text as rejected, or "
            "leave it out"
        )
    return [record["answer"], record["rejected"]]


def require_two(texts: Mapping[str, Tensor]) -> None:
    """ValueError where both suffixes of a row are the same tokens, as when they were cut where they first differ."""
    ids, types = texts["input_ids"], texts["token_type_ids"]
    if torch.equal(ids[types == 1], ids[types == 2]):
        raise ValueError(
            "the chosen and the rejected answer are the same tokens, perhaps because both were cut at max_text_tokens: "
            "raise it, or leave the pair out"
        )
