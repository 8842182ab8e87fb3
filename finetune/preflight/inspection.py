"""What the network is about to be taught, looked at before hours are spent: structure of a batch, and leaks.

An answer leaks where editing it changes what the network predicts before it. Then training looks perfect, and the
trained network is useless.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data import PaliGemmaDataset, collate
from finetune.config.schema import RunConfig
from finetune.system.console import new_table, show
from finetune.system.terminal import shortened
from finetune.training.examples import network_config, open_examples, open_processor, skipped_records
from finetune.training.setup import open_model
from model import IGNORE_INDEX, PaliGemma, fetch
from model.convert import convert


def inspect(config: RunConfig) -> None:
    """The first examples as the network sees them, checked for what would ruin the training. Nothing is written."""
    directory = fetch(config.model.path, config.model.revision)
    processor = open_processor(directory, config)
    examples = open_examples(config, "train", processor, skipped_records(config, "train", listed=False))
    dataset = PaliGemmaDataset(examples.records, processor, config.data.answers, config.train.seed, examples.skipped)
    model = open_model(directory, config)
    convert(model, network_config(directory, config))
    first = [dataset[index] for index in range(min(8, len(dataset)))]
    table = new_table("id", "prefix", "learns to answer", "tokens", "supervised")
    for index, example in enumerate(first):
        ids, types = example["input_ids"], example["token_type_ids"]
        answers = [processor.decode(ids[types == number]) for number in range(1, int(types.max()) + 1)]
        prefix = processor.prompt(dataset.records[index]["prefix"])
        texts = map(shortened, (prefix, " | ".join(answers)))
        table.add_row(example["id"], *texts, str(len(ids)), str(int((types > 0).sum())))
    show(table)
    batch = {name: tensor.to(model.device) for name, tensor in collate(first, processor.pad_id).items()}
    if problems := problems_of(model, batch):
        raise ValueError("these examples would ruin the training:\n  " + "\n  ".join(problems))
    show("in order: image tokens, <bos>, prefix, newline, answer, <eos>; and no answer leaks into what comes before it")


def problems_of(model: PaliGemma, batch: dict[str, Tensor]) -> list[str]:
    """Everything wrong with a collated batch, in words; empty when it is as PaliGemma was trained.

    Args:
        batch: right-padded `input_ids`, `attention_mask`, `token_type_ids`, `labels` i64 [B, S] and `pixel_values`.
    """
    found = []
    for row in range(len(batch["input_ids"])):
        found += [f"row {row}: {problem}" for problem in structure_of(model, {n: t[row] for n, t in batch.items()})]
    return found + leaks_of(model, batch)


def structure_of(model: PaliGemma, row: dict[str, Tensor]) -> list[str]:
    """What is wrong with one row [S]: image tokens, bos, token types, labels, eos."""
    config = model.config
    length = int(row["attention_mask"].sum())
    ids, types, labels = (row[name][:length].tolist() for name in ("input_ids", "token_type_ids", "labels"))
    expected = config.num_image_tokens
    supervised = [label != IGNORE_INDEX for label in labels]
    ends = [label for label, kind, after in zip(labels, types, [*types[1:], 0], strict=True) if kind and kind != after]
    checks = {
        f"{ids.count(config.image_token_id)} image tokens, expected {expected} at the start": (
            ids[:expected] == [config.image_token_id] * expected and ids.count(config.image_token_id) == expected
        ),
        f"{ids.count(config.bos_token_id)} <bos>, expected one after the image tokens": (
            ids.count(config.bos_token_id) == 1 and ids[expected] == config.bos_token_id
        ),
        "token types are not 0 for the prefix, then 1 for the suffix, 2 for a second one": (
            types == sorted(types) and types[-1] > 0
        ),
        "labels are not the suffix, and the suffix alone": (
            supervised == [kind > 0 for kind in types]
            and all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True))
        ),
        "the answer does not end in <eos>: the network would never stop": set(ends) == {config.eos_token_id},
    }
    return [problem for problem, right in checks.items() if not right]


@torch.inference_mode()
def leaks_of(model: PaliGemma, batch: dict[str, Tensor]) -> list[str]:
    """Rows in which an edit of the first supervised token moves a prediction made before it."""
    model.eval()
    supervised = (batch["labels"] != IGNORE_INDEX) & (batch["input_ids"] != model.config.image_token_id)
    first = supervised.long().argmax(dim=1)  # (B,)
    rows = torch.arange(len(first), device=first.device)
    edited = batch["input_ids"].clone()
    special = max(model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    edited[rows, first] = torch.where(edited[rows, first] == special + 1, special + 2, special + 1)
    features = model.encode_images(batch["pixel_values"])
    before, after = (
        model.hidden_states(ids, features, batch["attention_mask"], batch["token_type_ids"])
        for ids in (batch["input_ids"], edited)
    )
    moved = (before != after).any(dim=-1)  # (B, S)
    early = moved & (torch.arange(moved.shape[1], device=first.device) < first[:, None])
    return [f"row {row}: the answer leaks into the prefix" for row in early.any(dim=1).nonzero()[:, 0].tolist()]
