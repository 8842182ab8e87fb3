"""Processes that share sharded layers (FSDP2) learn, answer, stop and resume as one process does."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.config.load import load_config
from finetune.system import distributed
from finetune.training.checkpoints import newest_whole
from finetune.training.setup import open_model
from tests import kill_test, preloaded, rounding, sharded_processes
from tests.system.test_distributed import FP32, assert_same_adapter, codes, curve, said

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(), reason="runs forked processes"
)


def runs(directory: Path, group: str) -> Path:
    """A group of the runs of tests/sharded_processes.py."""
    done = preloaded.run(sharded_processes.main, str(directory), group)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def assert_same_curve(run: Path, other: Path) -> None:
    """Loss, gradient norm, rate, validation loss and accuracy of every step."""
    ours, theirs = curve(run), curve(other)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=4 * FP32)  # micro-batches' losses are added up in fp32


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def test_processes_with_sharded_layers_learn_what_one_process_does(tmp_path: Path) -> None:
    """Each holds half of every layer; with adapters everywhere, modules trained in full and recomputed layers, and with
    a vision encoder that leaves the device; and with one that is trained, where one process has rows of text alone. One
    process has two micro-batches of a step, the other has one.
    """
    directory = runs(tmp_path, "learn")
    for ours, theirs in (("sharded", "one"), ("offloaded", "one, offloaded"), ("texts", "one, texts")):
        assert (codes(directory, theirs), codes(directory, ours)) == ([0], [0, 0])
        assert_same_curve(directory / ours, directory / theirs)
        assert_same_adapter(directory / ours, directory / theirs)
        lines = said(directory, ours, 1).splitlines()
        assert [line for line in lines if not line.startswith(("held: ", "answers: "))] == []  # one process shows all
        for rank in (0, 1):
            held = json.loads(said(directory, ours, rank).split("held: ")[1].splitlines()[0])
            assert held["after"] / held["before"] == pytest.approx(0.5, abs=0.02)
            assert held["whole"] == 0  # weights that something still holds
    files = [{path.relative_to(run) for path in run.rglob("*")} for run in (directory / "sharded", directory / "one")]
    assert files[0] == files[1]
    configs = [directory / run / "adapter/adapter_config.json" for run in ("sharded", "one")]
    assert configs[0].read_text() == configs[1].read_text()
    headers = [load_header(directory / run / "adapter/adapter_model.safetensors") for run in ("sharded", "one")]
    assert headers[0]["__metadata__"]["base_fingerprint"] == headers[1]["__metadata__"]["base_fingerprint"]
    assert headers[0].keys() == headers[1].keys()


def test_a_connector_and_its_stage_beside_sharded_layers_are_trained_as_in_one_process(tmp_path: Path) -> None:
    directory = runs(tmp_path, "connector")
    assert [codes(directory, name) for name in ("one", "sharded", "after")] == [[0], [0, 0], [0, 0]]
    stages = [directory / name / "stages/align" for name in ("sharded", "one")]
    assert_same_curve(*stages)
    assert_same_adapter(*stages)
    assert_same_curve(directory / "after", directory / "one")
    assert_same_adapter(directory / "after", directory / "one")
    headers = [load_header(run / "adapter/adapter_model.safetensors") for run in (*stages, directory / "sharded")]
    assert len({header["__metadata__"]["base_fingerprint"] for header in headers}) == 1


def load_header(file: Path) -> dict[str, dict[str, str]]:
    content = file.read_bytes()
    header: dict[str, dict[str, str]] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def test_a_sharded_run_resumes_bit_for_bit_and_so_it_does_from_one_process(tmp_path: Path) -> None:
    directory = runs(tmp_path, "resume")
    assert (codes(directory, "told"), codes(directory, "told, resumed")) == ([75, 75], [0, 0])
    assert [line["step"] for line in curve(directory / "told") if "loss" in line] == [1, 2, 3, 4]
    assert adapter(directory / "told") == adapter(directory / "sharded")
    last = "checkpoints/step-000004"
    for file in ("trained.safetensors", "optimizer.safetensors"):
        straight, resumed = (load_file(directory / run / last / file) for run in ("sharded", "told"))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert (codes(directory, "one"), codes(directory, "one, resumed")) == ([0], [0, 0])
    assert_same_adapter(directory / "one", directory / "one to the end")


def test_out_of_memory_in_one_process_the_step_is_repeated_by_all(tmp_path: Path) -> None:
    """Before the layers are computed, and in the middle of a backward pass."""
    directory = runs(tmp_path, "little memory")
    for name in ("little memory", "little memory in the layers"):
        assert codes(directory, name) == [0, 0]
        assert "micro-batches of 1 instead of 3" in said(directory, name, 1)
        assert "another process of the run is out of memory): repeated" in said(directory, name, 0)
        assert_same_adapter(directory / name, directory / "one")


def test_a_value_that_is_not_finite_is_found_and_a_death_ends_the_run(tmp_path: Path) -> None:
    directory = runs(tmp_path, "faults")
    assert codes(directory, "not finite") == [4, 4]
    told = said(directory, "not finite", 0)
    broken = said(directory, "not finite", 1).split("broken: ")[1].split()[0]
    assert re.search(r"error: step 2: .* norm inf; first in the gradient of ", told)
    assert broken in told.split("of the examples ")[1].split(";")[0].split(", ")
    assert codes(directory, "killed") == [2, -signal.SIGKILL]
    assert "error: another process of the run has ended" in said(directory, "killed", 0)
    assert "Traceback" not in said(directory, "killed", 0)
    for name, step in (("not finite", 1), ("killed", 2)):
        newest, skipped = newest_whole(directory / name / "checkpoints")
        assert newest is not None
        assert (newest.name, skipped) == (f"step-{step:06d}", [])


def test_answers_are_those_of_one_process_also_in_little_memory(tmp_path: Path) -> None:
    directory = runs(tmp_path, "evaluate")
    answers = {}
    for name in ("one", "sharded", "little memory"):
        assert set(codes(directory, name)) == {0}
        answers[name] = [json.loads(found) for found in re.findall("answers: (.*)", said(directory, name, 0))]
    assert len(answers["one"]) == 2
    assert len({len(answer) for answer in answers["one"][1].values()}) > 2
    assert answers["sharded"] == answers["one"] == answers["little memory"]
    assert_same_curve(directory / "sharded", directory / "one")
    assert "out of memory with 2 questions at once" in said(directory, "little memory", 0)


def test_a_network_that_is_trained_in_full_is_sharded_and_saved_whole(tmp_path: Path) -> None:
    directory = runs(tmp_path, "in full")
    assert (codes(directory, "one"), codes(directory, "sharded")) == ([0], [0, 0])
    ours, theirs = (load_file(directory / run / "model/model.safetensors") for run in ("sharded", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=FP32, atol=rounding.EXACT * tensor.abs().max().item(), msg=name
        )


def test_a_base_in_four_bits_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "asks_for_fsdp", lambda: True)
    arguments = [*kill_test.overrides(tmp_path, tmp_path / "run"), "model.quantize=nf4"]
    config = load_config(kill_test.ROOT / "configs/quickstart.yaml", arguments)
    with pytest.raises(ValueError, match=r"model\.quantize=nf4 under FSDP: .* model\.quantize=null, or launch with"):
        open_model(kill_test.ROOT / "assets/tiny-base", config)
