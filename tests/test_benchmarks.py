"""The comparisons run from end to end at tiny dimensions, and refuse to time what does not compute the same."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import arms, connector_step, generate, load, side_by_side, suffix_step, train_step
from benchmarks.acceptance.bench import Bench
from benchmarks.acceptance.card import Card
from model import ConnectorConfig, PaliGemma
from model.config import CONNECTORS
from model.convert import changed

QUICK = ["--tiny", "--rounds", "1", "--steps", "1"]
LAST_DIGIT = 1e-4  # of a loss and of a gradient's norm, as they are printed
Fault = Callable[[str, Path], None]  # arm and its case, changed in place


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Fault], None]:
    """Run arms here instead of each in a process of its own, which takes seconds to import its libraries; a fault
    changes the files of an arm before it runs.
    """

    def install(fault: Fault = lambda arm, case: None) -> None:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            module, options = command[2], command[3:]
            arm, place = options[1], options.index("--case") + 1
            own = Path(shutil.copytree(options[place], tmp_path / "own", symlinks=True))
            fault(arm, own)
            options[place] = str(own)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                importlib.import_module(module).main(options)
            shutil.rmtree(own)
            return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

        monkeypatch.setattr(subprocess, "run", run)

    install()
    return install


def test_a_training_step_beside_the_library(in_this_process: object, tmp_path: Path) -> None:
    """All arms pass the gate, and the table names each, with equal losses and gradients on either kind of base."""
    options = ["--dtype", "float32", "--batch", "3", "--output", str(tmp_path / "RESULTS.md")]
    train_step.main([*QUICK, *options, "--arms", *arms.ARMS])
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    measured = {row[0]: row[-2:] for row in body if row[0] in arms.ARMS}
    assert list(measured) == list(arms.ARMS)
    means = []
    for kind in (arms.DENSE, [arm for arm in arms.ARMS if arm not in arms.DENSE]):
        for column in zip(*(measured[arm] for arm in kind), strict=True):
            numbers = [float(cell) for cell in column]
            assert max(numbers) - min(numbers) < 1.5 * LAST_DIGIT
            means.append(statistics.mean(numbers))
    assert all(abs(a - b) > 10 * LAST_DIGIT for a, b in zip(means[:2], means[2:], strict=True))  # NF4: another base
    assert len([row for row in body if " / " in row[0]]) == 5 * 6
    assert "--batch 3" in text
    assert "Gate passed" in text
    assert "avx512_bf16" in text
    assert "kernels, bf16 by oneDNN" in text


@pytest.mark.parametrize("arm", ["ours", "tuned"])
def test_an_arm_in_fp32_is_in_fp32_beside_others_in_bf16(tmp_path: Path, arm: str) -> None:
    arguments, cpu = side_by_side.parser("test", None).parse_args(QUICK), torch.device("cpu")
    with side_by_side.workplace(arguments) as (_, checkpoint):
        batch = arms.make_batch(side_by_side.TINY, 2)
        case = side_by_side.write_case(tmp_path / "case", checkpoint, batch, rank=4)
        wanted, found, other = (
            arms.ARMS[name](case, dtype, cpu)[1](batch).detach()
            for name, dtype in ((arm, torch.float32), (f"{arm}-fp32", torch.bfloat16), (arm, torch.bfloat16))
        )
    assert torch.equal(found, wanted)
    assert not torch.equal(other, wanted)


def test_a_reference_alone_has_passed_no_gate(in_this_process: object, capsys: pytest.CaptureFixture[str]) -> None:
    train_step.main([*QUICK, "--arms", "documented"])
    printed = capsys.readouterr().out
    assert "No gate" in printed
    assert "Gate passed" not in printed


@pytest.mark.parametrize("arm", ["ours-recompute", "tuned", "ours-nf4"])
def test_one_scaled_adapter_closes_the_gate(in_this_process: Callable[[Fault], None], arm: str) -> None:
    """A thousandth in one of the B of one arm: exit code not 0, its name in the list, and no other arm's."""

    def scale(name: str, case: Path) -> None:
        if name == arm:
            (case / "adapter" / "manifest.json").unlink()
            tensors = load_file(case / "adapter" / "adapter_model.safetensors")
            tensors[next(key for key in tensors if key.endswith("v_proj.lora_B.weight"))] *= 1.001
            save_file(tensors, case / "adapter" / "adapter_model.safetensors")

    in_this_process(scale)
    with pytest.raises(SystemExit) as refused:
        train_step.main([*QUICK, "--arms", "ours", arm, "documented", "documented-nf4"])
    first, *problems = str(refused.value.code).splitlines()  # a text as code: exit status 1
    assert "nothing to compare" in first
    assert problems
    assert {line.partition(":")[0] for line in problems} == {arm}


