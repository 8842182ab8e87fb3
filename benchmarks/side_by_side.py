"""What the comparisons share: the same files for all arms, each arm in a process of its own, by turns, and a table.

A case is a directory that every arm is given: `checkpoint`, `adapter`, `batch.safetensors`. An arm prints one line of
JSON. All arms import transformers and PEFT, so that their memory differs by the work alone. A case of few layers, in
fp32, is the gate: where the arms do not compute the same, nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.random_checkpoint import write_checkpoint
from finetune.adapters.storage import save_adapter
from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.lora.protocol import adapters
from finetune.system.device import DTYPES, is_out_of_memory, pick_device, pick_dtype
from finetune.system.paths import path_argument
from model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from model.checkpoint import canonical_name
from model.ops.bf16_on_cpu import this_cpu
from model.safetensors_io import MappedFile, stored_tensors

Results = dict[str, list[dict[str, Any]]]  # arm -> what it measured, one entry a round

ROOT = Path(__file__).parent.parent
GIB = 2**30
TINY = PaliGemmaConfig(
    VisionConfig(32, 64, num_hidden_layers=3, num_attention_heads=2, image_size=56),
    TextConfig(32, 64, num_hidden_layers=3, num_attention_heads=4, head_dim=16, vocab_size=256),
    image_token_id=250,
)
MEMORY = {"cpu": {"peak RSS, GiB": "rss"}, "cuda": {"allocated, GiB": "allocated", "reserved, GiB": "reserved"}}


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons have."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
        return value

    made = argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.register("type", "positive", positive)
    made.add_argument(
        "--checkpoint", type=path_argument, help="made by benchmarks.random_checkpoint; default: made for this run"
    )
    made.add_argument("--tiny", action="store_true", help="make one of tiny dimensions: tries the comparison itself")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--cap-gib", type=float, help="on a GPU: allow the process this much of its memory only")
    made.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="what is timed; the gate is in fp32")
    made.add_argument("--rounds", type="positive", default=3, help="times that every arm has its turn")
    made.add_argument("--steps", type="positive", default=3, help="repetitions timed in one turn, after one unmeasured")
    made.add_argument(
        "--output", type=path_argument, help="append the tables, with date, command and machine, to this file"
    )
    made.add_argument("--arm", help="run this arm alone, on --case, and print its line")
    made.add_argument(
        "--case", type=path_argument, help="directory of checkpoint, adapter and batch.safetensors, for --arm"
    )
    return made


def parse(
    made: argparse.ArgumentParser,
    argv: Sequence[str],
    arms: Sequence[str],
    run_arm: Callable[[argparse.Namespace], dict[str, Any]],
) -> argparse.Namespace | None:
    """The options, checked; None after an arm that was to run alone has run, and printed its line.

    Raises:
        ValueError: what cannot run here: a package, the device or /proc is missing, options do not fit each other.
    """
    arguments = made.parse_args(argv)
    for package in ("transformers", "peft"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"{package} cannot be imported ({error}): pip install 'transformers' 'peft'") from error
    device = pick_device(arguments.device)
    if device.type not in MEMORY:
        raise ValueError(f"device {arguments.device!r}: peak memory is known for {', '.join(MEMORY)} only")
    if device.type == "cpu" and not Path("/proc/self/status").exists():
        raise ValueError("peak memory of a CPU process is read from /proc, which this system has not: use Linux")
    if arguments.tiny and arguments.checkpoint:
        raise ValueError("--tiny makes a checkpoint, --checkpoint names one: give one of them")
    if arguments.cap_gib and device.type != "cuda":
        raise ValueError(f"--cap-gib {arguments.cap_gib} holds a GPU's memory: it needs --device cuda")
    if not arguments.arm:
        return arguments
    if arguments.arm not in arms or not arguments.case:
        raise ValueError(
            f"--arm {arguments.arm} --case {arguments.case}: expected one of {', '.join(arms)}, and a case"
        )
    try:
        measured = run_arm(arguments)
    except Exception as error:
        if not is_out_of_memory(error):  # that is a result like any other
            raise
        measured = {"out of memory": True}
    print(json.dumps(measured))
    return None


# The case: files that all arms read.


@contextlib.contextmanager
def workplace(arguments: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """A temporary directory, and the checkpoint: the one that was given, or one with random weights made there."""
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as name:
        place, checkpoint = Path(name), arguments.checkpoint
        if checkpoint is None:
            checkpoint = place / "random"
            write_checkpoint(checkpoint, TINY if arguments.tiny else PaliGemmaConfig(), torch.bfloat16, seed=0)
        yield place, checkpoint.resolve()


def write_case(case: Path, checkpoint: Path, batch: dict[str, Tensor], rank: int = 0) -> Path:
    """A case of this checkpoint and batch; with a rank, an adapter of random A and B (std 0.01) on all language
    linears.
    """
    case.mkdir()
    (case / "checkpoint").symlink_to(checkpoint, target_is_directory=True)
    save_file(batch, case / "batch.safetensors")
    if rank:
        with torch.device("meta"):
            model = PaliGemma(PaliGemmaConfig.from_directory(checkpoint))
        inject_lora(model, LoRAConfig(rank=rank, alpha=rank))
        randomize_adapters(model, torch.device("cpu"))
        save_adapter(model, case / "adapter")
    return case


def randomize_adapters(model: nn.Module, device: torch.device) -> None:
    """Adapters on `device` that are off their start: A of std 1/sqrt(in), B of std 0.01."""
    generator = torch.Generator(device).manual_seed(0)
    for _, adapter in adapters(model):
        for name, parameter in adapter.adapter_parameters().items():
            std = parameter.shape[1] ** -0.5 if name == "lora_A" else 0.01
            setattr(adapter, name, nn.Parameter(torch.randn(parameter.shape, generator=generator, device=device) * std))


def write_shallow(checkpoint: Path, directory: Path, layers: int = 2) -> Path:
    """The same checkpoint with the first layers of tower and decoder only."""
    full = PaliGemmaConfig.from_directory(checkpoint)
    config = dataclasses.replace(
        full,
        vision=dataclasses.replace(full.vision, num_hidden_layers=layers),
        text=dataclasses.replace(full.text, num_hidden_layers=layers),
    )
    tensors: dict[str, Tensor] = {}
    mapped = cache(MappedFile)
    for key, stored in stored_tensors(checkpoint).items():
        layer = re.search(r"\.layers\.(\d+)\.", key)
        if (name := canonical_name(key)) and not (layer and int(layer[1]) >= layers):
            tensors[name] = stored.within(mapped(stored.file).content)
    directory.mkdir()
    dtype = next(iter(tensors.values())).dtype
    (directory / "config.json").write_text(json.dumps(config.to_hf(dtype)), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def read_batch(case: Path, device: torch.device) -> dict[str, Tensor]:
    return load_file(case / "batch.safetensors", device=str(device))


# An arm, in its own process.


def start(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Where and in what an arm computes, its memory held to the cap."""
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    if arguments.cap_gib:
        cap_memory(arguments.cap_gib, device)
    torch.backends.cudnn.allow_tf32 = arguments.dtype != "float32"
    return device, dtype


