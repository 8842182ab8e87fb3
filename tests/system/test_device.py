"""Where tensors are, and what the host waits for, with a second device standing in (tests/card.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import TrainingArguments

from data import Processor
from finetune.evaluation.evaluate import generate_answers, mean_loss
from finetune.system import transfer
from finetune.system.device import first_line, is_out_of_memory
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.trainer import LoRATrainer
from model import PaliGemma
from tests import tiny
from tests.card import DEVICE, Card, CardTensor
from tests.training.test_trainer import ADAPTERS, EVERYWHERE, run_config, trainer_of

TINY_BASE = Path(__file__).parents[2] / "assets/tiny-base"
PLANS = [ExecutionPlan(4), ExecutionPlan(4, recompute_layers=2), ExecutionPlan(4, offload_vision=True)]
DROPOUT = {**ADAPTERS, "dropout": 0.3}
CONNECTOR = {**DROPOUT, "modules_to_save": ["connector.linear"]}  # behind a frozen vision encoder
CASES = [
    pytest.param(lora, plan, id=f"{name}, {plan}")
    for name, lora in (
        ("language", ADAPTERS),
        ("dropout", DROPOUT),
        ("connector", CONNECTOR),
        ("everywhere", EVERYWHERE),
    )
    for plan in PLANS
    if not (lora is EVERYWHERE and plan.offload_vision)  # a vision encoder that is trained stays
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))


@contextlib.contextmanager
def standing_in() -> Iterator[Card]:
    """The second device, which has page-locked memory, and which the Trainer takes for its own."""
    with pytest.MonkeyPatch.context() as patch, Card() as card:
        patch.setattr(transfer, "page_locked", card.page_locked)
        patch.setattr(TrainingArguments, "device", property(lambda self: DEVICE))
        generator = torch.Generator
        patch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))  # there are none of `meta`
        yield card


def off_their_start(trainer: LoRATrainer) -> LoRATrainer:
    """The same trainer, its adapters moved; the step it takes is the first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.trained.values():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.device))
    trainer._initial_global_step = 0
    return trainer


