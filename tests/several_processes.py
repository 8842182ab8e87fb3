"""Runs of several processes, with a fault in one of them or without, for tests/system/test_distributed.py to look at.

    python -m tests.several_processes DIRECTORY

A process is forked and told by its environment which one it is, as a launcher does it: so torch is imported once, not
for each. All is computed in fp64: sums in another order give the same adapters then, as they would not in fp32. Leaves
`NAME/` as the run wrote it, `NAME.RANK.txt` with what a process said, and their exit codes in `codes.json`. A run that
hangs is killed, and its exit codes say so.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import evaluate
import train
from data.synthetic import scenes
from finetune import cli
from finetune import run as training_run
from finetune.system import atomic, device, distributed
from finetune.training.gradient_accumulation import GradientAccumulation
from tests import kill_test, rounding
from tests.free_port import free_port

PATIENCE = 600.0  # seconds for a run, which takes two
CHANGES = [f"train.{change}" for change in ("max_steps=4", "batch_size=7", "learning_rate=3e-3", "eval_every=2")]
# Another connector, which a stage trains first, at another resolution, and all answers of a question in one row.
NETWORK = ["model.connector=resampler", "connector={latents: 3, depth: 1, learning_rate: 1e-3}", "image.size=84"]
NETWORK += ["lora={rank: 4, dropout: 0.1, targets: [language.down_proj, vision.fc2]}"]
NETWORK += ["stages=[{name: align, max_steps: 2}]", "data.answers=all", "train.max_steps=2"]
# Preference pairs, of which the last steps begin another epoch; the reference is an adapter's values.
PAIRS = ["train.objective=dpo", "train.max_steps=2", "lora.modules_to_save=[connector.linear]", "train.micro_batch=2"]
PAIRS += ["lora.targets=[language.down_proj]", "evaluation.count=null"]
Fault = Callable[[], None]


def main(argv: Sequence[str]) -> None:
    directory = Path(argv[0])
    torch.set_num_threads(1)  # no threads in this process: it forks
    compute_in_fp64()
    # Planning takes longer than a run.
    training_run.plan_run = kill_test.unplanned  # type: ignore[assignment]
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(directory / "data", scenes=8, seed=seed, split=split)
    codes: dict[str, list[int]] = {}

    def run(name: str, count: int, fault: Fault = lambda: None, output: str = "", *more: str) -> None:
        arguments = [str(kill_test.ROOT / "configs/quickstart.yaml")]
        arguments += [*kill_test.overrides(directory, directory / (output or name)), *CHANGES, *more]
        codes[name] = run_processes(directory / name, count, train.main, arguments, fault)

    run("one", 1)
    run("two", 2)
    run("killed", 2, at(2, 1, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
    run("killed, resumed", 1, output="killed")
    run("told", 2, at(0, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM)), "told", "train.save_every=100")
    run("told, resumed", 3, lambda: None, "told", "train.save_every=100")
    run("full disk", 2, full_disk)
    run("not finite", 2, not_finite)
    run("little memory", 2, little_memory, "little memory", "train.micro_batch=auto")
    run("worker killed", 2, at(2, 1, kill_worker), "worker killed", "data.workers=1")
    run("too many", 2, lambda: None, "too many", "train.batch_size=1", "train.micro_batch=1")
    run("looking", 2, lambda: None, "looking", "--dry-run")
    run("connector, one", 1, lambda: None, "connector, one", *NETWORK)
    run("connector, two", 2, lambda: None, "connector, two", *NETWORK)
    # A stage's adapter is stored in fp32, which rounds: from the same one on, all is the same again.
    shutil.copytree(directory / "connector, one/stages", directory / "connector, after/stages")
    run("connector, after", 2, lambda: None, "connector, after", *NETWORK)
    pairs = [*PAIRS, *write_pairs(directory)]
    run("pairs, one", 1, lambda: None, "pairs, one", *pairs)
    run("pairs, two", 2, lambda: None, "pairs, two", *pairs)
    for name, count in (("one", 1), ("two", 2)):
        arguments = [str(kill_test.ROOT / "configs/quickstart.yaml")]
        arguments += [*kill_test.overrides(directory, directory / name), *CHANGES]
        codes[f"{name}, evaluated"] = run_processes(directory / f"{name}, evaluated", count, evaluate.main, arguments)
    (directory / "codes.json").write_text(json.dumps(codes), encoding="utf-8")


def write_pairs(directory: Path) -> list[str]:
    """Of each question its answer, preferred to that of the one before; what a configuration says of them."""
    said = []
    for name, split in (("train", "train2014"), ("validation", "val2014")):
        files = {part: directory / f"data/v2_{part}_{split}" for part in ("OpenEnded_mscoco", "mscoco")}
        asked = json.loads(Path(f"{files['OpenEnded_mscoco']}_questions.json").read_text())["questions"]
        given = json.loads(Path(f"{files['mscoco']}_annotations.json").read_text())["annotations"]
        answers = [answer["multiple_choice_answer"] for answer in given]
        rows = [
            {"image": f"COCO_{split}_{one['image_id']:012d}.jpg", "prefix": one["question"], "suffix": own}
            | {"rejected": f"not {before}"}
            for one, own, before in zip(asked, answers, answers[-1:] + answers, strict=False)
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        said.append(f"data.{name}={{jsonl: {directory}/{name}.jsonl, images: {directory}/data/images}}")
    return said


def compute_in_fp64() -> None:
    """Let float32 mean float64 in this process and those it forks, for base and adapters."""
    device.DTYPES["float32"] = torch.float64
    rounding.KeepFP64().__enter__()
    adapt = training_run.adapt

    def adapt_in_fp64(model: Any, config: Any, anew: bool = False) -> None:
        adapt(model, config, anew)
        rounding.in_dtype(model, torch.float64)

    training_run.adapt = adapt_in_fp64


def run_processes(
    name: Path,
    count: int,
    script: Callable[[Sequence[str]], None],
    argv: list[str],
    fault: Fault = lambda: None,
) -> list[int]:
    """Exit codes of the processes, minus the signal where one ended them."""
    children, port = [], free_port()
    for rank in range(count):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        children.append(begin(Path(f"{name}.{rank}.txt"), told if count > 1 else {}, script, argv, fault))
    end = time.monotonic() + PATIENCE
    codes: dict[int, int] = {}
    while len(codes) < count:
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def begin(
    said: Path, told: dict[str, int], script: Callable[[Sequence[str]], None], argv: list[str], fault: Fault
) -> int:
    """Fork a process that runs a script as its command line would; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in told.items()},
    }
    sys.argv = [script.__module__, *argv]
    code: Any = 0
    try:
        fault()
        cli.run(script)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def kill_worker(_examples: list[dict[str, Any]]) -> None:
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)


