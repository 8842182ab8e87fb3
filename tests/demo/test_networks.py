"""Several adapters on the weights of one base: each as if it were alone, the base as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune import load_adapter
from finetune.adapters.network import adapted_config
from finetune.demo.networks import BASE as BASE_NAME
from finetune.demo.networks import Network, Opened, find_sources, one_quantization, open_networks
from finetune.lora.protocol import adapters_disabled
from finetune.training.examples import processor_of
from model import PaliGemma
from tests.demo.conftest import BASE, make_adapter


def logits(network: Network, scene: Path) -> Tensor:
    """At every position of a question about the scene."""
    with torch.no_grad():
        found: Tensor = network.model(**network.processor([scene], ["answer en what is it?"])).logits
    return found


def test_each_network_is_what_it_is_alone(opened: Opened, adapters: list[Path], scene: Path) -> None:
    """Bit for bit; the base after all adapters were opened, the last of another connector and resolution."""
    assert [network.name for network in opened.networks] == [BASE_NAME, "one", "two", "wide"]
    found = [logits(network, scene) for network in opened.networks]
    for shown, adapter in zip(found, [None, *adapters], strict=True):
        model = PaliGemma.from_pretrained(BASE, torch.float32)
        if adapter:
            load_adapter(model, adapter)
        alone = Network("alone", model, processor_of(BASE, adapted_config(BASE, adapter)))
        assert torch.equal(shown, logits(alone, scene))
    assert len({tuple(shown.flatten()[:50].tolist()) for shown in found}) == 4
    one = opened.networks[1]
    with adapters_disabled(one.model):
        assert torch.equal(logits(one, scene), found[0])


def test_the_base_is_in_memory_once(opened: Opened) -> None:
    base, one, two, _ = (dict(network.model.named_parameters()) for network in opened.networks)
    assert all(one[name] is two[name] is parameter for name, parameter in base.items())
    assert {name for name in one if name not in base} == {name for name in one if ".lora_" in name}


def test_answers_may_be_as_long_as_the_longest_that_was_trained(opened: Opened, adapters: list[Path]) -> None:
    assert opened.max_new_tokens == 7
    assert opened.prompt == "answer en {question}"
    assert open_networks(find_sources(adapters[:1]), "float32", "cpu").max_new_tokens == 3


def test_a_run_stands_for_its_adapter(adapters: list[Path], tmp_path: Path) -> None:
    shutil.copytree(adapters[0], tmp_path / "first/adapter")
    shutil.copytree(adapters[1], tmp_path / "second/adapter")
    sources = find_sources([tmp_path / "first", tmp_path / "second"])
    assert sources.adapters == {"first": tmp_path / "first/adapter", "second": tmp_path / "second/adapter"}
    with pytest.raises(ValueError, match="expected directories of different names"):
        find_sources([tmp_path / "first/adapter", tmp_path / "second/adapter"])
    (tmp_path / "first").rename(tmp_path / BASE_NAME)
    with pytest.raises(ValueError, match="none of them 'base'"):
        find_sources([tmp_path / BASE_NAME])


def test_what_holds_no_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"run holds no adapter: expected the directory of a run that trained one"):
        find_sources([tmp_path / "run"])


def test_adapters_of_different_bases_are_refused(adapters: list[Path], tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", 5)
    config = other / "adapter_config.json"
    config.write_text(config.read_text().replace("assets/tiny-base", "owner/other"))
    with pytest.raises(ValueError, match=r"one names .*assets/tiny-base; other names owner/other"):
        find_sources([adapters[0], other])
    assert find_sources([adapters[0], other], model="some/where", revision="main").base == "some/where"


def test_bases_in_different_forms_are_refused(adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {adapters[0]: "nf4", adapters[1]: None}
    monkeypatch.setattr("finetune.adapters.metadata.trained_on", forms.get)
    sources = find_sources(adapters[:2])
    with pytest.raises(ValueError, match="in different forms"):
        one_quantization(sources, "auto")
    assert one_quantization(sources, "nf4") == "nf4"
    assert one_quantization(sources, "none") is None
