"""Training from pairs: the loss is the papers' and TRL's, and a pair in one row is the pair in two."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import PaliGemmaDataset, Processor, collate
from data.lengths import measure
from finetune import LoRAConfig, inject_lora
from finetune.config.schema import PreferenceOptions, TrainConfig
from finetune.lora.protocol import adapters_disabled, trained_parameters
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.preferences import Preferences
from finetune.training.reference import LogProbs, Reference
from finetune.training.step_inputs import Example
from model import PaliGemma
from model.random_init import from_random
from tests import rounding

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/tiny-base"
PAIRS = [("there are three circles", "3"), ("a red circle", "blue"), ("yes", "a red circle and a blue cross")]
OPTIONS = [
    PreferenceOptions(),
    PreferenceOptions(beta=0.5, label_smoothing=0.2),
    PreferenceOptions(loss="hinge", beta=0.3),
    PreferenceOptions(loss="ipo", beta=0.7),
    PreferenceOptions(beta=0.2, rpo_alpha=0.7),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Four pairs on two images."""
    folder, rows = tmp_path_factory.mktemp("images"), []
    for number in range(4):
        path = folder / f"{number % 2}.png"
        Image.fromarray(np.full((8, 8, 3), 90 * (number % 2), np.uint8)).save(path)
        chosen, rejected = PAIRS[number % len(PAIRS)]
        texts = {"question": "", "prefix": "answer en how many?" + " really?" * number, "answers": [chosen]}
        about = {"id": f"q{number}", "image": str(path), "image_id": f"i{number % 2}"}
        rows.append({**about, **texts, "answer": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BASE)


def network(seed: int = 1, dropout: float = 0.0, targets: tuple[str, ...] = ("language.*", "connector.*")) -> PaliGemma:
    """The tiny base with random weights, in fp64, adapters off their start."""
    model = from_random(BASE, 0)
    inject_lora(model, LoRAConfig(rank=2, targets=targets, dropout=dropout))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return rounding.in_dtype(model, torch.float64).train()


def accumulation(model: PaliGemma, objective: Preferences, plan: ExecutionPlan | None = None) -> GradientAccumulation:
    config, pad = TrainConfig(max_steps=1, batch_size=4, seed=3), model.config.pad_token_id
    trained = trained_parameters(model)
    return GradientAccumulation(
        model, trained, config, plan or ExecutionPlan(4), partial(collate, pad_id=pad), objective
    )


def step(
    model: PaliGemma, objective: Preferences, examples: Sequence[Example], plan: ExecutionPlan | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step."""
    model.zero_grad()
    made = accumulation(model, objective, plan)
    prepared = objective.prepare(made, examples, step=0)
    loss = made.accumulate(prepared, objective.total(prepared), step=0)
    return loss, {name: p.grad for name, p in trained_parameters(model).items() if p.grad is not None}


def restated(chosen: Tensor, rejected: Tensor, lengths: tuple[int, int], options: PreferenceOptions) -> Tensor:
    """The loss of one pair as the papers write it; of what both answers gained over the reference."""
    if options.loss == "ipo":  # arXiv 2310.12036, equation 17, with means over tokens
        return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * options.beta)).square()
    h = options.beta * (chosen - rejected)
    if options.loss == "hinge":
        return torch.maximum(torch.zeros_like(h), 1 - h)
    right = torch.log(1 / (1 + torch.exp(-h)))
    wrong = torch.log(1 / (1 + torch.exp(h)))
    return -(1 - options.label_smoothing) * right - options.label_smoothing * wrong


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("plan", [ExecutionPlan(4), ExecutionPlan(1, recompute_layers=2)], ids=str)
def test_loss_and_gradient_are_those_of_the_answers_in_rows_of_their_own(
    records: list[dict[str, Any]], processor: Processor, options: PreferenceOptions, plan: ExecutionPlan
) -> None:
    """Of two networks, the trained one and the reference, each answer in a forward pass of its own; with dropout off,
    for that differs between rows.
    """
    model, other = network(), network(seed=2)
    reference = Reference({name: p.detach().clone() for name, p in trained_parameters(other).items()})
    pairs = [PaliGemmaDataset(records, processor, "pair")[index] for index in range(4)]

    def log_prob(of: PaliGemma, record: dict[str, Any], answer: str) -> tuple[Tensor, int]:
        inputs = processor([record["image"]], [record["prefix"]], [answer])
        inputs["pixel_values"] = inputs["pixel_values"].double()
        output = of(**inputs, num_items_in_batch=1)
        return -output.loss, int((inputs["labels"] != -100).sum())

    with rounding.KeepFP64():
        losses = []
        for record in records:
            found = []
            for answer in (record["answer"], record["rejected"]):
                own, tokens = log_prob(model, record, answer)
                with torch.no_grad():
                    known, _ = log_prob(other, record, answer)
                found.append((own, own - known, tokens))
            (chosen, gain, length), (_, gain_of_rejected, length_of_rejected) = found
            loss = restated(gain, gain_of_rejected, (length, length_of_rejected), options)
            losses.append(loss - options.rpo_alpha * chosen / length)
        model.zero_grad()
        expected = torch.stack(losses).mean()
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in trained_parameters(model).items() if p.grad is not None}
        loss, ours = step(model, Preferences(options, reference), pairs, plan)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    rounding.assert_exact(ours, gradients)


@pytest.mark.parametrize("options", [options for options in OPTIONS if not options.label_smoothing], ids=repr)
def test_loss_and_gradient_are_trls_on_the_same_log_probabilities(options: PreferenceOptions) -> None:
    """Its trainer's own loss, called with a network that gives these log-probabilities of every token. What it adds for
    `sft` is the mean over the tokens of a batch, ours over those of a pair: the chosen answers here are equally long.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    pairs, length, shorter = 3, 5, 3
    mask = torch.zeros(2 * pairs, 2 + length, dtype=torch.int64)
    mask[:pairs, 2:], mask[pairs:, 2 : 2 + shorter] = 1, 1
    per_token = -torch.rand(2 * pairs, 1 + length, generator=generator, dtype=torch.float64) * mask[:, 1:]
    reference = -5 * torch.rand(2, pairs, generator=generator, dtype=torch.float64)
    theirs, ours = per_token.clone().requires_grad_(), per_token.clone().requires_grad_()

    def fused(**_: Any) -> Any:
        unused = torch.zeros_like(theirs)
        named = {"entropy": unused, "mean_logits": unused, "is_top1": unused.bool(), "log_sum_sq_probs": unused}
        return types.SimpleNamespace(log_probs=theirs, **named)

    settings: dict[str, Any] = {
        "beta": options.beta,
        "loss_types": [options.loss, "sft"] if options.rpo_alpha else [options.loss],
        "loss_weights": [1.0, options.rpo_alpha][: 1 + bool(options.rpo_alpha)],
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "model": types.SimpleNamespace(training=True),
        "accelerator": types.SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
    }
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    trainer: Any = types.SimpleNamespace(**settings)
    expected = DPOTrainer._compute_loss(trainer, fused, inputs, False)
    expected.backward()

    log_probs = ours.sum(dim=1).view(2, pairs).T  # (B, 2)
    tokens = torch.tensor([[length, shorter]] * pairs)
    objective = Preferences(options, Reference(None))
    loss = objective.loss_of(log_probs, reference.T, tokens, total=pairs)
    loss.value.backward()
    rounding.assert_exact(loss.value.detach(), expected.detach())
    assert ours.grad is not None
    assert theirs.grad is not None
    rounding.assert_exact(ours.grad * mask[:, 1:], theirs.grad * mask[:, 1:])
    logged = settings["_metrics"]["train"]
    names = {"rewards/accuracies": "pair_accuracy", "rewards/margins": "margin", "rewards/chosen": "reward_chosen"}
    for name, own in names.items():
        scale = 100 if own == "pair_accuracy" else 1
        assert float(loss.figures[own]) / pairs == pytest.approx(scale * logged[name][0], rel=1e-6)


def test_a_network_that_is_the_reference_has_no_margin(records: list[dict[str, Any]], processor: Processor) -> None:
    """Its loss is log 2, whatever it answers; and without a reference's values the adapters are disabled."""
    model = network()
    pairs = [PaliGemmaDataset(records, processor, "pair")[index] for index in range(4)]
    same = Reference({name: p.detach().clone() for name, p in trained_parameters(model).items()})
    with rounding.KeepFP64():
        loss, _ = step(model, Preferences(PreferenceOptions(), same), pairs)
        objective = Preferences(PreferenceOptions(), Reference(None))
        found = objective.reference_log_probs(accumulation(model, objective), pairs)
        with adapters_disabled(model):
            nothing = objective.reference_log_probs(accumulation(model, Preferences(PreferenceOptions(), same)), pairs)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-7)
    rounding.assert_exact(found, nothing)
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    with pytest.raises(RuntimeError, match="stopped"), Reference(before).in_place(model):
        raise RuntimeError("stopped")
    assert all(torch.equal(p, before[name]) for name, p in trained_parameters(model).items())
    assert model.training


def test_log_probabilities_that_were_kept_train_as_those_of_every_step(
    records: list[dict[str, Any]], processor: Processor, tmp_path: Path
) -> None:
    """Twenty steps of gradient descent with dropout, from an adapter that is the reference itself; the file is read
    back in between.
    """
    dataset = PaliGemmaDataset(records, processor, "pair")
    ids, made_of = [record["id"] for record in records], {"the base": "this one"}
    trained: list[dict[str, Tensor]] = []
    for keeps in (False, True):
        model = network(dropout=0.2)
        reference = Reference({name: p.detach().clone() for name, p in trained_parameters(model).items()})
        known = LogProbs(tmp_path / "reference.safetensors", made_of, ids) if keeps else None
        objective = Preferences(PreferenceOptions(beta=0.5), reference, known)
        with rounding.KeepFP64():
            made = accumulation(model, objective, ExecutionPlan(3))
            if keeps:
                objective.precompute(made, dataset, range(4), processes=0)
                objective.known = LogProbs(tmp_path / "reference.safetensors", made_of, ids)
            for number in range(20):
                model.zero_grad()
                examples = objective.prepare(made, [dataset[(number + k) % 4, 0] for k in range(3)], number)
                made.accumulate(examples, objective.total(examples), number)
                with torch.no_grad():
                    for parameter in trained_parameters(model).values():
                        if parameter.grad is not None:
                            parameter.sub_(parameter.grad, alpha=0.02)
        trained.append({name: p.detach() for name, p in trained_parameters(model).items()})
    live, kept = trained
    begun = {name: p.detach() for name, p in trained_parameters(network()).items()}
    moved = max(float((live[name] - begun[name]).abs().max()) for name in live)
    assert moved > 0.02
    # Each step passes roundings on, enlarged: rows that are computed together differ in the last bit of fp64.
    assert max(float((live[name] - kept[name]).abs().max()) for name in live) < 1e-9 * moved


def test_what_was_kept_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    kept = LogProbs(file, {"the base": "one", "the tokenizer": "t", "the pairs": "p"}, ["a", "b", "c"])
    for position, values in ((0, [-1.0, -2.5]), (0, [0.0, 0.0]), (2, [-3.0, -4.0])):
        kept.add(position, torch.tensor(values, dtype=torch.float64))
    kept.save()
    again = LogProbs(file, kept.made_of, ["a", "b", "c"])
    found = [again.get(name) for name in "abc"]
    assert [values if values is None else values.tolist() for values in found] == [[-1, -2.5], None, [-3, -4]]
    assert [again.lacks([position]) for position in range(3)] == [False, True, False]
    other = {"the base": "another", "the tokenizer": "t", "the pairs": "q"}
    with pytest.raises(ValueError, match=r"not the same in: the base, the pairs; restore that, or delete it"):
        LogProbs(file, other, ["a", "b", "c"])
    with pytest.raises(ValueError, match="damaged"):
        LogProbs(file, kept.made_of, ["a", "b"])
    before = file.read_bytes()
    file.write_bytes(before[:-4])
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); delete it, and it is made again"):
        LogProbs(file, kept.made_of, ["a", "b", "c"])


