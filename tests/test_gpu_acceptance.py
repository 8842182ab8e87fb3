"""The acceptance run of a GPU, on a CPU at tiny dimensions: every check runs, and each can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generate, gpu_acceptance, side_by_side
from benchmarks.acceptance import card as card_module
from benchmarks.acceptance import correctness, correctness_training, memory, memory_training, speed
from benchmarks.acceptance.bench import Bench
from benchmarks.acceptance.card import Card, Memory, covered
from benchmarks.acceptance.findings import Check, Finding, Part, Report, SkippedError, at_most, run_part
from finetune.evaluation import batches
from finetune.lora.linear import adapters
from finetune.training import trainer
from finetune.training.gradient_accumulation import GradientAccumulation
from model import IGNORE_INDEX, PaliGemma

ON_A_CPU = ["--device", "cpu", "--size", "tiny"]
NEEDS_A_GPU = {"correctness.syncs", "memory.phases", "memory.offload"}  # skipped on a CPU
NEEDS_A_GPU |= {
    *(f"speed.batch-{rows}.ours/{other}" for rows in speed.ROWS for other in ("documented", "tuned")),
    *(f"speed.batch-{rows}.ours-recompute/tuned-checkpointing" for rows in speed.ROWS),
    "speed.nf4.ours/documented",
    "speed.liger",  # needs another package, too
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Card("cpu"), "tiny", tmp_path)


def run(part: Part, bench: Bench, budget: float = 60, output: Path | None = None) -> dict[str, Finding]:
    """What the checks of a part find, by name."""
    report = Report(output, {})
    run_part("part", part, bench, report, budget)
    return {finding.name.removeprefix("part."): finding for finding in report.findings}


def passes(bench: Bench) -> Iterator[Finding]:
    yield at_most("passes", 1.0, 2.0)


def test_every_check_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_acceptance.main([*ON_A_CPU, "--output", str(tmp_path / "found.json")])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["findings"]
    assert [line.split()[:2] for line in lines] == [[entry["status"], entry["name"]] for entry in found]
    assert {entry["name"] for entry in found if entry["status"] != "PASS"} == NEEDS_A_GPU
    assert last == f"{len(found) - len(NEEDS_A_GPU)} PASS, 0 FAIL, {len(NEEDS_A_GPU)} SKIP"
    assert all(entry["bound"] for entry in found if entry["status"] == "PASS")


def test_a_failure_is_the_exit_code_and_the_other_checks_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Bench) -> Iterator[Finding]:
        yield at_most("fails", float("nan"), 1.0)

    def breaks(bench: Bench) -> Iterator[Finding]:
        yield at_most("before", 0.0, 1.0)
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(correctness, "CHECKS", {"fails": fails, "breaks": breaks, "passes": passes})
    with pytest.raises(SystemExit) as stopped:
        gpu_acceptance.main([*ON_A_CPU, "--part", "correctness"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAIL correctness.fails nan (<= 1)",
        "PASS correctness.before 0 (<= 1)",
        "FAIL correctness.breaks raised RuntimeError: no kernel image",
        "PASS correctness.passes 1 (<= 2)",
        "2 PASS, 2 FAIL, 0 SKIP",
    ]


def test_what_got_no_turn_is_listed(bench: Bench, tmp_path: Path) -> None:
    """A check is cut off when the part's time is over, keeps what it had found, and those behind it are named."""

    def slow(bench: Bench) -> Iterator[Finding]:
        yield at_most("first", 0.0, 1.0)
        for _ in range(1000):
            time.sleep(0.02)
        yield at_most("second", 0.0, 1.0)

    found = run({"slow": slow, "passes": passes}, bench, 2.0, tmp_path / "found.json")
    assert {name: finding.status for name, finding in found.items()} == {
        "first": "PASS",
        "slow": "SKIP",
        "passes": "SKIP",
    }
    assert "cut off" in found["slow"].figure
    assert "not started" in found["passes"].figure
    assert len(json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["findings"]) == 3


