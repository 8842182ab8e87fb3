"""Heat maps: each patch is covered once, the same answer is scored, and the bright place is the right one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.demo import occlusion
from finetune.demo.answer import ask
from finetune.demo.networks import Network, Opened
from finetune.demo.occlusion import GREY, Occlusion, covered_images, heat_map, occlusion_map
from tests.rounding import KeepFP64, assert_exact

PROMPT = "answer en what is it?"


@pytest.mark.parametrize(("size", "grid"), [((90, 60), 4), ((37, 53), 5), ((8, 8), 8)])
def test_every_pixel_is_covered_once_and_the_rest_stays(size: tuple[int, int], grid: int) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 100, (size[1], size[0], 3), dtype=np.uint8))
    before = np.asarray(image)
    times = np.zeros(before.shape[:2], int)
    for view in covered_images(image, grid):
        changed = (np.asarray(view) != before).any(axis=2)
        assert (np.asarray(view)[changed] == GREY).all()
        times += changed
    assert (times == 1).all()
    assert (np.asarray(image) == before).all()


def test_the_probability_is_that_of_one_image_at_a_time(opened: Opened, scene: Path) -> None:
    """By the loss of the network, in fp64, for every network, one of them with another connector and resolution."""
    for network in opened.networks:
        ids = ask(network, scene, PROMPT, 4).ids
        exact = Network(network.name, copy.deepcopy(network.model).double(), network.processor)
        with KeepFP64():
            found = occlusion_map(exact, scene, PROMPT, ids, grid=2, batch_size=3)
            views = [Image.open(scene).convert("RGB"), *covered_images(Image.open(scene).convert("RGB"), 2)]
            expected = torch.stack([probability(exact, view, ids) for view in views])
        assert_exact(torch.cat((torch.tensor([found.whole], dtype=torch.float64), found.covered.flatten())), expected)
        assert found.covered.shape == (2, 2)
        assert found.covered.unique().numel() == 4


def probability(network: Network, image: Image.Image, ids: list[int]) -> Tensor:
    row = network.processor.encode(PROMPT)["input_ids"]
    rows = torch.cat((row, torch.tensor(ids)))[None]
    types = torch.tensor([[0] * len(row) + [1] * len(ids)])
    labels = torch.tensor([[-100] * len(row) + ids])
    pixels = network.processor.pixels(image)[None].double()
    with torch.no_grad():
        loss = network.model(rows, pixels, token_type_ids=types, labels=labels, num_items_in_batch=1).loss
    return torch.exp(-loss)


def test_the_whole_images_probability_is_the_answers(opened: Opened, scene: Path) -> None:
    network = opened.networks[1]
    answered = ask(network, scene, PROMPT, 4)
    product = float(np.prod([token.probability for token in answered.tokens]))
    assert occlusion_map(network, scene, PROMPT, answered.ids, grid=1).whole == pytest.approx(product, rel=1e-4)


def test_the_map_is_bright_where_the_answer_comes_from(
    opened: Opened, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that sees one pixel only, in the third row and the first column of four."""

    def score(network: Network, images: Sequence[Image.Image], prompt: str, answer: Sequence[int]) -> Tensor:
        return torch.tensor([-3.0 if image.getpixel((5, 35)) == GREY else -0.5 for image in images])

    monkeypatch.setattr(occlusion, "answer_log_probs", score)
    found = occlusion_map(opened.networks[0], Image.new("RGB", (90, 60), "white"), PROMPT, [5, 1], grid=4)
    assert found.whole == pytest.approx(np.exp(-0.5))
    falls = torch.zeros(4, 4).double()
    falls[2, 0] = 1 - np.exp(-2.5)
    torch.testing.assert_close(found.falls, falls)
    assert "60.7% probability, and 5.0% with the patch in row 3, column 1 covered" in found.sentence()
    drawn = np.asarray(heat_map(Image.new("RGB", (90, 60), "white"), found.falls), int).sum(axis=2)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert max(drawn.shape) >= 448
    assert 0.5 <= row / drawn.shape[0] < 0.75
    assert column / drawn.shape[1] < 0.25


def test_what_hardly_matters_stays_dark() -> None:
    image = Image.new("RGB", (500, 500), "white")
    dark = np.asarray(heat_map(image, torch.tensor([[-0.5, 0.0], [0.0, -0.1]])), int).sum(axis=2)
    faint = np.asarray(heat_map(image, torch.tensor([[0.01, 0.0], [0.0, 0.0]])), int).sum(axis=2)
    strong = np.asarray(heat_map(image, torch.tensor([[0.3, 0.0], [0.0, 0.0]])), int).sum(axis=2)
    full = np.asarray(heat_map(image, torch.tensor([[0.9, 0.0], [0.0, 0.0]])), int).sum(axis=2)
    assert dark.min() == dark.max()
    assert dark.max() < faint.max() < strong.max() == full.max()


def test_a_map_on_which_nothing_matters_says_so() -> None:
    found = Occlusion(0.5, torch.tensor([[0.5, 0.6]]).double())
    assert found.sentence() == "The answer has 50.0% probability, and no covered patch lowers it."
    assert Occlusion(0.0, torch.zeros(2, 2)).falls.tolist() == [[0, 0], [0, 0]]


def test_batches_of_any_size_give_the_same(opened: Opened, scene: Path) -> None:
    network = Network("exact", copy.deepcopy(opened.networks[1].model).double(), opened.networks[1].processor)
    with KeepFP64():
        many, few = (occlusion_map(network, scene, PROMPT, [5, 9, 1], 3, size) for size in (100, 2))
    assert_exact(many.covered, few.covered)


def test_what_cannot_be_mapped_is_refused(opened: Opened, scene: Path) -> None:
    with pytest.raises(ValueError, match="0 tokens and a grid of 8"):
        occlusion_map(opened.networks[0], scene, PROMPT, [])
    with pytest.raises(ValueError, match="1 tokens and a grid of 0"):
        occlusion_map(opened.networks[0], scene, PROMPT, [5], grid=0)