def test_answering_beside_the_library(in_this_process: Callable[[Fault], None], capsys: Any) -> None:
    generate.main([*QUICK, "--dtype", "float32"])
    printed = capsys.readouterr().out
    assert "| ours / library |" in printed
    assert "float32 8 of 8 rows are the same" in printed

    def other_images(arm: str, case: Path) -> None:
        if arm == "library":
            batch = load_file(case / "batch.safetensors")
            batch["image_index"] = 1 - batch["image_index"]
            save_file(batch, case / "batch.safetensors")

    in_this_process(other_images)
    with pytest.raises(SystemExit, match="nothing to compare"):
        generate.main(QUICK)


def test_loading_beside_the_library(in_this_process: Callable[[Fault], None], capsys: Any) -> None:
    load.main(QUICK)
    printed = capsys.readouterr().out
    assert "From bfloat16 into bfloat16" in printed
    assert "From float32 into bfloat16" in printed
    assert printed.count("| ours / library |") == 2

    def shallow(arm: str, case: Path) -> None:
        if arm == "library":
            checkpoint = (case / "checkpoint").resolve()
            (case / "checkpoint").unlink()
            side_by_side.write_shallow(checkpoint, case / "checkpoint")

    in_this_process(shallow)
    with pytest.raises(SystemExit, match="library loaded"):
        load.main(QUICK)


def test_a_step_with_each_connector(in_this_process: Callable[[Fault], None], capsys: Any, tmp_path: Path) -> None:
    """A row each, with planned beside measured memory; a dense connector that does not start as `linear` is refused."""
    output, tokens = (
        tmp_path / "RESULTS.md",
        {"linear": "16", "dense_sci": "16", "resampler": "64", "pixel_shuffle": "4"},
    )
    connector_step.main([*QUICK, "--batch", "2", "--connectors", *tokens, "--output", str(output)])
    printed = capsys.readouterr().out
    assert output.read_text(encoding="utf-8").strip() == printed.strip()
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    head, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "---" not in line)
    table = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}
    assert {name: row["image tokens"] for name, row in table.items()} == tokens
    assert table["linear"]["first loss"] == table["dense_sci"]["first loss"] != table["resampler"]["first loss"]
    assert all(float(row["planned, GiB"]) > 0 and float(row["s/step"]) > 0 for row in table.values())

    def other_projector(arm: str, case: Path) -> None:
        if arm == "dense_dci":
            tensors = load_file(case / "model.safetensors")
            tensors[next(key for key in tensors if key.endswith("projector.linear.weight"))] *= 1.1
            save_file(tensors, case / "model.safetensors", metadata={"format": "pt"})

    in_this_process(other_projector)
    with pytest.raises(SystemExit, match=r"nothing to compare:\ndense_dci: first loss"):
        connector_step.main(QUICK)


def test_a_step_of_rows_with_several_answers(in_this_process: Callable[[Fault], None], capsys: Any) -> None:
    """A row for each arm: shared prefixes save tokens, and change no loss; where they do, nothing is compared."""
    quick = [*QUICK, "--dtype", "float32"]
    suffix_step.main(quick)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "---" not in line)
    table = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}
    assert list(table) == list(suffix_step.ANSWERS)
    assert {name: row["tokens"] for name, row in table.items()} == {
        "one": "32",
        "four": "41",
        "ten": "59",
        "four-rows": "128",
        "pair": "44",
        "pair-live": "44",
        "pair-rows": "73",
    }
    losses = {name: row["first loss"] for name, row in table.items()}
    assert losses["four"] == losses["four-rows"] != losses["one"]
    assert losses["pair-live"] == losses["pair-rows"] != "0.6931"

    def other_embedding(arm: str, case: Path) -> None:
        if arm == "pair-rows":
            tensors = load_file(case / "model.safetensors")
            tensors[next(key for key in tensors if "embed_tokens" in key)] *= 1.5
            save_file(tensors, case / "model.safetensors", metadata={"format": "pt"})

    in_this_process(other_embedding)
    with pytest.raises(SystemExit, match=r"nothing to compare:\npair-rows: first loss"):
        suffix_step.main(quick)


