"""Adapters of the tiny base with random values, so that every network answers differently."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from finetune import LoRAConfig, inject_lora, save_adapter
from finetune.adapters.metadata import TrainingFacts
from finetune.demo.networks import Opened, find_sources, open_networks
from finetune.lora.protocol import trained_parameters
from model import ConnectorConfig, PaliGemma
from model.convert import changed, convert

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/tiny-base"


def make_adapter(directory: Path, seed: int, facts: TrainingFacts | None = None, network: bool = False) -> Path:
    """An adapter of the tiny base with random values; `network`: of another connector and resolution, too."""
    model = PaliGemma.from_pretrained(BASE, torch.float32)
    if network:
        convert(model, changed(model.config, ConnectorConfig("mlp"), 84, None, None))
    inject_lora(model, LoRAConfig(rank=4, alpha=8, targets=("language.*", "vision.*")))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, directory, base="assets/tiny-base", facts=facts)
    return directory


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the base's own network, and one of another network."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(root / "one", 1, TrainingFacts(max_new_tokens=3, prompt="answer en {question}")),
        make_adapter(root / "two", 2, TrainingFacts(max_new_tokens=7)),
        make_adapter(root / "wide", 3, network=True),
    ]


@pytest.fixture(scope="session")
def opened(adapters: list[Path]) -> Opened:
    """The networks, which no test changes."""
    return open_networks(find_sources(adapters), "float32", "cpu")


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """An image that is wider than high."""
    image = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 40, 40), fill="red")
    image.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"
