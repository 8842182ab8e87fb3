"""Processes of tests that have imported torch, transformers and the toolkit already, which takes longer than most runs.

They are forked, by multiprocessing's fork server, from a process that has imported MODULES and done nothing else: it
has no threads and has computed nothing, so what is forked is as a process that began with the same imports. Tests about
the command line itself start Python instead.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.undrawn import undrawn_charts

ROOT = Path(__file__).parents[1]
MODULES = ["tests.sharded_processes", "tests.fully_sharded", "tests.kill_test", "tests.system.test_workers"]
PATIENCE = 600.0  # seconds, for what takes 30

Script = Callable[[Sequence[str]], None]


def run(
    script: Script, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Call a script in a process of its own, at the root of the repository, without charts in reports.

    script: a function at the top of a module; what it raises ends the process as it would end Python.
    environment: of the process; that of this one by default.

    Raises:
        subprocess.TimeoutExpired: it hangs, and was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with tempfile.TemporaryDirectory() as directory:
        said = Path(directory)
        told = dict(os.environ if environment is None else environment)
        process = context.Process(target=call, args=(script, arguments, told, said))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(script.__module__, PATIENCE)
        output, errors = ((said / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([script.__module__, *arguments], process.exitcode, output, errors)


def call(script: Script, arguments: Sequence[str], environment: Mapping[str, str], said: Path) -> None:
    """What the process does."""
    gc.freeze()  # a collection need not go through all that was imported
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(said / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # of processes that it starts: Python's default, not a server
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [script.__module__, *arguments]
    with undrawn_charts():
        script(arguments)