@pytest.mark.parametrize("kind", CONNECTORS)
@pytest.mark.parametrize("tiles", [1, 4])
def test_batches_are_made_for_any_connector_and_tiles(tmp_path: Path, kind: str, tiles: int) -> None:
    """Those of the comparisons and of the acceptance on a GPU: pixels and image tokens are the network's."""
    config = changed(side_by_side.TINY, ConnectorConfig(kind, latents=3, depth=1), tiles=tiles)
    model = PaliGemma(config)
    bench = Bench(Card("cpu"), "tiny", tmp_path)
    bench.config = config
    answered = generate.make_batch(config)
    answered["pixel_values"] = answered["pixel_values"][answered.pop("image_index")]
    del answered["left_padded_ids"]
    for batch in (arms.make_batch(config, 2), bench.batch(bench.examples(2)), answered):
        assert batch["pixel_values"].shape[1:] == config.pixel_shape
        assert (batch["input_ids"] == config.image_token_id).sum(dim=1).eq(config.num_image_tokens).all()
        model(**batch)


def test_an_arm_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The real command line of an arm, where the rooms with heavier needs cannot be imported."""
    arguments = side_by_side.parser("test", None).parse_args(QUICK)
    with side_by_side.workplace(arguments) as (_, checkpoint):
        case = side_by_side.write_case(tmp_path / "case", checkpoint, generate.make_batch(side_by_side.TINY))
        measured = side_by_side.fresh(generate.NAME, "ours", case, arguments)
    assert measured["seconds"] > 0
    assert measured["rss"] > 0.05
    assert len(measured["tokens"]) == 8


def test_what_the_comparisons_need() -> None:
    code = "import sys\nfor name in 'data datasets rich bitsandbytes pydantic yaml accelerate wandb'.split():\n"
    code += "    sys.modules[name] = None\nimport benchmarks.train_step, benchmarks.generate, benchmarks.load"
    subprocess.run([sys.executable, "-c", code], cwd=side_by_side.ROOT, check=True)


def test_the_cap_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a device without an index there, which `--device cuda` is."""
    capped: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: capped.append(given), raising=False)
    side_by_side.cap_memory(2.0, torch.device("cuda"))
    side_by_side.cap_memory(16.0, torch.device("cuda:0"))
    assert capped == [(0.25, 1), (1.0, 0)]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 11, 12, 16])
@pytest.mark.parametrize("first", [1, 4])
def test_the_largest_batch_is_found(limit: int, first: int) -> None:
    fitted = train_step.find_largest(lambda size: {"seconds": 1.0} if size <= limit else None, first)
    assert max(fitted, default=0) == limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "somewhere"], "give one of them"),
        (["--cap-gib", "6.9"], "needs --device cuda"),
        (["--largest"], "needs --device cuda"),
        (["--device", "cuda:99"], "is not there"),
        (["--arm", "theirs"], "expected one of ours"),
    ],
)
def test_what_cannot_run_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_step.main(["--tiny", *options])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install"):
        load.main(QUICK)


def test_an_arm_that_fails_tells_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 2, "", "error: no weights")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(ValueError, match=r"arm ours ended with 2.*\n.*no weights"):
        side_by_side.fresh(load.NAME, "ours", tmp_path, side_by_side.parser("test", None).parse_args([]))


def test_spread_and_out_of_memory() -> None:
    assert side_by_side.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0..3.0)"
    results: side_by_side.Results = {"ours": [{"seconds": 1.0, "since": "now"}], "tuned": [{"out of memory": True}]}
    measured, ratios, _ = side_by_side.compared(results, {"s": "seconds"}, {})
    assert measured.splitlines()[2:] == ["| ours | 1.0000 |", "| tuned | out of memory |"]
    assert ratios.splitlines()[2:] == ["| ours / tuned | out of memory |"]


def test_the_shallow_checkpoint_is_the_beginning_of_the_deep_one(tmp_path: Path) -> None:
    arguments = side_by_side.parser("test", None).parse_args(QUICK)
    with side_by_side.workplace(arguments) as (_, checkpoint):
        side_by_side.write_shallow(checkpoint, tmp_path / "shallow")
        deep = PaliGemma.from_pretrained(checkpoint).state_dict()
    shallow = PaliGemma.from_pretrained(tmp_path / "shallow")
    assert len(shallow.language_model.model.layers) == 2
    assert all(torch.equal(deep[name], tensor) for name, tensor in shallow.state_dict().items())