def test_a_missing_package_is_skipped_by_name_and_our_own_is_not(bench: Bench) -> None:
    def imports(name: str) -> Check:
        def check(bench: Bench) -> Iterator[Finding]:
            __import__(name)
            yield at_most("imports", 0.0, 1.0)

        return check

    def says(bench: Bench) -> Iterator[Finding]:
        raise SkippedError("needs a GPU")
        yield

    checks = {"theirs": imports("liger_kernel_that_is_missing"), "ours": imports("finetune.missing"), "says": says}
    found = run(checks, bench)
    assert {name: finding.status for name, finding in found.items()} == {
        "theirs": "SKIP",
        "ours": "FAIL",
        "says": "SKIP",
    }
    assert "liger_kernel_that_is_missing" in found["theirs"].figure
    assert found["says"].figure == "needs a GPU"


def test_the_report_is_whole_after_each_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    report = Report(file, {"device": "none"})
    for count in range(3):
        document = json.loads(file.read_text(encoding="utf-8"))
        assert document["device"] == "none"
        assert len(document["findings"]) == count
        report.add(at_most(f"check {count}", 0.5, 1.0, "GiB"))
    assert capsys.readouterr().out.splitlines()[0] == "PASS check 0 0.5 GiB (<= 1 GiB)"
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_the_librarys_network_is_on_our_tensors(bench: Bench) -> None:
    """Nothing is copied, in either dtype, and what is there is all it needs."""
    for dtype in (torch.float32, torch.bfloat16):
        ours, library = bench.ours(dtype), bench.library(dtype)
        mine = {parameter.data_ptr() for parameter in ours.parameters()}
        assert {parameter.data_ptr() for parameter in library.parameters()} == mine
        assert {parameter.dtype for parameter in library.parameters()} == {dtype}


def scaled(self: Bench, dtype: torch.dtype, dropout: float = 0.0, whole: Any = Bench.adapted) -> PaliGemma:
    """Adapters of which one is off by a thousandth, in fp32."""
    model: PaliGemma = whole(self, dtype, dropout)
    if dtype == torch.float32:
        _, adapter = next(adapters(model))
        adapter.adapter_parameters()["lora_B"].data.mul_(1.001)
    return model


def test_a_scaled_adapter_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.adapter_directory()
    monkeypatch.setattr(Bench, "adapted", scaled)
    found = run({"fp32": correctness.fp32}, bench)
    assert {name for name, finding in found.items() if finding.status == "FAIL"} == {"fp32.logits", "fp32.gradients"}


def test_the_kernel_of_separate_products_fails(bench: Bench) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        found = run({"attention": correctness.attention}, bench)
    assert {finding.status for finding in found.values()} == {"FAIL"}
    assert all("math" in finding.figure for finding in found.values())


def test_reduced_products_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TF32 would make them."""
    product = torch.Tensor.__matmul__

    def reduced(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return product(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", reduced)
    assert run({"no_tf32": correctness.no_tf32}, bench)["no_tf32"].status == "FAIL"


def test_other_tokens_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate.ours_on

    def shifted(model: PaliGemma) -> generate.Generate:
        made = whole(model)

        def answer(batch: dict[str, torch.Tensor], count: int) -> torch.Tensor:
            return made(batch, count).roll(1, 0)

        return answer

    monkeypatch.setattr(generate, "ours_on", shifted)
    assert run({"generation": correctness.generation}, bench)["generation"].status == "FAIL"


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.status == "FAIL"}


def test_masks_that_depend_on_the_cut_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyed by the row's place in its micro-batch instead of by the record: right only where nothing is cut."""
    by_place = lambda self, names, step: torch.arange(len(names), dtype=torch.int32)  # noqa: E731
    monkeypatch.setattr(GradientAccumulation, "dropout_seeds", by_place)
    found = failed(run({"dropout": correctness_training.dropout}, bench))
    assert found == {f"dropout.{mode}" for mode in ("micro_batches", "single_rows", "all_together")}