def step(trainer: LoRATrainer) -> dict[str, Tensor]:
    """Gradients of the first step, on the CPU."""
    examples = [trainer.train_dataset[pair] for pair in trainer.batch_sampler[0]]  # type: ignore[index]
    trainer.training_step(trainer.network, examples)
    return {n: p.grad.cpu() for n, p in trainer.trained.items() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In fp64, where another order of summation does not show."""
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize(("lora", "execution_plan"), CASES)
def test_a_step_on_a_card_is_that_on_the_cpu(
    base: Path, tmp_path: Path, lora: dict[str, Any], execution_plan: ExecutionPlan
) -> None:
    """Every operation finds its tensors on one device, and what comes out is the same."""
    config = run_config(base, tmp_path, lora)
    expected = step(off_their_start(trainer_of(config, execution_plan=execution_plan, dtype=torch.float64)))
    with standing_in():
        trainer = off_their_start(trainer_of(config, execution_plan=execution_plan, dtype=torch.float64, device=DEVICE))
        found = step(trainer)
        assert all(isinstance(parameter, CardTensor) for parameter in trainer.trained.values())
    assert_alike(found, expected)


@pytest.mark.parametrize(("lora", "execution_plan"), CASES)
def test_the_host_never_waits_within_a_micro_batch(
    base: Path, tmp_path: Path, lora: dict[str, Any], execution_plan: ExecutionPlan
) -> None:
    """A micro-batch, images included, moves in one copy of page-locked memory; nothing is read back."""
    with standing_in() as card:
        trainer = off_their_start(
            trainer_of(run_config(base, tmp_path, lora), execution_plan=execution_plan, device=DEVICE)
        )
        examples = [trainer.train_dataset[pair] for pair in trainer.batch_sampler[0]]  # type: ignore[index]
        card.waits.clear()
        images = trainer.accumulation.frozen_image_features(examples)
        assert card.waits == []
        card.copies.clear()
        trainer.accumulation.micro_step(examples[:4], images, total=10, step=0)
        assert card.waits == []
        assert len(card.copies) == 1, card.copies


def test_the_host_waits_once_a_step(base: Path, tmp_path: Path) -> None:
    """For whether loss and gradients are finite."""
    with standing_in() as card:
        trainer = off_their_start(
            trainer_of(run_config(base, tmp_path, DROPOUT), execution_plan=ExecutionPlan(4), device=DEVICE)
        )
        trainer.awaits_decoder = False  # as after the first step, which asks every adapter for its gradient
        card.waits.clear()
        examples = [trainer.train_dataset[pair] for pair in trainer.batch_sampler[0]]  # type: ignore[index]
        trainer.training_step(trainer.network, examples)
        assert len(card.waits) == 1, card.waits


def test_an_offloaded_vision_encoder_is_away_but_for_its_visits(base: Path, tmp_path: Path) -> None:
    """Neither the Trainer nor accelerate brings it back."""
    with standing_in():
        trainer = trainer_of(
            run_config(base, tmp_path, ADAPTERS, max_steps=2),
            execution_plan=ExecutionPlan(4, offload_vision=True),
            device=DEVICE,
        )
        where: list[set[torch.device]] = []

        def places(*_: Any) -> None:
            where.append({parameter.device for parameter in trainer.network.vision_tower.parameters()})

        places()
        trainer.network.vision_tower.register_forward_pre_hook(places)
        trainer.network.language_model.model.register_forward_pre_hook(places)
        trainer.train()
        places()
        home = torch.device("cpu")
        assert where[:2] == [{home}, {DEVICE}]
        assert {home} == where[-1] == where[-2]
        others = [p for n, p in trainer.network.named_parameters() if not n.startswith("vision_tower")]
        assert {parameter.device for parameter in others} == {DEVICE}


def test_a_visit_that_fails_ends_at_home(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory runs out in the middle of the move."""
    with standing_in() as card:
        trainer = trainer_of(
            run_config(base, tmp_path, ADAPTERS), execution_plan=ExecutionPlan(4, offload_vision=True), device=DEVICE
        )
        home = dict(trainer.network.vision_tower.named_parameters())
        with pytest.raises(ZeroDivisionError), trainer.accumulation.vision_on_device():
            raise ZeroDivisionError
        assert dict(trainer.network.vision_tower.named_parameters()) == home
        copied, moved = card.copied, []

        def full(*arguments: Any) -> None:
            moved.append(arguments)
            if len(moved) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            copied(*arguments)

        monkeypatch.setattr(card, "copied", full)
        with pytest.raises(torch.OutOfMemoryError), trainer.accumulation.vision_on_device():
            pass
        assert len(moved) == 6
        assert all(p is home[name] for name, p in trainer.network.vision_tower.named_parameters())


def test_without_page_locked_memory_it_goes_on_and_says_so(base: Path, tmp_path: Path) -> None:
    config = run_config(base, tmp_path, ADAPTERS)
    with standing_in():
        expected = step(
            off_their_start(trainer_of(config, execution_plan=ExecutionPlan(4, offload_vision=True), device=DEVICE))
        )
    with standing_in() as card, pytest.MonkeyPatch.context() as patch:

        def none(size: int) -> Tensor:
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS\nand a page more")

        patch.setattr(transfer, "page_locked", none)
        with pytest.warns(UserWarning, match=r"no page-locked host memory \(CUDA error: OS call .* this OS\): copies"):
            found = step(
                off_their_start(trainer_of(config, execution_plan=ExecutionPlan(4, offload_vision=True), device=DEVICE))
            )
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any("transfer.py" in place for place in card.waits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_and_loss_on_a_card_are_those_on_the_cpu(temperature: float) -> None:
    """Through evaluation: rows of different lengths, images shared by some, batches of two."""
    processor, model = Processor.from_pretrained(TINY_BASE), PaliGemma.from_pretrained(TINY_BASE, torch.float64)
    images = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB")]
    prompts = ["caption en", "caption en red", "answer en how many red shapes are there?"]
    records: list[dict[str, Any]] = [
        {"id": f"{i}", "image_id": f"{i % 2}", "image": images[i % 2], "prefix": prompts[i % 3]} for i in range(5)
    ]
    for record in records:
        record |= {"answer": "a circle", "answers": ["a circle"]}
    keywords: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 6, "temperature": temperature}
    expected, loss = generate_answers(model, processor, records, **keywords), mean_loss(model, processor, records, 2)
    with standing_in() as card:
        there = model.to(DEVICE)
        card.waits.clear()
        assert generate_answers(there, processor, records, **keywords) == expected
        tokens = sum("generate.py" in place and "finished" in place for place in card.waits)
        assert tokens <= 3 * 6, "the host asks once a token and batch whether all rows have ended"
        assert mean_loss(there, processor, records, 2) == pytest.approx(loss, rel=1e-12)
    assert len({answer.text for answer in expected.values()}) > 1


SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.90 GB, other allocations: 20.00 MB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried 64 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried 64 bytes"),
    MemoryError(),
]
NOT_SAID = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ValueError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
]


@pytest.mark.parametrize("error", SAID, ids=str)
def test_out_of_memory_is_recognised_in_all_its_words(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert first_line(error) in (str(error), str(error).partition("\n")[0], "MemoryError")


@pytest.mark.parametrize("error", NOT_SAID, ids=str)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_cpus_own_words_are_those() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
