"""The real run, step by step, on a person's own card: PaliGemma learns VQAv2, and what it learned is measured.

    python -m recipes.vqav2                                       configs/vqav2_8gb.yaml
    python -m recipes.vqav2 CONFIG.yaml section.key=value ...     another run, or a changed one

Looks at the card, asks the Hub for the gated checkpoint, fetches questions, annotations and the pictures that the
configuration draws, plans, inspects the first examples, learns eight of them by heart, trains, evaluates base and
adapter, and writes OUTPUT/report.json and report.md. Stopped at any moment, the same command goes on: what is done is
noted in OUTPUT/done.json and not done again. Not here: how a step is done; nearly each is a command of its own, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import evaluate
import train
from finetune import cli
from finetune.config.load import dump_config, load_config
from finetune.config.schema import RunConfig, Source
from finetune.preflight.plan import GIB
from finetune.system.console import PlainConsole, show
from finetune.system.device import pick_device, pick_dtype
from finetune.system.paths import expand
from finetune.training.examples import open_records
from finetune.training.setup import plan_steps
from model import fetch
from recipes.fetch_vqav2 import ANNOTATIONS_URL, PICTURES_URL, SPLITS, fetch_vqav2
from recipes.result import write_result

CONFIG = "configs/vqav2_8gb.yaml"
BY_HEART = 8  # examples


@dataclasses.dataclass(frozen=True)
class Walk:
    """A configuration, and how the person started: what each step is done with."""

    config: RunConfig
    validation: Source
    command: list[str]  # the configuration's file and overrides, as the scripts take them
    given: argparse.Namespace

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.model.device)


def card(walk: Walk) -> None:
    """There is one that can do it, or the person knows what a CPU means."""
    if walk.device.type == "cpu" and not walk.given.on_cpu:
        raise ValueError(
            f"torch {torch.__version__} finds no card here, and on a CPU this run would take weeks: install the torch "
            "build for your card's driver (see pytorch.org), or go on all the same with --on-cpu"
        )
    dtype = pick_dtype(walk.config.model.dtype, walk.device)
    if walk.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(walk.device)
        show(f"{torch.cuda.get_device_name(walk.device)}: {free / GIB:.2f} of {total / GIB:.2f} GiB are free")
    show(f"computing on {walk.device} in {dtype}")


def checkpoint(walk: Walk) -> None:
    """The Hub gives it out: asked before hours of fetching pictures, not after."""
    source = walk.config.model
    fetch(source.path, source.revision, weights=False)
    show(f"{source.path} can be read")


def pictures(walk: Walk) -> None:
    """Questions, annotations and the drawn pictures: fetched, as far as they are not there."""
    sources = (walk.config.data.train, walk.validation)
    if all(is_there(walk, part) for part in ("train", "validation")):
        show("all there")
        return
    seed, names = {"seed": walk.config.train.seed}, {"fraction", "count", "sample_by"}
    drawn, asked = (source.model_dump(include=names) | seed for source in sources)
    fetch_vqav2(destination(walk), walk.given.annotations_url, walk.given.pictures_url, drawn, asked, verify=False)


def is_there(walk: Walk, part: str) -> bool:
    try:
        open_records(walk.config, part)
    except ValueError:
        return False
    return True


def destination(walk: Walk) -> Path:
    """Where the configuration looks for the files as they are published.

    Raises:
        ValueError: it looks for them elsewhere.
    """
    folder = Path(walk.config.data.train.questions or "").parent
    for split, source in zip(SPLITS, (walk.config.data.train, walk.validation), strict=True):
        wanted = {
            "questions": folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": folder / f"v2_mscoco_{split}_annotations.json",
            "images": folder / split,
        }
        for name, path in wanted.items():
            if Path(getattr(source, name) or "") != path:
                raise ValueError(
                    f"the data of the configuration cannot be read, and it is not where VQAv2 would be fetched to: "
                    f"{name} is {getattr(source, name)}, expected {path}"
                )
    return folder


def plan(walk: Walk) -> None:
    """It fits; and on a card, how long it will take."""
    train.main([*walk.command, "--dry-run", *(["--probe"] if walk.device.type == "cuda" else [])])


def inspection(walk: Walk) -> None:
    train.main([*walk.command, "--inspect"])


def trial(walk: Walk) -> None:
    train.main([*walk.command, "--overfit", str(BY_HEART)])


def training(walk: Walk) -> None:
    train.main(walk.command)


def evaluation(walk: Walk) -> None:
    evaluate.main(walk.command)


# Those that look at what is there do so each time, as long as anything is left to do; the others are done once.
LOOKS: dict[str, Callable[[Walk], None]] = {"card": card, "checkpoint": checkpoint, "pictures": pictures}
STEPS: dict[str, Callable[[Walk], None]] = {
    "plan": plan,
    "first examples": inspection,
    "eight examples by heart": trial,
    "training": training,
    "evaluation": evaluation,
}


class Done:
    """Names of the steps that were done with this configuration, in a file."""

    def __init__(self, config: RunConfig) -> None:
        self.file = Path(config.output) / "done.json"
        self.key = hashlib.sha256(dump_config(config).encode()).hexdigest()
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.names: list[str] = kept.get("steps", []) if kept.get("configuration") == self.key else []

    def add(self, name: str) -> None:
        self.names.append(name)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name("done.json.unfinished")
        unfinished.write_text(json.dumps({"configuration": self.key, "steps": self.names}) + "\n", encoding="utf-8")
        os.replace(unfinished, self.file)


def take(walk: Walk) -> None:
    """All steps that are left, in their order, then the result."""
    done = Done(walk.config)
    finished = set(STEPS) <= set(done.names)
    for number, (name, step) in enumerate({**LOOKS, **STEPS}.items(), start=1):
        heading(number, name)
        if finished or name in done.names:
            show("done before")
            continue
        step(walk)
        if name in STEPS:
            done.add(name)
            release()
    heading(len(LOOKS) + len(STEPS) + 1, "result")
    records = open_records(walk.config, "train")
    output = write_result(walk.config, plan_steps(walk.config, len(records)).total)
    show((output / "report.md").read_text(encoding="utf-8"))
    show(f"saved {output}/report.json and report.md: nothing in them says who or where you are")


def heading(number: int, name: str) -> None:
    PlainConsole().rule(f"{number} of {len(LOOKS) + len(STEPS) + 1}: {name}", align="left")


def release() -> None:
    """Let go of a step's network: two of them would not fit on a small card."""
    gc.collect()
    torch.cuda.empty_cache()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.vqav2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", default=CONFIG, help=f"default: {CONFIG}")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over the file; values are YAML")
    parser.add_argument("--on-cpu", action="store_true", help="go on without a card")
    parser.add_argument("--annotations-url", default=ANNOTATIONS_URL, help="default: %(default)s")
    parser.add_argument("--pictures-url", default=PICTURES_URL, help="default: %(default)s")
    given = parser.parse_intermixed_args(argv)
    if "=" in given.config:
        given.config, given.overrides = CONFIG, [given.config, *given.overrides]
    given.config = expand(given.config)
    return given


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    config = load_config(given.config, given.overrides)
    if config.data.validation is None or config.lora is None:
        raise ValueError(f"{given.config} needs data.validation, to evaluate on, and lora, for an adapter to come out")
    take(Walk(config, config.data.validation, [given.config, *given.overrides], given))


if __name__ == "__main__":
    cli.run(main)