def test_a_step_that_depends_on_the_cut_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch divided by its own tokens: the mean of means."""
    whole = GradientAccumulation.micro_step

    def by_its_own(self: GradientAccumulation, rows: Any, images: Any, tokens: int, *given: Any) -> torch.Tensor:
        own = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
        return whole(self, rows, images, own * 3, *given)

    monkeypatch.setattr(GradientAccumulation, "micro_step", by_its_own)
    assert {"step.micro_batches", "step.single_rows"} <= failed(run({"step": correctness_training.cuts}, bench))


def test_a_run_that_forgets_its_optimizer_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.checkpoints, "read_optimizer_state", lambda *_: None)
    assert failed(run({"resume": correctness_training.resume}, bench)) == {"resume"}


def test_another_optimizer_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness_training, "BETAS", (0.9, 0.99))  # PEFT's
    assert "steps.losses.peft" in failed(run({"steps": correctness_training.steps}, bench))


def test_a_host_that_waits_fails_and_says_where(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two synchronisations in each micro-batch, which torch tells as warnings."""
    whole = GradientAccumulation.micro_step

    def waits(self: GradientAccumulation, *inputs: Any) -> torch.Tensor:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return whole(self, *inputs)

    monkeypatch.setattr(GradientAccumulation, "micro_step", waits)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    bench.card.is_cuda = True
    found = run({"syncs": correctness_training.synchronisations}, bench)
    assert found["syncs"].status == "FAIL"
    assert found["syncs"].figure == "2 per micro-batch"
    assert [(line.partition(":")[0], count) for line, count in found["syncs"].details["lines"].items()] == [
        ("tests/test_gpu_acceptance.py", 16)
    ]


def test_a_step_repeated_on_top_of_its_failed_attempt_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PaliGemma, "zero_grad", lambda self, set_to_none=True: None)
    hidden = Card.require_room
    calls = 0

    def late(self: Card, rows: int) -> None:  # of the second attempt the first micro-batch has room, the other none
        nonlocal calls
        calls += 1
        if calls != 2:
            hidden(self, rows)

    monkeypatch.setattr(Card, "require_room", late)
    assert failed(run({"recovers": memory_training.recovers}, bench)) == {"recovers.gradient"}


def test_a_contender_with_more_room_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned recipe fits nine rows, ours five."""

    def attempt(bench: Bench, make: object, rows: int) -> dict[str, Any] | None:
        limit = 9 if make is memory.CONTENDERS["tuned"] else 5
        return {"seconds": 1.0} if rows <= limit else None

    monkeypatch.setattr(memory, "attempt", attempt)
    found = run({"largest": memory.largest}, bench)
    assert failed(found) == {"largest.tuned"}
    assert found["largest.tuned"].figure.startswith("9 rows")


@pytest.mark.parametrize(("reserved", "status"), [(6.0, "PASS"), (6.5, "PASS"), (6.7, "FAIL"), (5.3, "FAIL")])
def test_a_plan_that_is_off_by_more_than_a_tenth_fails(reserved: float, status: str) -> None:
    assert memory_training.planned_beside("step", 6 * 2**30, Memory(1.0, reserved, 9.0)).status == status


def test_the_phases_of_a_step_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mark takes the peak since the one before; a phase that comes again keeps its highest."""
    peaks = iter([Memory(1, 5, 7), Memory(2, 5, 7), Memory(4, 4, 8)])
    monkeypatch.setattr(Card, "memory", lambda self: next(peaks))
    meter = memory_training.Meter(Card("cpu"))
    for phase in ("forward", "backward", "forward"):
        meter.mark(phase)
    assert meter.phases == {"forward": Memory(4, 5, 8), "backward": Memory(2, 5, 7)}