def test_pairs_are_measured_in_whole(records: list[dict[str, Any]], processor: Processor) -> None:
    """Loss, accuracy, margin and rewards are those of a step of all of them; the divergence is summed up here by hand,
    and is nothing where the network is the reference.
    """
    model, other = network(), network(seed=2)
    reference = Reference({name: p.detach().clone() for name, p in trained_parameters(other).items()})
    dataset = PaliGemmaDataset(records, processor, "pair")
    objective = Preferences(PreferenceOptions(beta=0.4), reference, None, dataset, len(records))
    with rounding.KeepFP64():
        made = accumulation(model, objective, ExecutionPlan(3))
        measured = objective.measure(made)
        loss, _ = step(model, objective, [dataset[index] for index in range(4)])
        divergences = []
        for record in records:
            inputs = processor([record["image"]], [record["prefix"]], [record["answer"]])
            inputs["pixel_values"] = inputs["pixel_values"].double()
            here, there = (of(**inputs).logits.detach().log_softmax(dim=-1) for of in (model, other))
            divergences.append((here.exp() * (here - there)).sum(dim=-1))
        objective.reference = Reference({name: p.detach().clone() for name, p in trained_parameters(model).items()})
        at_the_start = objective.measure(made)
    assert measured["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert measured["kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-5)
    assert measured["kl"] > 0.01
    assert measured["margin"] == pytest.approx(measured["reward_chosen"] - measured["reward_rejected"], rel=1e-4)
    assert measured["pair_accuracy"] in (0, 25, 50, 75, 100)
    assert at_the_start["kl"] == pytest.approx(0, abs=1e-9)
    assert at_the_start["loss"] == pytest.approx(np.log(2), rel=1e-6)


def test_a_row_that_is_no_pair_is_named(records: list[dict[str, Any]], processor: Processor) -> None:
    """Before training, with its reason: nothing rejected, or both answers cut to the same tokens."""
    alone = {**records[0], "rejected": ""}
    long = {**records[1], "answer": "a red circle and a blue cross", "rejected": "a red circle and a blue circle"}
    short = Processor.from_pretrained(BASE, max_text_tokens=16, truncate_answers=True)
    assert measure([records[0], alone], processor, "pair").invalid.keys() == {1}
    found = measure([records[0], long], short, "pair").invalid
    assert [(record.id, "the same tokens" in record.reason) for record in found.values()] == [("q1", True)]
    with pytest.raises(ValueError, match="q0: it has no rejected answer, and preferences are learned from pairs"):
        PaliGemmaDataset([alone], processor, "pair")[0]
    lengths = measure(records, processor, "pair").longest
    rows = [PaliGemmaDataset(records, processor, "pair")[index] for index in range(4)]
    assert lengths.supervised == max(int((row["labels"] != -100).sum()) for row in rows)
    assert lengths.text == max(len(row["input_ids"]) - processor.num_image_tokens - 1 for row in rows)
