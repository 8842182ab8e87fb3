"""Runs of processes that share sharded layers, with a fault in one or without, for tests/training/test_sharded.py.

    python -m tests.sharded_processes DIRECTORY GROUP

As tests/several_processes.py does it: forked, in fp64, with what a process said in `NAME.RANK.txt` and exit codes in
`codes.json`. A process says how many bytes of the decoder's layers it holds before and after sharding, and all answers.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import train
from data.synthetic import scenes
from finetune import run as training_run
from finetune.evaluation import in_training
from finetune.preflight.plan import Plan
from finetune.system import distributed
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma
from tests import kill_test
from tests.fully_sharded import held
from tests.several_processes import NETWORK, Fault, at, compute_in_fp64, little_memory, not_finite, run_processes

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # of `accelerate launch` with configs/accelerate/fsdp.yaml
CHANGES = ["train.max_steps=4", "train.batch_size=7", "train.learning_rate=3e-3", "train.eval_every=2"]
CHANGES += ["train.max_grad_norm=0.5", "train.keep_checkpoints=9"]  # below every step's norm
EVERYWHERE = "lora={rank: 3, dropout: 0.1, targets: [language.*, vision.fc2], "
EVERYWHERE += "modules_to_save: [language.norm, connector.linear]}"
# The first layers have no adapter: a row of text alone has nothing below the last one to go back to.
TOP = "lora={rank: 3, targets: [language.layers.2.mlp.down_proj, vision.fc2], modules_to_save: [connector.linear]}"
LANGUAGE = "lora={rank: 4, targets: [language.down_proj, language.q_proj]}"


def main(argv: Sequence[str]) -> None:
    directory, group = Path(argv[0]), argv[1]
    torch.set_num_threads(1)  # no threads in this process: it forks
    compute_in_fp64()
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(directory / "data", scenes=8, seed=seed, split=split)
    runs = Runs(directory)
    GROUPS[group](runs)
    (directory / "codes.json").write_text(json.dumps(runs.codes), encoding="utf-8")


class Runs:
    """Runs in a directory, and the exit codes of their processes by name."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.codes = directory, dict[str, list[int]]()

    def run(
        self, name: str, *more: str, sharded: bool = True, fault: Fault = lambda: None, output: str = "", **plan: Any
    ) -> None:
        """Train in two processes with sharded layers, or in one; `plan`: of the execution plan."""
        execution_plan = ExecutionPlan(**{"micro_batch": 3, **plan})
        # Planning takes longer than a run.
        planned = dataclasses.replace(kill_test.unplanned(), plan=Plan(execution_plan, {}, 0))
        training_run.plan_run = lambda *_: planned
        arguments = [str(kill_test.ROOT / "configs/quickstart.yaml")]
        arguments += [*kill_test.overrides(self.directory, self.directory / (output or name)), *CHANGES, *more]

        def begin() -> None:
            fault()
            say_what_is_held()
            say_answers()

        with mock.patch.dict(os.environ, FSDP if sharded else {}):
            count = 2 if sharded else 1
            self.codes[name] = run_processes(self.directory / name, count, train.main, arguments, begin)


def learn(runs: Runs) -> None:
    runs.run("one", EVERYWHERE, sharded=False)
    runs.run("sharded", EVERYWHERE, recompute_layers=2)
    runs.run("one, offloaded", LANGUAGE, sharded=False)
    runs.run("offloaded", LANGUAGE, offload_vision=True, recompute_layers=1)
    texts = [TOP, text_rows(runs.directory), "train.max_steps=2"]
    runs.run("one, texts", *texts, sharded=False)
    runs.run("texts", *texts)


def text_rows(directory: Path) -> str:
    """Scenes and rows of text alone, in turns: of a step one process has all images, and the other all texts."""
    lines = [json.dumps({"prefix": f"answer en {i} and {i}", "suffix": f"{2 * i}"}) for i in range(9)]
    (directory / "texts.jsonl").write_text("\n".join(lines))
    texts = {"jsonl": str(directory / "texts.jsonl"), "text_rows": True}
    scenes = {
        split: {key: str(directory / f"data/v2_{name}.json") for key, name in names_of(split).items()}
        | {"images": str(directory / "data/images"), "name": "scenes"}
        for split in ("train2014", "val2014")
    }
    train = [scenes["train2014"] | {"weight": 1}, texts | {"weight": 1}]
    return f"data={json.dumps({'train': train, 'validation': [scenes['val2014'], texts], 'workers': 0})}"


