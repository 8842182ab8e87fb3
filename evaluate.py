"""VQA accuracy of a run, of a checkpoint, or of a results file.

    python evaluate.py configs/vqav2_8gb.yaml                     base, adapter and merged, as far as they are there
    python evaluate.py --model PATH [--adapter DIR] --questions F --annotations F --images DIR
    python evaluate.py --results F --questions F --annotations F  score answers that exist

The first form reads the configuration of a run, takes its data.validation, and writes OUTPUT/eval/ARM/results.json (the
official format) and metrics.json for each ARM; with --limit it writes nothing. With `accelerate launch --multi_gpu
evaluate.py ...` the cards share the pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data import Processor
from data.records import decodable, load_records
from finetune import cli, load_adapter, processes
from finetune.cli import show
from finetune.config import EvaluationConfig, load_config
from finetune.console import new_table
from finetune.device import DTYPES, pick_device, pick_dtype
from finetune.evaluate import Evaluation, evaluate
from finetune.quantize import open_base
from finetune.vqa_accuracy import VQAScore, read_results, score
from model import fetch

TAKEN = ("config", "overrides", "limit")  # beside a configuration


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    if arguments.config:
        scores = evaluate_run(arguments)
    elif arguments.results:
        scores = {arguments.results: score(read_results(arguments.results), open_records(arguments))}
    else:
        scores = {arguments.adapter or arguments.model: evaluate_checkpoint(arguments)}
    show(table_of(scores))


def evaluate_run(arguments: argparse.Namespace) -> dict[str, VQAScore]:
    """Every arm of a run: base, adapter and merged checkpoint."""
    config = load_config(arguments.config, arguments.overrides)
    if config.data.validation is None:
        raise ValueError(f"{arguments.config} has no data.validation: nothing to evaluate on")
    device, output = pick_device(config.model.device), Path(config.output)
    processes.join(device)
    left_out = cli.leave_out(config, "validation")
    if left_out.file:
        processes.once(partial(left_out.file.unlink, missing_ok=True))  # of another time
    records = decodable(first(cli.open_records(config, "validation", left_out), arguments.limit), left_out)
    if left_out.reasons:
        show(f"{len(left_out.reasons):,} questions cannot be asked and are left out: see {left_out.file}")
    dtype, settings = pick_dtype(config.model.dtype, device), config.evaluation
    trained = output / ("adapter" if config.lora else "model")
    arms: dict[str, tuple[str | Path, Path | None]] = {"base": (config.model.path, None)}
    if trained.exists():
        arms[trained.name] = (config.model.path, trained) if config.lora else (trained, None)
    else:
        show(f"{trained} is not there: nothing trained is evaluated")
    if (output / "merged").exists():
        arms["merged"] = (output / "merged", None)
    if config.model.weights == "random":
        del arms["base"]
    scores = {}
    for arm, (path, adapter) in arms.items():
        directory = fetch(path, config.model.revision if path == config.model.path else None)
        processor = Processor.from_pretrained(directory, config.data.max_text_tokens)
        kept = None if arm == "merged" else config.model.quantize
        result = answer(directory, adapter, processor, records, dtype, device, settings, kept)
        facts = {"model": str(path), "adapter": str(adapter) if adapter else None}
        if arguments.limit is None:  # a glance is not put in the place of a result
            processes.once(partial(result.save, output / "eval" / arm, **facts))
        scores[arm] = result.score
    return scores


def evaluate_checkpoint(arguments: argparse.Namespace) -> VQAScore:
    """One checkpoint, with or without an adapter, on files named on the command line."""
    records = open_records(arguments)
    device = pick_device(arguments.device)
    processes.join(device)
    dtype = pick_dtype(arguments.dtype, device)
    directory = fetch(arguments.model, arguments.revision)
    settings = EvaluationConfig(batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens)
    kept = cli.quantization(arguments.quantize, arguments.adapter)
    processor = Processor.from_pretrained(directory)
    result = answer(directory, arguments.adapter, processor, records, dtype, device, settings, kept)
    if arguments.output:
        facts = {"model": arguments.model, "adapter": arguments.adapter, "prompt": arguments.prompt}
        processes.once(partial(result.save, arguments.output, **facts))
    return result.score


def answer(
    directory: Path,
    adapter: Path | None,
    processor: Processor,
    records: Any,
    dtype: torch.dtype,
    device: torch.device,
    settings: EvaluationConfig,
    quantize: str | None,
) -> Evaluation:
    """Open a network, let it answer, and let go of it: two of them would not fit on a small card."""
    model = open_base(directory, dtype, device, quantize)
    if adapter:
        load_adapter(model, adapter)
    return evaluate(model, processor, records, **settings.model_dump(exclude={"count"}), progress=cli.progress)


def open_records(arguments: argparse.Namespace) -> Any:
    if not (arguments.questions and arguments.annotations and (arguments.images or arguments.results)):
        raise ValueError(
            "expected a CONFIG.yaml; or --model, --questions, --annotations and --images; or --results, "
            "--questions and --annotations"
        )
    files = {name: getattr(arguments, name) for name in ("questions", "annotations", "images")}
    records = first(load_records(**files, prompt=arguments.prompt), arguments.limit)
    return decodable(records) if arguments.images else records


def first(records: Any, limit: int | None) -> Any:
    return records if limit is None else records.select(range(min(limit, len(records))))


def table_of(scores: dict[str, VQAScore]) -> Table:
    types = sorted({name for scored in scores.values() for name in scored.by_answer_type})
    table = new_table("", "overall", "95%", *types, "questions", title="VQA accuracy, percent")
    for name, scored in scores.items():
        low, high = scored.interval
        by_type = (f"{scored.by_answer_type[kind]:.2f}" if kind in scored.by_answer_type else "" for kind in types)
        table.add_row(name, f"{scored.overall:.2f}", f"{low:.2f} to {high:.2f}", *by_type, f"{scored.questions:,}")
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="a run, with section.key=value overrides")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--model", help="checkpoint: a directory or a Hub id")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--adapter", help="directory of an adapter on that checkpoint")
    parser.add_argument("--results", help="an official results file to score")
    parser.add_argument("--questions", help="official questions file")
    parser.add_argument("--annotations", help="official annotations file")
    parser.add_argument("--images", help="directory of the pictures")
    parser.add_argument("--prompt", default="answer en {question}")
    parser.add_argument("--limit", type=int, help="take the first N questions only")
    parser.add_argument("--output", type=Path, help="directory for results.json and metrics.json")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--quantize", choices=["auto", "nf4", "none"], default="auto", help=cli.QUANTIZE_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    given = parser.parse_intermixed_args(argv)
    ignored = [name for name in vars(given) if name not in TAKEN and getattr(given, name) != parser.get_default(name)]
    if given.config and ignored:
        options = ", ".join("--" + name.replace("_", "-") for name in ignored)
        raise ValueError(
            f"{given.config} is evaluated as it says, without {options}: override its keys instead, such as "
            "evaluation.batch_size=4 or model.device=cpu, or leave it out and give --model, --questions, --annotations "
            "and --images"
        )
    return given


if __name__ == "__main__":
    cli.run(main)
