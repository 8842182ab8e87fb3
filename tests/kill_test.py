"""Kill a small run again and again, at any moment, go on with it until it is done, and compare what came out.

    python -m tests.kill_test --runs 100 [--seed 0]

Each kill is a SIGKILL at a random moment of a process that trains, evaluates and writes a checkpoint at every step;
every other one waits for a directory to be in the writing.
After each, everything that stands under the name of a checkpoint or of the adapter must be whole by its manifest; and
each time a run gets to its end, as the last one is let do, its adapter must be the uninterrupted one's, bit for bit.
Prints what happened; exit code 1 where anything was not so. Works where processes can be forked (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import train
from data.lengths import Longest
from data.synthetic import scenes
from finetune import run
from finetune.config.load import load_config
from finetune.preflight.plan import Plan
from finetune.preflight.run_plan import RunPlan
from finetune.system.atomic import damage
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemmaConfig

ROOT = Path(__file__).parent.parent
# Some of each tower and of the connector: what is not about them learns with a third of the adapters as well.
TARGETS = "[language.down_proj, connector.linear, vision.fc2]"
STEPS = 6


class Unplanned:
    """Stands for the planner, where planning would take longer than the run."""

    def evaluation_batch(self, batch_size: int, *_: int) -> int:
        return batch_size


def unplanned(*_: object) -> RunPlan:
    """Stands for `plan_run`: micro-batches of 3, whatever the run."""
    planner: Any = Unplanned()
    return RunPlan(planner, Plan(ExecutionPlan(3), {}, 0), "no budget")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_test", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="how many times to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which runs are killed")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        counts, wrong = kill(Path(directory), arguments.runs, random.Random(arguments.seed))
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    if wrong:
        sys.exit("not as promised:\n  " + "\n  ".join(wrong))
    print("after every kill all that was in place was whole; every finished run's adapter is bit for bit the same")


def kill(directory: Path, kills: int, rng: random.Random) -> tuple[Counter[str], list[str]]:
    """Kill that many times; what happened, and what was not as promised."""
    torch.set_num_threads(1)  # no threads in this process: it forks
    plan_once()
    gc.freeze()  # a collection in a process to come need not go through all that was imported
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(directory / "data", scenes=8, seed=seed, split=split)
    start = time.monotonic()
    assert wait(begin(directory, "straight")) == 0, f"the uninterrupted run failed: see {directory}"
    length = time.monotonic() - start
    expected = adapter(directory / "straight")
    counts, wrong = Counter({"kills": 0, "of them while a directory was being written": 0, "finished runs": 0}), []
    while counts["kills"] < kills:
        output = directory / f"run-{counts['finished runs']}"
        child = begin(directory, output.name)
        time.sleep(rng.uniform(0, length))
        if rng.random() < 0.5:
            wait_for_writing(output, 1.0)
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        counts["kills"] += code == -signal.SIGKILL
        counts["of them while a directory was being written"] += is_writing(output)
        named = [output / "adapter", *(output / "checkpoints").glob("step-*")]
        named = [path for path in named if path.exists()]
        wrong += [f"{path.relative_to(directory)}: {reason}" for path in named if (reason := damage(path))]
        if code != -signal.SIGKILL:
            counts["finished runs"] += code == 0
            wrong += difference(output, code, expected)
            shutil.rmtree(output)
    # What was killed last goes on to its end, so that one adapter at least is compared after a kill.
    output = directory / f"run-{counts['finished runs']}"
    if output.exists():
        code = wait(begin(directory, output.name))
        counts["finished runs"] += code == 0
        wrong += difference(output, code, expected)
    return counts, wrong


def difference(output: Path, code: int, expected: bytes) -> list[str]:
    """What a run that ended by itself has otherwise than promised."""
    if code:
        return [f"{output.name}: exit code {code}"]
    return [] if adapter(output) == expected else [f"{output.name}: another adapter"]


def is_writing(output: Path) -> bool:
    return any(path.is_dir() for place in ("", "checkpoints") for path in (output / place).glob(".*"))


def wait_for_writing(output: Path, seconds: float) -> None:
    """Return the moment a directory is being written, or after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_writing(output):
        pass


def plan_once() -> None:
    """Let the processes to come share one plan, which takes as long as their training, and writes nothing."""
    config = load_config(ROOT / "configs/quickstart.yaml", overrides(Path("data"), Path("unused")))
    made = run.plan_run(config, PaliGemmaConfig.from_directory(Path(config.model.path)), Longest(32, 4, 4))
    run.plan_run = lambda *_: made


def begin(directory: Path, name: str) -> int:
    """Train in a process of its own, from wherever the run stands; returns its number."""
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    try:
        train.main([str(ROOT / "configs/quickstart.yaml"), *overrides(directory, directory / name)])
    except BaseException:
        os._exit(1)
    os._exit(0)


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process whose stderr is read, in a group of its own that is gone afterwards, whatever happens meanwhile."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait_for_steps(ended: Callable[[], str | bool], output: Path) -> None:
    """Until a run has logged its first steps; however long that takes, as long as it goes on.

    ended: False, and once it has ended how.
    """
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert not (how := ended()), how
        time.sleep(0.05)


def wait(child: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def overrides(directory: Path, output: Path) -> list[str]:
    files = {
        part: f"{{questions: {directory}/data/v2_OpenEnded_mscoco_{split}_questions.json, annotations: "
        f"{directory}/data/v2_mscoco_{split}_annotations.json, images: {directory}/data/images}}"
        for part, split in (("train", "train2014"), ("validation", "val2014"))
    }
    return [
        f"model={{path: {ROOT}/assets/tiny-base, dtype: float32, device: cpu}}",
        f"data={{train: {files['train']}, validation: {files['validation']}, workers: 0}}",
        f"lora={{rank: 4, dropout: 0.1, targets: {TARGETS}}}",
        f"train={{max_steps: {STEPS}, batch_size: 6, micro_batch: 3, learning_rate: 1e-2, log_every: 1, save_every: 1, "
        "eval_every: 3}",
        "evaluation={count: 4, batch_size: 4, max_new_tokens: 3}",
        f"output={output}",
    ]


def adapter(output: Path) -> bytes:
    return (output / "adapter/adapter_model.safetensors").read_bytes()


if __name__ == "__main__":
    main()