def names_of(split: str) -> dict[str, str]:
    return {"questions": f"OpenEnded_mscoco_{split}_questions", "annotations": f"mscoco_{split}_annotations"}


def resume(runs: Runs) -> None:
    runs.run("sharded", EVERYWHERE)
    runs.run("told", EVERYWHERE, "train.save_every=100", fault=at(1, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    runs.run("told, resumed", EVERYWHERE, "train.save_every=100", output="told")
    runs.run("one", EVERYWHERE, "train.max_steps=2", "train.schedule=constant", sharded=False)
    runs.run("one, resumed", EVERYWHERE, "train.schedule=constant", "--accept-changes", output="one")
    runs.run("one to the end", EVERYWHERE, "train.schedule=constant", sharded=False)


def connector(runs: Runs) -> None:
    """In its stage nothing of the sharded layers is trained."""
    runs.run("one", *NETWORK, "train.max_grad_norm=9", sharded=False)
    runs.run("sharded", *NETWORK, "train.max_grad_norm=9", recompute_layers=1)
    shutil.copytree(runs.directory / "one/stages", runs.directory / "after/stages")
    runs.run("after", *NETWORK, "train.max_grad_norm=9")


def little_memory_to_train(runs: Runs) -> None:
    short = [EVERYWHERE, "train.max_steps=2", "train.eval_every=null"]  # repeated in smaller micro-batches, and gone on
    runs.run("one", *short, sharded=False)
    little = [*short, "train.micro_batch=auto"]
    runs.run("little memory", *little, fault=little_memory)
    runs.run("little memory in the layers", *little, fault=little_memory_in_the_layers)


def faults(runs: Runs) -> None:
    runs.run("not finite", EVERYWHERE, fault=not_finite)
    runs.run("killed", EVERYWHERE, fault=at(2, 1, lambda _: os.kill(os.getpid(), signal.SIGKILL)))


def evaluations(runs: Runs) -> None:
    """Answers of different lengths, in an uneven share of the images."""
    more = [LANGUAGE, "train.learning_rate=1e-2", "evaluation={count: 9, batch_size: 2, max_new_tokens: 12}"]
    runs.run("one", *more, sharded=False)
    runs.run("sharded", *more)
    runs.run("little memory", *more, fault=little_memory_to_answer)


def in_full(runs: Runs) -> None:
    changes = ["lora=null", "train.max_steps=2", "train.eval_every=null"]
    runs.run("one", *changes, sharded=False)
    runs.run("sharded", *changes)


GROUPS: dict[str, Callable[[Runs], None]] = {
    "learn": learn,
    "resume": resume,
    "connector": connector,
    "little memory": little_memory_to_train,
    "faults": faults,
    "evaluate": evaluations,
    "in full": in_full,
}


def say_what_is_held() -> None:
    shard = training_run.shard_decoder

    def told(model: PaliGemma, config: Any) -> None:
        layers = model.language_model.model.layers
        before, weights = held(layers), [weakref.ref(parameter) for parameter in layers.parameters()]
        shard(model, config)
        gc.collect()
        whole = sum(weight() is not None for weight in weights)
        print("held:", json.dumps({"before": before, "after": held(layers), "whole": whole}), flush=True)

    training_run.shard_decoder = told


def say_answers() -> None:
    evaluate = in_training.evaluate

    def told(*given: Any, **named: Any) -> Any:
        evaluated = evaluate(*given, **named)
        print("answers:", json.dumps(evaluated.answers), flush=True)
        return evaluated

    in_training.evaluate = told


def little_memory_in_the_layers() -> None:
    """The second process runs out of memory for two rows in the middle of a backward pass, the first one never."""
    shard = training_run.shard_decoder

    def small(module: Any, grad_input: Any, grad_output: Any) -> None:
        if distributed.rank() == 1 and len(grad_output[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def watched(model: PaliGemma, config: Any) -> None:
        shard(model, config)
        model.get_submodule("language_model.model.layers.1.mlp").register_full_backward_hook(small)

    training_run.shard_decoder = watched


def little_memory_to_answer() -> None:
    """The second process has too little memory for two questions at once, in the last layer."""
    shard = training_run.shard_decoder

    def small(module: Any, inputs: Any) -> None:
        if distributed.rank() == 1 and not module.training and len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def watched(model: PaliGemma, config: Any) -> None:
        shard(model, config)
        model.get_submodule("language_model.model.layers.2.mlp").register_forward_pre_hook(small)

    training_run.shard_decoder = watched


if __name__ == "__main__":
    main(sys.argv[1:])
