"""Merging: exact where it can be, and refusing where it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from finetune import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter
from finetune.adapters.merge import Merging, merge_checkpoint
from finetune.adapters.merge_report import MergeReport
from finetune.lora.linear import LoRALinear
from finetune.lora.protocol import AdapterSettings, adapters, trained_parameters
from finetune.system.atomic import write_whole
from model import PaliGemma
from tests import tiny

CONFIG = LoRAConfig(rank=4, alpha=8, targets=("language.*", "vision.*"), modules_to_save=("connector.linear",))
BIAS = "multi_modal_projector.linear.bias"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    inject_lora(model, CONFIG)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_is_plain_and_verified(
    base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    report = merge_checkpoint(base, adapter, tmp_path / "merged", dtype)
    assert report.problems() == []
    assert report.effect > 0.01
    assert report.modules == 3 * 7 + 3 * 6 + 1
    assert (tmp_path / "merged/tokenizer.json").exists()
    opened = PaliGemma.from_pretrained(tmp_path / "merged", dtype=dtype)
    plain = PaliGemma.from_pretrained(base, dtype=dtype)
    assert opened.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(opened.get_parameter(BIAS), plain.get_parameter(BIAS))


def test_what_a_merge_does_at_the_moment_is_told(base: Path, adapter: Path) -> None:
    told: list[str] = []
    Merging(base, adapter, torch.device("cpu"), told.append).into_full(torch.bfloat16)
    assert told == [
        "opening the base in float32",
        "logits of the base in fp32",
        "logits of the base",
        "logits with the adapter",
        "merging",
        "logits of what was merged",
    ]


def test_merged_in_transformers_answers_as_base_and_adapter_here(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, adapter, tmp_path, torch.float32)
    opened: Any = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    library, info = opened
    assert not any(info.values())
    ours: Any = PaliGemma.from_pretrained(base, dtype=torch.float32)
    before = ours.generate(**tiny.batch(tiny.CONFIG, [5]), max_new_tokens=8)
    load_adapter(ours, adapter)
    changed = 0
    for seed in range(5):
        for row in tiny.rows_of(tiny.batch(tiny.CONFIG, [5, 9], seed=seed)):
            theirs = library.generate(**row, max_new_tokens=8, do_sample=False)[0, row["input_ids"].shape[1] :]
            mine = ours.generate(**row, max_new_tokens=8)[0]
            assert mine.tolist() == theirs.tolist()
            changed += mine.tolist() != before[0].tolist()
    assert changed


def test_what_is_not_on_the_disk_as_it_was_saved_is_seen(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_badly(output: Path, *arguments: Any) -> None:
        write_whole(output, *arguments)
        file = output / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr("finetune.adapters.merge.write_whole", write_badly)
    with pytest.raises(ValueError, match=r"opened again, has another .* than what was saved"):
        merge_checkpoint(base, adapter, tmp_path / "merged", torch.float32)


def test_the_sum_is_taken_in_fp32_and_cast_once() -> None:
    """Many small parts of an update, each lost in bf16, count when they are summed before the cast."""
    linear = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    module = LoRALinear(linear, AdapterSettings(16, 16), key=0, seed=0)
    torch.nn.init.normal_(module.lora_B, std=0.01)
    exact = linear.weight.double() + module.lora_B.double() @ module.lora_A.double()
    nearest = exact.to(torch.bfloat16)
    assert (module.merged_weight() == nearest).float().mean() > 0.999  # fp32 may sit on the other side of a tie


def test_an_adapter_without_effect_is_refused(base: Path, tmp_path: Path) -> None:
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    inject_lora(model, LoRAConfig(rank=4))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the adapter changes nothing"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_merge_is_noticed(
    base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One module of 39 merged with twice its scale."""
    merged_weight = LoRALinear.merged_weight

    def wrong(self: LoRALinear) -> torch.Tensor:
        doubled = copy.copy(self)
        doubled.scale = self.scale * (2 if self.key == first_key else 1)
        return merged_weight(doubled)

    model = PaliGemma.from_pretrained(base, dtype=dtype)
    load_adapter(model, adapter)
    first_key = next(m.key for p, m in adapters(model) if isinstance(m, LoRALinear) and p.endswith("0.mlp.down_proj"))
    monkeypatch.setattr(LoRALinear, "merged_weight", wrong)
    with pytest.raises(ValueError, match="the merge is not to be trusted"):
        merge_checkpoint(base, adapter, tmp_path / "merged", dtype)
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_is_not_finite_leaves_the_model_alone(base: Path, adapter: Path) -> None:
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    load_adapter(model, adapter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    *_, (_, last) = adapters(model)
    with torch.no_grad():
        last.adapter_parameters()["lora_B"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        merge_lora(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not name.endswith("lora_B"))


def test_merging_wants_adapters(base: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(PaliGemma.from_pretrained(base))


def test_the_bounds_are_those_that_are_documented() -> None:
    report = MergeReport(torch.bfloat16, 1, 10.0, 1.0, 0.5, drift=0.2, rounding=0.1, changed_tokens=0.0)
    assert report.problems() == []
    assert MergeReport(torch.bfloat16, 1, 10.0, 1.0, 0.5, 0.201, 0.1, 0.0).problems()
    assert MergeReport(torch.float32, 1, 10.0, 1.0, 1.1e-4, 0.0, 0.0, 0.0).problems()
    assert not MergeReport(torch.float32, 1, 10.0, 1.0, 0.9e-4, 0.0, 0.0, 0.0).problems()
    assert MergeReport(torch.float32, 1, float("nan"), float("nan"), 0.0, 0.0, 0.0, 0.0).problems()
