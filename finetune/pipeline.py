"""All stages of a VQAv2 run on one GPU: check, download, plan, train, evaluate, report.

    python -m finetune.pipeline                                       configs/vqav2_8gb.yaml
    python -m finetune.pipeline CONFIG.yaml section.key=value ...     another run, or a changed one

Checks the device and the access to the gated checkpoint, downloads the questions, annotations and images that the
configuration selects, plans the memory, inspects the first examples, overfits eight of them, trains, evaluates base and
adapter, and writes OUTPUT/report.json and report.md. If the command is interrupted, run it again: it resumes, and skips
the completed stages, which are listed in OUTPUT/pipeline.json. Not here: how a stage works. Most stages are a command
of their own, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data.download.vqav2 import ANNOTATIONS_URL, IMAGES_URL, SPLITS, fetch_vqav2
from finetune import cli
from finetune.config.load import dump_config, load_config
from finetune.config.schema import RunConfig
from finetune.evaluation.run import evaluate_run
from finetune.evaluation.table import score_table
from finetune.preflight.dry_run import dry_run
from finetune.preflight.overfit import overfit
from finetune.preflight.plan import GIB
from finetune.report.inspection_page import inspect
from finetune.report.model_card import show_cards
from finetune.report.page import show_page
from finetune.report.result_page import write_report
from finetune.run import learn
from finetune.system import distributed
from finetune.system.atomic import write_text_whole
from finetune.system.console import PlainConsole, show
from finetune.system.device import pick_device, pick_dtype
from finetune.system.lock import locked
from finetune.system.paths import expand
from finetune.training.examples import open_records
from model import fetch

CONFIG = "configs/vqav2_8gb.yaml"
OVERFIT_EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What each stage works with: the configuration of a run, and the command line."""

    config: RunConfig
    words: list[str]  # the configuration's file and overrides, as the scripts take them
    options: argparse.Namespace

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.model.device)


