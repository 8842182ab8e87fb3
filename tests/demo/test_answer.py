"""Answers with each token's probability, and boxes where the network says they are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from data.boxes import boxes_in
from finetune.demo.answer import ask
from finetune.demo.networks import Network, Opened
from finetune.evaluation.evaluate import generate_answers
from tests.rounding import KeepFP64, assert_exact

PROMPT = "answer en what is it?"


def in_fp64(network: Network) -> Network:
    return Network(network.name, copy.deepcopy(network.model).double(), network.processor)


def test_each_token_has_the_probability_that_the_forward_pass_gives_it(opened: Opened, scene: Path) -> None:
    for network in map(in_fp64, opened.networks):
        with KeepFP64(), torch.no_grad():
            answered = ask(network, scene, PROMPT, 5)
            row = network.processor.encode(PROMPT)
            length = len(row["input_ids"])
            ids = torch.cat((row["input_ids"], torch.tensor(answered.ids)))[None]
            types = torch.tensor([[0] * length + [1] * len(answered.ids)])
            pixels = network.processor.pixels(scene)[None].double()
            logits = network.model(ids, pixels, token_type_ids=types).logits[0, length - 1 : -1]
        expected = logits.softmax(dim=1)[range(len(answered.ids)), answered.ids]
        assert_exact(torch.tensor([token.probability for token in answered.tokens], dtype=torch.float64), expected)


def test_an_answer_is_that_of_the_evaluation(opened: Opened, scene: Path) -> None:
    for network in opened.networks:
        answered = ask(network, scene, PROMPT, 6)
        record = {"id": "x", "image": scene, "image_id": "x", "prefix": PROMPT}
        expected = generate_answers(network.model, network.processor, [record], 6)["x"]
        assert (answered.text, answered.finished) == (expected.text, expected.finished)
        assert len(answered.tokens) == len(answered.ids) == 6 or answered.finished


def test_an_answer_ends_with_eos_and_holds_nothing_after_it(opened: Opened, scene: Path) -> None:
    """The base's own answer, which ends; with fewer tokens it is cut off and says so."""
    network = opened.networks[0]
    answered = ask(network, scene, "answer en is there a red circle?", 40)
    assert answered.finished
    assert answered.ids[-1] == network.processor.eos_id
    assert answered.ids.count(network.processor.eos_id) == 1
    assert answered.tokens[-1].text == "<eos>"
    cut = ask(network, scene, "answer en is there a red circle?", len(answered.ids) - 1)
    assert not cut.finished
    assert cut.ids == answered.ids[:-1]


def test_a_seed_repeats_what_was_sampled(opened: Opened, scene: Path) -> None:
    network = opened.networks[1]
    sampled = [ask(network, scene, PROMPT, 8, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert sampled[0] == sampled[1]
    assert len({tuple(answered.ids) for answered in sampled}) > 1
    assert ask(network, scene, PROMPT, 8, temperature=2.0, top_p=1e-6).ids == ask(network, scene, PROMPT, 8).ids


def test_mistakes_are_refused(opened: Opened, scene: Path, tmp_path: Path) -> None:
    network = opened.networks[0]
    with pytest.raises(ValueError, match="special token <eos>"):
        ask(network, scene, "answer en <eos>", 3)
    with pytest.raises(ValueError, match="does not exist"):
        ask(network, tmp_path / "missing.png", PROMPT, 3)
    with pytest.raises(ValueError, match="expected"):
        ask(network, scene, PROMPT, 3, temperature=-1.0)


def test_boxes_survive_the_tokenizer(opened: Opened) -> None:
    processor = opened.networks[0].processor
    for text in ("<loc0256><loc0512><loc0768><loc1023> red circle", "<loc0000><loc0001><loc0002><loc0003> triangle"):
        assert boxes_in(processor.decode(processor.answer_ids(text)), (64, 64)) == boxes_in(text, (64, 64))