def cap_memory(gib: float, device: torch.device) -> None:
    """Let torch's allocator have so much of a GPU's memory, in this process; the CUDA context is besides."""
    index = torch.cuda.current_device() if device.index is None else device.index  # torch wants an index here
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), index)


def library_model(checkpoint: Path, dtype: torch.dtype, device: torch.device, nf4: bool = False) -> Any:
    """The checkpoint in transformers' own PaliGemma; in NF4 the decoder's linears, as ours, the towers as they are."""
    from transformers import BitsAndBytesConfig, PaliGemmaForConditionalGeneration

    opened: Any = PaliGemmaForConditionalGeneration
    if not nf4:
        return opened.from_pretrained(checkpoint, dtype=dtype).to(device)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    place = str(device)
    return opened.from_pretrained(checkpoint, dtype=dtype, quantization_config=settings, device_map=place)


def timed(work: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of one repetition."""
    synchronize: Callable[..., None] = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        work()
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def reset_peak(device: torch.device) -> str:
    """Let the peak of the memory start from here; returns since when it counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return "the process began (the system forbids a reset)"
    return "the measured part began"


def peaks(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB since `reset_peak`: resident on a CPU, allocated and reserved on a GPU."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device) / GIB,
            "reserved": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return {"rss": status_gib("VmHWM")}


def status_gib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024 / GIB


# All arms.


def fresh(module: str, arm: str, case: Path, arguments: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Run one arm in a process of its own; later options win. Raises ValueError with its last words if it fails."""
    command = [sys.executable, "-m", module, "--arm", arm, "--case", str(case), "--device", arguments.device]
    command += ["--dtype", arguments.dtype, "--steps", str(arguments.steps), *more]
    command += ["--cap-gib", str(arguments.cap_gib)] if arguments.cap_gib else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ValueError(f"arm {arm} ended with {ran.returncode}: {shlex.join(command)}\n{ran.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return measured


def exactly(arguments: argparse.Namespace) -> argparse.Namespace:
    """The same options for the gate: fp32, once, with all of a GPU's memory."""
    return argparse.Namespace(**vars(arguments) | {"dtype": "float32", "steps": 1, "cap_gib": None})


def by_turns(module: str, arms: Sequence[str], case: Path, arguments: argparse.Namespace, *more: str) -> Results:
    """Every arm once a round: a machine that slows down does so for all of them."""
    results: Results = {arm: [] for arm in arms}
    for number in range(arguments.rounds):
        for arm in arms:
            measured = fresh(module, arm, case, arguments, *more)
            results[arm].append(measured)
            print(f"round {number + 1}, {arm}: {measured}", file=sys.stderr)
    return results


def refuse(problems: Sequence[str]) -> None:
    """Exit with 1 and the list, if there is any problem."""
    if problems:
        raise SystemExit("the arms do not do the same, so there is nothing to compare:\n" + "\n".join(problems))


def spread(values: Sequence[float], digits: int) -> str:
    """Median (smallest..largest)."""
    if not values:
        return "out of memory"
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low}..{high})"


def rows(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def compared(results: Results, weighed: dict[str, str], others: dict[str, str]) -> list[str]:
    """Tables of what was measured and, within each round, of ours / theirs for what is weighed.

    weighed, others: heading -> name of the measurement.
    """
    columns = weighed | others
    measured = [
        [arm, *(spread([entry[key] for entry in entries if key in entry], 4) for key in columns.values())]
        for arm, entries in results.items()
    ]
    ratios = []
    for mine in (arm for arm in results if arm.startswith("ours")):
        for other in (arm for arm in results if not arm.startswith("ours")):
            pairs = list(zip(results[mine], results[other], strict=True))
            by = [[a[key] / b[key] for a, b in pairs if key in a and b.get(key)] for key in weighed.values()]
            ratios.append([f"{mine} / {other}", *(spread(values, 2) for values in by)])
    since = sorted({entry["since"] for entries in results.values() for entry in entries if "since" in entry})
    return [
        rows([["arm", *columns], *measured]),
        rows([["ratio", *weighed], *ratios]),
        f"Median (smallest..largest) of the rounds. Peak memory since {' or '.join(since)}.",
    ]


def machine() -> str:
    """CPU, threads, bfloat16 instructions, kernels in use, versions and GPU, in one line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    name = model[1] if model else "unknown CPU"
    fast = "yes" if "avx512_bf16" in text else "no"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    # What torch makes use of, which environment variables may hold below what the CPU has.
    kernels = (
        f"{torch.backends.cpu.get_cpu_capability()} kernels, bf16 by oneDNN {'yes' if this_cpu().onednn_bf16 else 'no'}"
    )
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, {threads}, avx512_bf16 {fast}, {kernels}; {versions}; GPU {card}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def report(module: str, argv: Sequence[str], output: Path | None, parts: Sequence[str]) -> None:
    """Print the tables under date, command and machine; append them to `output`."""
    command = shlex.join(["python", "-m", module, *argv])
    head = f"## {module}, {datetime.date.today().isoformat()}\n\n    {command}\n\n{machine()}."
    text = "\n\n".join([head, *parts]) + "\n"
    print(text)
    if output:
        with output.open("a", encoding="utf-8") as file:
            file.write("\n" + text)