def check_device(pipeline: Pipeline) -> None:
    """ValueError if there is no GPU and no --on-cpu, or if the GPU lacks the configured dtype."""
    device = pipeline.device
    if device.type == "cpu" and not pipeline.options.on_cpu:
        raise ValueError(
            f"torch {torch.__version__} finds no GPU, and on a CPU this run would take weeks: install the torch build "
            "for your GPU's driver (see pytorch.org), or run on the CPU with --on-cpu"
        )
    distributed.init(device)
    if distributed.count() > 1:
        raise ValueError(
            f"the pipeline runs in one process, but the launcher started {distributed.count()}: start it without the "
            "launcher, or launch train.py and evaluate.py"
        )
    dtype = pick_dtype(pipeline.config.model.dtype, device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        show(f"{torch.cuda.get_device_name(device)}: {free / GIB:.2f} of {total / GIB:.2f} GiB are free")
    show(f"computing on {device} in {dtype}")


def check_checkpoint(pipeline: Pipeline) -> None:
    """ValueError if the Hub refuses access to the checkpoint; checked before hours of downloading images."""
    source = pipeline.config.model
    fetch(source.path, source.revision, weights=False)
    show(f"{source.path} can be read")


def download_data(pipeline: Pipeline) -> None:
    """Download the questions, annotations and selected images, unless all of them exist."""
    if all(is_readable(pipeline.config, split) for split in ("train", "validation")):
        show("all files exist")
        return
    seed, names = {"seed": pipeline.config.train.seed}, {"fraction", "count", "sample_by"}
    train, validation = (
        pipeline.config.data.only(split).model_dump(include=names) | seed for split in ("train", "validation")
    )
    directory, options = download_directory(pipeline), pipeline.options
    show(fetch_vqav2(directory, options.annotations_url, options.images_url, train, validation, verify=False))


def is_readable(config: RunConfig, split: str) -> bool:
    try:
        open_records(config, split)
    except ValueError:
        return False
    return True


def download_directory(pipeline: Pipeline) -> Path:
    """The directory in which the configuration expects VQAv2's files.

    Raises:
        ValueError: it expects them under other names than those that are downloaded.
    """
    data = pipeline.config.data
    directory = Path(data.only("train").questions or "").parent
    for split, source in zip(SPLITS, (data.only("train"), data.only("validation")), strict=True):
        downloaded = {
            "questions": directory / f"v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": directory / f"v2_mscoco_{split}_annotations.json",
            "images": directory / split,
        }
        for name, path in downloaded.items():
            if Path(getattr(source, name) or "") != path:
                raise ValueError(
                    "the data of the configuration cannot be read, and its paths are not those to which VQAv2 is "
                    f"downloaded: {name} is {getattr(source, name)}, expected {path}"
                )
    return directory


def plan(pipeline: Pipeline) -> None:
    """ValueError if the run does not fit; on a GPU the time of a step is measured, too."""
    dry_run(pipeline.config, pipeline.device.type == "cuda")


def inspect_examples(pipeline: Pipeline) -> None:
    inspect(pipeline.config)


def overfit_examples(pipeline: Pipeline) -> None:
    overfit(pipeline.config, OVERFIT_EXAMPLES)


def train(pipeline: Pipeline) -> None:
    output = Path(pipeline.config.output)
    with locked(output / "run.lock", output, "training"):
        learn(pipeline.config, pipeline.words)


def evaluate(pipeline: Pipeline) -> None:
    show(score_table(evaluate_run(pipeline.config, pipeline.words)))
    show_page(Path(pipeline.config.output))
    show_cards(Path(pipeline.config.output))


# Checks look at the machine and its disk: they run every time, unless all stages are completed. Stages run once.
CHECKS: dict[str, Callable[[Pipeline], None]] = {
    "device": check_device,
    "checkpoint": check_checkpoint,
    "data": download_data,
}
STAGES: dict[str, Callable[[Pipeline], None]] = {
    "plan": plan,
    "inspect": inspect_examples,
    "overfit": overfit_examples,
    "train": train,
    "evaluate": evaluate,
}


class CompletedStages:
    """Names of the stages that were completed with this configuration, stored in OUTPUT/pipeline.json."""

    def __init__(self, config: RunConfig) -> None:
        self.file = Path(config.output) / "pipeline.json"
        self.configuration = hashlib.sha256(dump_config(config).encode()).hexdigest()
        stored = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        same = stored.get("configuration") == self.configuration
        self.names: list[str] = stored.get("completed", []) if same else []

    def add(self, name: str) -> None:
        self.names.append(name)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        stored = {"configuration": self.configuration, "completed": self.names}
        write_text_whole(self.file, json.dumps(stored) + "\n")


def run_stages(pipeline: Pipeline) -> None:
    """Run the stages that are not completed, in their order, then write the report."""
    completed = CompletedStages(pipeline.config)
    finished = set(STAGES) <= set(completed.names)
    for number, (name, stage) in enumerate({**CHECKS, **STAGES}.items(), start=1):
        show_heading(number, name)
        if finished or name in completed.names:
            show("already completed")
            continue
        stage(pipeline)
        if name in STAGES:
            completed.add(name)
            free_models()
    show_heading(len(CHECKS) + len(STAGES) + 1, "report")
    output = write_report(pipeline.config)
    show((output / "report.md").read_text(encoding="utf-8"))
    show(f"saved {output}/report.json and report.md; they contain no names, no absolute paths and no secrets")


def show_heading(number: int, name: str) -> None:
    PlainConsole().rule(f"{number} of {len(CHECKS) + len(STAGES) + 1}: {name}", align="left")


def free_models() -> None:
    """Free the memory of a stage's model: two models would not fit on a small GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", default=CONFIG, help=f"default: {CONFIG}")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over the file; values are YAML")
    parser.add_argument("--on-cpu", action="store_true", help="run without a GPU")
    parser.add_argument("--annotations-url", default=ANNOTATIONS_URL, help="default: %(default)s")
    parser.add_argument("--images-url", default=IMAGES_URL, help="default: %(default)s")
    options = parser.parse_intermixed_args(argv)
    if "=" in options.config:
        options.config, options.overrides = CONFIG, [options.config, *options.overrides]
    options.config = expand(options.config)
    return options


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    config = load_config(options.config, options.overrides)
    if config.data.validation is None or config.lora is None:
        raise ValueError(f"{options.config} needs data.validation, to evaluate on, and lora, to train an adapter")
    run_stages(Pipeline(config, [options.config, *options.overrides], options))


if __name__ == "__main__":
    cli.run(main)
