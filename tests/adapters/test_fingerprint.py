"""An adapter knows its base again: in any form of the same weights, and never another one."""

from __future__ import annotations

import copy
import dataclasses
import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from finetune import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter
from finetune.adapters.fingerprint import fingerprint
from finetune.adapters.storage import serialized
from finetune.lora.nf4 import dequantize, quantize
from finetune.lora.protocol import trained_parameters
from model import PaliGemma
from tests import tiny

CONFIG = LoRAConfig(rank=4, targets=("language.*", "vision.*"), modules_to_save=("connector.linear",))


@pytest.fixture
def base(tmp_path: Path) -> PaliGemma:
    directory = tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path / "base")
    return PaliGemma.from_pretrained(directory, torch.float32)


def trained(model: PaliGemma) -> PaliGemma:
    inject_lora(model, CONFIG)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_same_base_in_any_form_has_one_fingerprint(base: PaliGemma, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = fingerprint(base)
    assert fingerprint(copy.deepcopy(base).bfloat16()) == found
    assert fingerprint(trained(copy.deepcopy(base))) == found
    base.save_pretrained(tmp_path / "saved")
    assert fingerprint(PaliGemma.from_pretrained(tmp_path / "saved", torch.bfloat16)) == found
    packed = quantize(copy.deepcopy(base), "cpu")
    assert fingerprint(packed) == found
    assert fingerprint(dequantize(packed)) == found
    packed = quantize(copy.deepcopy(base), "cpu")
    inject_lora(packed, LoRAConfig(rank=4))
    assert fingerprint(packed) == found


def test_another_base_has_another_one(base: PaliGemma) -> None:
    found = fingerprint(base)
    for name, parameter in base.named_parameters():
        other = copy.deepcopy(base)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1 + parameter.abs().max()
        assert fingerprint(other) != found, name
    merged = trained(copy.deepcopy(base))
    merge_lora(merged)
    assert fingerprint(merged) != found
    other = copy.deepcopy(base)
    other.config = dataclasses.replace(base.config, text=dataclasses.replace(base.config.text, rope_theta=5e5))
    assert fingerprint(other) != found


def test_what_is_merged_into_a_dequantised_base_makes_another_one(base: PaliGemma) -> None:
    pytest.importorskip("bitsandbytes")
    found = fingerprint(base)
    plain = dequantize(quantize(base, "cpu"))
    inject_lora(plain, LoRAConfig(rank=4))
    with torch.no_grad():
        for parameter in trained_parameters(plain).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert fingerprint(plain) == found
    merge_lora(plain)
    assert fingerprint(plain) != found


def test_an_adapter_of_another_base_is_refused_and_the_model_left_alone(base: PaliGemma, tmp_path: Path) -> None:
    save_adapter(trained(copy.deepcopy(base)), tmp_path / "adapter", base="the/right-one")
    with torch.no_grad():
        other = copy.deepcopy(base)
        other.get_parameter("language_model.model.norm.weight")[0] += 1
    before = {name: parameter.clone() for name, parameter in other.named_parameters()}
    with pytest.raises(ValueError, match=r"was trained on another base than this.*the/right-one"):
        load_adapter(other, tmp_path / "adapter")
    assert all(torch.equal(before[name], parameter) for name, parameter in other.named_parameters())
    assert load_adapter(base, tmp_path / "adapter")


def test_the_fingerprint_is_beside_the_tensors_where_peft_does_not_look(base: PaliGemma, tmp_path: Path) -> None:
    save_adapter(trained(copy.deepcopy(base)), tmp_path / "adapter")
    content = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"]["base_fingerprint"] == fingerprint(base)


def test_a_file_depends_on_its_content_alone() -> None:
    """The library writes more than one entry of metadata in an order of its own."""
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    metadata = {"format": "pt", "x": "1", "y": "2", "z": "3"}
    assert len({serialized(tensors, dict(items)) for items in permutations(metadata.items())}) == 1
    assert all(torch.equal(load(serialized(tensors, metadata))[name], tensor) for name, tensor in tensors.items())
