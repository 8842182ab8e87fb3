"""The Python that README.md and docs/export.md show, run as it stands on a tiny run: all of it gives one answer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

import merge_lora
import train
from tests.test_scripts import ROOT, base_with_scenes, overrides

BLOCKS = [
    pytest.param(block, id=f"{document}-{number}")
    for document in ("README.md", "docs/export.md")
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)
    )
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as it is after the quickstart, with another image: what the examples name is there."""
    directory = tmp_path_factory.mktemp("checkout")
    base = base_with_scenes(directory / "assets/tiny-base")
    output = directory / "runs/quickstart"
    train.main([str(ROOT / "configs/quickstart.yaml"), *overrides(base, output, "train.max_steps=12")])
    merge_lora.main([str(output), "--output", str(output / "merged"), "--dtype", "float32"])
    (image, *_) = sorted((base / "data/images").iterdir())
    shutil.copyfile(image, directory / "scene.jpg")
    return directory


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def answer_of(model: Any) -> str:
    """What a network of transformers answers to the question of the examples."""
    processor = AutoProcessor.from_pretrained("assets/tiny-base")
    text = "<image>answer en is there a red circle?"
    inputs = processor(images=Image.open("scene.jpg"), text=text, return_tensors="pt")
    tokens = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    return str(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture
def reference(inside: Path) -> str:
    return answer_of(PaliGemmaForConditionalGeneration.from_pretrained("runs/quickstart/merged", dtype=torch.float32))


def test_the_adapter_changes_the_answer(inside: Path, reference: str) -> None:
    """Otherwise an example that leaves it out would pass."""
    assert reference
    base = PaliGemmaForConditionalGeneration.from_pretrained("assets/tiny-base", dtype=torch.float32)
    assert answer_of(base) != reference


def test_both_documents_have_examples() -> None:
    assert {str(parameter.id).rsplit("-", 1)[0] for parameter in BLOCKS} == {"README.md", "docs/export.md"}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs_as_it_stands(inside: Path, reference: str, block: str) -> None:
    printed: list[str] = []
    exec(compile(block, "example", "exec"), {"print": printed.append})
    assert printed == [reference]


def test_the_line_that_opens_an_adapter_in_peft(inside: Path, reference: str) -> None:
    """Of README.md, in the middle of a sentence."""
    found = re.findall(
        r"`(peft\.PeftModel\.from_pretrained\([^`]*\))`", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert found
    for expression in found:
        paligemma = PaliGemmaForConditionalGeneration.from_pretrained("assets/tiny-base", dtype=torch.float32)
        assert answer_of(eval(expression, {"peft": peft, "paligemma": paligemma})) == reference
