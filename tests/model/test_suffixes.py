"""Several suffixes of one prefix in one row: each is what it is in a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune import LoRAConfig, inject_lora
from finetune.lora.protocol import trained_parameters
from model import ConnectorConfig, PaliGemma, TokenBatch, prefix_lm_mask
from model.batch import token_positions
from model.convert import changed, convert
from tests import rounding, suffixes, tiny

LENGTHS = [1, 4, 2, 3, 1, 5, 2, 2, 3, 1]
IMAGE = 120
ITEMS = 7.5  # of a step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))


def network(base: Path, connector: ConnectorConfig | None = None, tiles: int = 1) -> PaliGemma:
    """In fp64, with adapters off their start everywhere."""
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    convert(model, changed(model.config, connector, tiles=tiles))
    inject_lora(model, LoRAConfig(rank=4, targets=("language.*", "vision.*")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return rounding.in_dtype(model, torch.float64).train()


def pixels(model: PaliGemma, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(rows, *model.config.pixel_shape, dtype=torch.float64, generator=generator) * 2 - 1


def gradients(model: PaliGemma) -> dict[str, Tensor]:
    """Those of the adapters, taken off them."""
    found = {name: p.grad for name, p in trained_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    return found


def assert_as_apart(model: PaliGemma, prompts: Sequence[int], lengths: Sequence[Sequence[int]]) -> None:
    """Logits, loss and gradients of weighted suffixes together, and of the same ones in rows of their own."""
    rows = suffixes.random_rows(model.config.num_image_tokens, IMAGE, prompts, lengths)
    asked, answers, weights = rows
    images = pixels(model, len(prompts))
    with rounding.KeepFP64():
        out = model(**suffixes.together(*rows), pixel_values=images, num_items_in_batch=ITEMS)
        assert out.loss is not None
        out.loss.backward()
        packed = {"logits": out.logits, "loss": out.loss, **gradients(model)}
        logits, loss = [], torch.zeros((), dtype=torch.float64)
        of_row = [row for row, given in enumerate(answers) for _ in given]
        flat = [torch.tensor(weight) for given in weights for weight in given]  # rounded to fp32, as in the batch
        for batch, row, weight in zip(suffixes.apart(asked, answers), of_row, flat, strict=True):
            one = model(**batch, pixel_values=images[row : row + 1], num_items_in_batch=ITEMS)
            (weight.double() * one.loss).backward()
            logits.append(one.logits)
            loss = loss + weight.double() * one.loss.detach()
    rounding.assert_exact(packed, {"logits": torch.cat(logits), "loss": loss, **gradients(model)})


@pytest.mark.parametrize("count", range(1, 11))
def test_logits_loss_and_gradients_are_those_of_separate_rows(base: Path, count: int) -> None:
    """Padded: three rows of other prompts and other numbers of suffixes, of other lengths."""
    lengths = [LENGTHS[:count], LENGTHS[count - 1 :: -1], LENGTHS[: max(1, count // 2)]]
    assert_as_apart(network(base), [5, 9, 3], lengths)


@pytest.mark.parametrize("kind", ["tiles", "resampler"])
def test_so_they_are_with_more_or_fewer_image_tokens(base: Path, kind: str) -> None:
    connector = ConnectorConfig("resampler", latents=3, depth=1) if kind == "resampler" else None
    model = network(base, connector, tiles=4 if kind == "tiles" else 1)
    assert model.config.num_image_tokens == {"tiles": 20, "resampler": 3}[kind]
    assert_as_apart(model, [5, 2], [LENGTHS[:3], LENGTHS[3:8]])


@pytest.mark.parametrize("layers", [1, 3])
def test_so_they_are_with_layers_recomputed(base: Path, layers: int) -> None:
    model = network(base)
    model.language_model.model.set_recompute(layers)
    assert_as_apart(model, [5, 2], [LENGTHS[:3], LENGTHS[3:8]])


def test_an_edit_in_one_suffix_moves_nothing_in_another(base: Path) -> None:
    """Bit for bit, in fp32: of prefix and other suffixes no position, of its own that and those after it."""
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    rows = suffixes.random_rows(4, IMAGE, [5], [[3, 2, 4]])
    batch = suffixes.together(*rows[:2])
    del batch["labels"]
    types = batch["token_type_ids"][0]
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(2)) * 2 - 1

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(**{**batch, "input_ids": ids}, pixel_values=images).logits[0]
        return output

    before = logits(batch["input_ids"])
    for position in range(9, len(types)):
        edited = batch["input_ids"].clone()
        edited[0, position] = 3 + (edited[0, position] - 2) % 100
        moved = (logits(edited) != before).any(dim=-1)
        later = torch.arange(len(types)) >= position
        assert torch.equal(moved, later & (types == types[position]))
    edited = batch["input_ids"].clone()
    edited[0, 8] = 3 + (edited[0, 8] - 2) % 100  # the prefix's last
    assert (logits(edited) != before).any(dim=-1).all()


def test_the_mask_of_two_suffixes() -> None:
    """Image and question, two answers of two tokens and of one, and padding, whatever its type."""
    attends = ["xx.....", "xx.....", "xxx....", "xxxx...", "xx..x..", "xx.....", "xx....."]
    for of_padding in (0, 1):
        mask = prefix_lm_mask(torch.tensor([[1, 1, 1, 1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 1, 2, of_padding, 0]]))
        shown = ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()]
        assert shown[:5] == attends[:5]
        assert all(row[5:] == ".." for row in shown)


def test_every_suffix_begins_behind_the_prefix() -> None:
    position_ids, predicted_by = token_positions(torch.tensor([[0, 0, 1, 1, 2, 3, 3, 0], [0, 0, 0, 0, 1, 1, 1, 1]]))
    assert position_ids.tolist()[0][:-1] == [1, 2, 3, 4, 3, 3, 4]
    assert position_ids.tolist()[1] == list(range(1, 9))
    assert predicted_by.tolist()[0][1:-1] == [0, 1, 2, 1, 1, 5]
    assert predicted_by.tolist()[1][1:] == list(range(7))


def test_a_row_of_one_suffix_is_as_without_the_others() -> None:
    """Against the formulas of one suffix alone: causal or both in the prefix; each label one position on."""
    batch = tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])
    mask, types, labels = batch["attention_mask"], batch["token_type_ids"], batch["labels"]
    causal = torch.ones(17, 17, dtype=torch.bool).tril()
    prefix = types == 0
    expected = (causal | (prefix[:, :, None] & prefix[:, None, :])) & mask.bool()[:, None, :]
    assert torch.equal(prefix_lm_mask(mask, types)[:, 0][mask.bool()], expected[mask.bool()])
    made = TokenBatch.of(IMAGE, batch["input_ids"], mask, types, labels)
    supervised = labels[:, 1:] != -100
    assert made.position_ids.tolist() == [list(range(1, 18))] * 3
    assert made.query_positions is not None
    assert made.query_positions.tolist() == [[8, 9, 0, 1], [12, 13, 14, 15], [6, 0, 1, 2]]
    assert made.predicting is not None
    assert made.predicting.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert made.targets is not None
    assert torch.equal(made.targets, labels[:, 1:][supervised])


def test_the_last_layer_computes_the_shared_position_once() -> None:
    """The prefix's last, which predicts the first token of each suffix, and passes the head for each."""
    rows = suffixes.random_rows(4, IMAGE, [2], [[2, 1, 2]])
    made = TokenBatch.of(IMAGE, **suffixes.together(*rows))
    assert made.query_positions is not None
    assert made.query_positions.tolist() == [[5, 6, 9]]
    assert made.predicting is not None
    assert made.predicting.tolist() == [0, 1, 0, 0, 2]