def test_a_step_that_is_slower_fails_on_a_gpu_alone(bench: Bench) -> None:
    times = {"ours": [2.0, 2.0, 1.0], "tuned": [1.0, 1.5, 2.0]}
    (*_, on_a_cpu) = speed.told(bench, "batch", times, 4, [("ours", "tuned")])
    bench.card.is_cuda = True
    (*told, on_a_gpu) = speed.told(bench, "batch", times, 4, [("ours", "tuned")])
    assert (on_a_cpu.status, on_a_gpu.status) == ("SKIP", "FAIL")
    assert [finding.figure for finding in told] == [
        "2.0000 (1.0000..2.0000) s/step, 2.00 samples/s",
        "1.5000 (1.0000..2.0000) s/step, 2.67 samples/s",
    ]
    assert on_a_gpu.figure == "1.333 (0.500..2.000)"


def test_synchronisations_are_counted_by_source_line() -> None:
    """torch says them as warnings; on a CPU there are none, so they are said here."""
    with Card("cpu").synchronisations() as counted:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert list(counted.values()) == [3]
    assert next(iter(counted)).startswith("tests/test_gpu_acceptance.py:")


def test_what_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of a variant that the table does not know is measured, not taken from its relative."""
    card = Card("cpu")
    for name, known in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 3070", 40.6e12),
        ("NVIDIA GeForce RTX 3070 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA B200", None),
    ):
        monkeypatch.setattr(Card, "name", name)
        peak, source = card.peak_flops()
        assert (source == "a large product, measured") == (known is None), name
        assert known is None or peak == known


def test_the_busy_time_counts_what_overlaps_once() -> None:
    assert covered([(0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (5.0, 6.0)]) == 4.0
    assert covered([]) == 0.0


def test_a_profile_on_a_cpu() -> None:
    a = torch.randn(64, 64)
    profile = Card("cpu").profile(lambda: [a @ a for _ in range(5)])
    assert profile.launches == 5
    assert 0 < profile.busy <= 1
    assert list(profile.kernels) == ["aten::matmul"]


def test_a_batch_of_questions_that_is_lost_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halved, but gone on with behind the batch that found no room."""

    def forgets(self: Any, reason: str) -> None:
        self.size = self.last // 2
        warnings.warn(f"out of memory: {reason}", stacklevel=1)

    monkeypatch.setattr(batches.Batches, "halve", forgets)
    found = run({"evaluation": memory_training.evaluation_recovers}, bench)
    assert failed(found) == {"recovers.evaluation"}
    assert " of 12 answered" in found["recovers.evaluation"].figure


def test_without_pydantic_what_needs_none_is_checked(tmp_path: Path) -> None:
    """A machine that cannot install it: the comparisons with the library go on, the rest is skipped by name."""
    code = (
        "import gc, sys\n"
        "for name in 'pydantic datasets bitsandbytes'.split():\n"
        "    sys.modules[name] = None\n"
        "from benchmarks import gpu_acceptance\n"
        "from benchmarks.acceptance import correctness, memory, speed\n"
        "import peft\n"
        "gc.freeze()\n"  # the collections after each check need not go through all that was imported
        "gpu_acceptance.main(sys.argv[1:])\n"
    )
    output = tmp_path / "found.json"
    command = [sys.executable, "-c", code, *ON_A_CPU, "--output", str(output)]
    subprocess.run(command, cwd=side_by_side.ROOT, check=True, capture_output=True)
    found = json.loads(output.read_text(encoding="utf-8"))["findings"]
    passed = {entry["name"] for entry in found if entry["status"] == "PASS"}
    wanted = {"correctness.fp32.gradients", "correctness.generation", "memory.largest.ours", "speed.batch-4.tuned"}
    assert wanted <= passed
    skipped = {entry["name"]: entry["figure"] for entry in found if entry["status"] == "SKIP"}
    assert all("pydantic" in skipped[name] for name in ("correctness.steps", "memory.phases", "speed.dropout"))


def test_facts_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    whole = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return whole(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "peft missing" in card_module.facts(Card("cpu"))["machine"]
