"""Worker processes: little is needed for their batches, and one that dies ends the run with a sentence.

Started as a program, this file is a process of its own that does what its first argument names.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from data.synthetic import scenes
from finetune import cli, run
from finetune.system import workers
from finetune.training.gradient_accumulation import GradientAccumulation
from tests import kill_test, preloaded
from tests.system.made_batches import SIZE, Made, batches, count

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="worker processes are forked")

SHM = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'


class Unsendable(Made):
    """What no process can send to another."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"id": lambda: i}


def test_a_batch_arrives_as_it_was_made_and_an_image_once() -> None:
    made = [Made()[i] for i in range(SIZE)]
    sent = pickle.dumps(workers.Batch([*made, ValueError("no such image")]))
    *received, error = pickle.loads(sent)
    assert str(error) == "no such image"
    assert len(sent) < 0.6 * sum(example["pixel_values"].nbytes for example in made)
    for got, example in zip(received, made, strict=True):
        assert got.keys() == example.keys()
        for name, value in example.items():
            assert torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value, name


def test_few_file_handles_are_enough() -> None:
    """Torch's own way takes one for each tensor, four an example, of the batches that wait."""
    ran = preloaded.run(main, "batches", "128")
    assert (ran.returncode, ran.stdout) == (0, "512 examples\n"), ran.stderr


def test_no_shared_memory_is_needed() -> None:
    """1 MiB of it, for batches of 3 MiB."""
    namespace = ["unshare", "-rm", "sh", "-c", SHM, "sh"]
    try:
        subprocess.run([*namespace, "true"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted without privileges here: {getattr(error, 'stderr', error)}")
    command = [*namespace, sys.executable, "-m", "tests.system.made_batches"]
    ran = subprocess.run(
        command, cwd=kill_test.ROOT, capture_output=True, text=True, check=False, timeout=preloaded.PATIENCE
    )
    assert (ran.returncode, ran.stdout) == (0, "512 examples\n"), ran.stderr


def test_a_batch_that_cannot_be_sent_ends_its_worker() -> None:
    """And is not waited for."""
    ran = preloaded.run(main, "unsendable")
    assert ran.returncode == cli.MISTAKE, ran.stderr
    assert "a worker process could not send its examples: " in ran.stderr
    assert "error: a worker process that prepares examples has ended" in ran.stderr


@pytest.mark.parametrize(
    ("fault", "code"), [("killed", cli.MISTAKE), ("not finite", cli.NOT_FINITE), ("a bug", 1), ("no", 0)]
)
def test_a_run_with_workers_ends_when_it_has_to(tmp_path: Path, fault: str, code: int) -> None:
    """Also the process ends, although workers ignore the signal that would end them."""
    ran = preloaded.run(main, "train", str(tmp_path), fault)
    assert ran.returncode == code, ran.stderr
    assert ("Traceback" in ran.stderr) == (fault == "a bug")
    if fault == "killed":
        assert "error: a worker process that prepares examples has ended, often because the machine is" in ran.stderr
        # What torch notices first: the signal of a dead child, or a child that is not there.
        assert "killed by signal: Killed" in ran.stderr or "exited unexpectedly" in ran.stderr
        assert "lower data.workers" in ran.stderr


def test_workers_that_cannot_be_started_are_explained() -> None:
    ran = preloaded.run(main, "handles")
    assert ran.returncode == cli.MISTAKE, ran.stderr
    assert "error: the worker processes that prepare examples cannot be started" in ran.stderr
    assert "Too many open files" in ran.stderr


def test_other_errors_are_not_taken_for_those_of_workers() -> None:
    assert workers.explain(RuntimeError("shapes do not match")) is None
    assert workers.explain(OSError(errno.EMFILE, "Too many open files")) is None
    assert workers.explain(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")) is not None


@contextlib.contextmanager
def explained() -> Any:
    """As the Trainer does it."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise ValueError(workers.explain(error)) from error


def main(argv: Sequence[str]) -> None:
    cli.run(lambda _: do(*argv))


def do(what: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    if what == "batches":
        if arguments:
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(arguments[0]),) * 2)
        count()
    elif what == "unsendable":
        with explained():
            batches(2, Unsendable(), 1)
    elif what == "handles":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, most))
        with explained():
            batches(2, Made(), 8)
    elif what == "train":
        train_with(Path(arguments[0]), arguments[1])


def train_with(directory: Path, fault: str) -> None:
    """A run with two workers, and a fault in its third step."""
    run.plan_run = kill_test.unplanned  # type: ignore[assignment]
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(directory / "data", scenes=8, seed=seed, split=split)
    accumulate = GradientAccumulation.accumulate

    def faulty(self: GradientAccumulation, examples: Any, total: float, step: int) -> torch.Tensor:
        loss = accumulate(self, examples, total, step)
        if step == 2 and fault == "killed":
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        elif step == 2 and fault == "not finite":
            next(iter(self.gradients())).fill_(torch.inf)
        elif step == 2 and fault == "a bug":
            raise KeyError(fault)
        return loss

    GradientAccumulation.accumulate = faulty  # type: ignore[method-assign]
    changes = [*kill_test.overrides(directory, directory / "run"), "data.workers=2", "train.max_steps=40"]
    train.main([str(kill_test.ROOT / "configs/quickstart.yaml"), *changes, "train.eval_every=null"])


if __name__ == "__main__":
    main(sys.argv[1:])