def test_weights_of_one_are_none(base: Path) -> None:
    model = network(base)
    rows = suffixes.random_rows(4, IMAGE, [5, 2], [[3], [2, 4]])
    images = pixels(model, 2)
    with rounding.KeepFP64(), torch.no_grad():
        ones, none = (
            model(**suffixes.together(*rows[:2], weights), pixel_values=images).loss
            for weights in ([[1.0], [1.0, 1.0]], None)
        )
        halves = model(**suffixes.together(*rows[:2], [[0.5], [0.5, 0.5]]), pixel_values=images).loss
    rounding.assert_exact([ones, halves], [none, none])  # by default divided by the sum of the weights


def score_apart(
    model: PaliGemma, prompts: list[Tensor], candidates: list[list[Tensor]], images: Tensor
) -> list[Tensor]:
    """The log-probabilities of candidates by log-softmax, each in a row of its own."""
    found = []
    for row, (prompt, answers) in enumerate(zip(prompts, candidates, strict=True)):
        sums = []
        for answer in answers:
            batch = suffixes.together([prompt], [[answer]])
            logits = model(
                batch["input_ids"], pixel_values=images[row : row + 1], token_type_ids=batch["token_type_ids"]
            ).logits[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
            sums.append(log_probs.gather(1, answer[:, None]).sum())
        found.append(torch.stack(sums))
    return found


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_scores_are_those_of_separate_rows_however_many_are_scored_at_once(base: Path, at_once: int) -> None:
    """Of prompts of other lengths, with other numbers of candidates."""
    model = network(base).eval()
    prompts, candidates, _ = suffixes.random_rows(4, IMAGE, [5, 2, 7], [LENGTHS[:7], LENGTHS[:1], LENGTHS])
    images = pixels(model, 3)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([len(p) for p in prompts])[:, None]).long()
    asked = [[answer.tolist() for answer in of_row] for of_row in candidates]
    with rounding.KeepFP64(), torch.no_grad():
        expected = score_apart(model, prompts, candidates, images)
        scores = model.score(padded, asked, images, mask, at_once=at_once)
        features = model.encode_images(images)
        again = model.score(padded, asked, attention_mask=mask, image_features=features, at_once=at_once)
    rounding.assert_exact(scores.log_probs, expected)
    rounding.assert_exact(again.log_probs, expected)
    assert [counts.tolist() for counts in scores.tokens] == [LENGTHS[:7], LENGTHS[:1], LENGTHS]