def at(step: int, rank: int, act: Callable[[list[dict[str, Any]]], None]) -> Fault:
    """Do something with the examples of a step (counted from 0) in one process, before it computes gradients."""

    def fault() -> None:
        accumulate = GradientAccumulation.accumulate

        def faulty(self: GradientAccumulation, examples: Any, tokens: int, number: int) -> torch.Tensor:
            if (number, distributed.rank()) == (step, rank):
                act(examples)
            return accumulate(self, examples, tokens, number)

        GradientAccumulation.accumulate = faulty  # type: ignore[method-assign, assignment]

    return fault


def full_disk() -> None:
    """The disk is full when step 2 is written."""
    sync = atomic.sync

    def full(path: Path) -> None:
        if "step-000002" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    atomic.sync = full


def not_finite() -> None:
    """In step 2 an example of the second process gives an infinite gradient; it says which."""
    micro_step, broken = GradientAccumulation.micro_step, []

    def poisoned(self: GradientAccumulation, micro_batch: Any, *given: Any) -> torch.Tensor:
        loss = micro_step(self, micro_batch, *given)
        if any(example["id"] in broken for example in micro_batch):
            next(iter(self.trained.values())).grad.fill_(torch.inf)  # type: ignore[union-attr]
        return loss

    def note(examples: list[dict[str, Any]]) -> None:
        broken.append(examples[1]["id"])
        print(f"broken: {broken[0]}", flush=True)

    GradientAccumulation.micro_step = poisoned  # type: ignore[method-assign, assignment]
    at(1, 1, note)()


def little_memory() -> None:
    """The second process has too little memory for the plan's micro-batches of three."""
    micro_step = GradientAccumulation.micro_step

    def small(self: GradientAccumulation, micro_batch: Any, *given: Any) -> torch.Tensor:
        if distributed.rank() == 1 and len(micro_batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return micro_step(self, micro_batch, *given)

    GradientAccumulation.micro_step = small  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main(sys.argv[1:])