@pytest.mark.parametrize(
    ("candidates", "at_once", "message"),
    [
        ([[[5]]], 4, "candidates for 1 prompts, and 2 prompts"),
        ([[[5]], []], 4, "prompt 1 has no candidates"),
        ([[[5], []], [[6]]], 4, "candidate 1 of prompt 0 has no tokens"),
        ([[[5]], [[6]]], 0, "at_once is 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    base: Path, candidates: list[list[list[int]]], at_once: int, message: str
) -> None:
    ids = torch.full((2, 5), IMAGE)
    ids[:, 4] = 7
    with pytest.raises(ValueError, match=message):
        network(base).score(ids, candidates, at_once=at_once)


Batch = dict[str, Tensor]


def a_suffix_without_tokens(batch: Batch) -> None:
    batch["token_type_ids"][1] = torch.where(batch["token_type_ids"][1] == 2, 3, batch["token_type_ids"][1])


def suffixes_that_alternate(batch: Batch) -> None:
    batch["token_type_ids"][0, 10] = 2


def a_prefix_behind_a_suffix(batch: Batch) -> None:
    batch["token_type_ids"][0, 10] = 0


def no_prefix(batch: Batch) -> None:
    batch["token_type_ids"] += 1


def a_weight_below_zero(batch: Batch) -> None:
    batch["loss_weights"][0, 10] = -0.5


def a_weight_that_is_none(batch: Batch) -> None:
    batch["loss_weights"][0, 10] = torch.nan


def weights_without_labels(batch: Batch) -> None:
    del batch["labels"]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (a_suffix_without_tokens, r"token_type_ids of row 1 read \[0, 1, 3\]"),
        (suffixes_that_alternate, r"token_type_ids of row 0 read \[0, 1, 2, 1, 2\].*expected 0 .*then 1, 2 and so on"),
        (a_prefix_behind_a_suffix, r"read \[0, 1, 0, 1, 2\]"),
        (no_prefix, r"row 0 read \[1, 2, 3\]"),
        (a_weight_below_zero, r"loss_weights hold -0\.5 .*expected numbers above 0"),
        (a_weight_that_is_none, "loss_weights hold nan"),
        (weights_without_labels, "loss_weights weigh the loss of labels"),
    ],
)
def test_bad_batches_are_refused(base: Path, corrupt: Callable[[Batch], None], message: str) -> None:
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    batch = suffixes.together(*suffixes.random_rows(4, IMAGE, [5, 2], [[3, 2], [2, 4]]))
    corrupt(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch, pixel_values=torch.zeros(2, 3, 28, 28))


def test_only_one_suffix_can_be_continued(base: Path) -> None:
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    batch = suffixes.together(*suffixes.random_rows(4, IMAGE, [5], [[3, 2]])[:2])
    with pytest.raises(ValueError, match="token_type_ids go up to 2, for a row with 2 suffixes; expected 0 and 1"):
        model.generate(
            batch["input_ids"], torch.zeros(1, 3, 28, 28), token_type_ids=batch["token_type_ids"], max_new_tokens=1
        )
