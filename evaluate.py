"""VQA accuracy of a run, of a checkpoint, or of a results file.

    python evaluate.py CONFIG.yaml [section.key=value ...]        base, adapter, and merged where it exists
    python evaluate.py --model PATH [--adapter DIR] --questions F --annotations F --images DIR
    python evaluate.py --model PATH [--adapter DIR] --jsonl F [--images DIR]      lines of your own
    python evaluate.py --results F --questions F --annotations F  score answers that exist

The first form reads the configuration of a run, takes its data.validation, and writes OUTPUT/eval/ARM/results.json (the
official format) and metrics.json for each ARM; with --limit it writes nothing. In every form --output DIR says where to
write. Figures of other questions are not overwritten. Lines are as in training, `{"image": ..., "prefix": ...,
"suffix": ...}`; an answer counts when it equals the suffix, or one of several. With `accelerate launch --multi_gpu
evaluate.py ...` the cards share the images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from data import Processor
from data.invalid import NAMED, SkippedRecords
from data.records import decodable, load_records
from finetune import cli, load_adapter
from finetune.adapters.generation_config import max_new_tokens_of
from finetune.adapters.locate import find_adapter, find_base
from finetune.adapters.metadata import training_facts
from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.evaluation.evaluate import METRICS_FILE, Evaluation, evaluate, unfinished_note, write_metrics
from finetune.evaluation.vqa_accuracy import VQAScore, read_results, score
from finetune.lora.nf4 import open_base
from finetune.system import distributed
from finetune.system.atomic import describe
from finetune.system.console import new_table, progress, show
from finetune.system.device import DTYPES, pick_device, pick_dtype
from finetune.system.lock import locked
from finetune.system.paths import argument, path_argument
from finetune.training.examples import askable, open_records, skipped_records
from model import fetch

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_PROMPT = "answer en {question}"  # as PaliGemma was transferred to VQAv2
ARMS = ("base", "adapter", "model", "merged")
MADE_OF = "made_of"  # the key in metrics.json that says which questions, or which answers, were scored
DEFAULTS: dict[str, int | str] = {
    "batch_size": 16,
    "dtype": "bfloat16",
    "quantize": "auto",
    "device": "auto",
}
RUN, CHECKPOINT, ANSWERS = "CONFIG.yaml", "--model (or --adapter)", "--results"
# What each form takes; the rest would mean nothing there.
TAKEN = {
    RUN: "config overrides arm limit output",
    CHECKPOINT: "model revision adapter questions annotations images jsonl prompt limit output batch_size "
    "max_new_tokens dtype quantize device",
    ANSWERS: "results questions annotations limit output",
}


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    scores = {RUN: evaluate_run, CHECKPOINT: evaluate_checkpoint, ANSWERS: score_answers}[form_of(given)](given)
    show(table_of(scores))


def evaluate_run(given: argparse.Namespace) -> dict[str, VQAScore]:
    """The arms of a run: base, adapter and merged checkpoint.

    Raises:
        ValueError: there is nothing to evaluate on, or no adapter; or results of other questions are in the way.
    """
    config = load_config(given.config, given.overrides)
    if config.data.validation is None:
        raise ValueError(f"{given.config} has no data.validation: nothing to evaluate on")
    device = pick_device(config.model.device)
    distributed.init(device)
    arms = arms_of(given, config)
    # A glance is not put in the place of a result.
    directory = given.output or (None if given.limit else Path(config.output, "eval"))
    with locked(directory / "eval.lock", directory, "evaluating") if directory else contextlib.nullcontext():
        return evaluate_arms(given, config, arms, directory, device)


def evaluate_arms(
    given: argparse.Namespace,
    config: RunConfig,
    arms: dict[str, tuple[str | Path, Path | None]],
    directory: Path | None,
    device: torch.device,
) -> dict[str, VQAScore]:
    """One arm after the other; answers and figures of each go into `directory`, if there is one."""
    made_of = questions_of(config, given.limit)
    if directory:
        for arm in arms:
            distributed.on_main(partial(require_same_questions, directory / arm, made_of))
    records = records_of_run(config, given)
    dtype, rows = pick_dtype(config.model.dtype, device), config.evaluation.batch_size
    new_tokens = new_tokens_of_run(config)
    scores = {}
    for arm, (path, adapter) in arms.items():
        checkpoint = fetch(path, config.model.revision if path == config.model.path else None)
        processor = Processor.from_pretrained(checkpoint)
        kept = None if arm == "merged" else config.model.quantize
        result = answer(checkpoint, adapter, processor, records, dtype, device, rows, new_tokens, kept)
        show_unfinished(arm, result, "evaluation.max_new_tokens")
        if directory:
            facts = {"model": str(path), "adapter": str(adapter) if adapter else None, MADE_OF: made_of}
            distributed.on_main(partial(result.save, directory / arm, **facts))
        scores[arm] = result.score
    return scores


def arms_of(given: argparse.Namespace, config: RunConfig) -> dict[str, tuple[str | Path, Path | None]]:
    """What there is to evaluate, or what was asked for of it: checkpoint and adapter, by arm."""
    output = Path(config.output)
    trained = output / ("adapter" if config.lora else "model")
    arms: dict[str, tuple[str | Path, Path | None]] = {}
    if config.model.weights == "pretrained":
        arms["base"] = (config.model.path, None)
    if trained.exists():
        arms[trained.name] = (config.model.path, trained) if config.lora else (trained, None)
    if (output / "merged").exists():
        arms["merged"] = (output / "merged", None)
    if given.arm:
        if missing := [arm for arm in given.arm if arm not in arms]:
            raise ValueError(f"--arm {' '.join(missing)}: {output} has {', '.join(arms) or 'none yet'}; train it first")
        return {arm: arms[arm] for arm in given.arm}
    if not trained.exists():
        command = cli.command("train.py", given.config, *given.overrides)
        raise ValueError(
            f"{trained} does not exist: the run has no result yet. Train it to its end ({command}), or evaluate "
            "something else with --arm base"
        )
    return arms


def records_of_run(config: RunConfig, given: argparse.Namespace) -> Dataset:
    """The validation records that can be asked, by image and prompt; those that are skipped are listed, or shown."""
    skipped = skipped_records(config, "validation", listed=given.limit is None and given.output is None)
    if skipped.file:
        distributed.on_main(partial(skipped.file.unlink, missing_ok=True))  # of another time
    records = decodable(first(open_records(config, "validation", skipped), given.limit), skipped)
    base = fetch(config.model.path, config.model.revision, weights=False)
    records = askable(records, Processor.from_pretrained(base), skipped)
    if skipped.reasons:
        show(f"{len(skipped.reasons):,} questions cannot be asked and are skipped")
        some = [f"  {name}: {reason}" for name, reason in list(skipped.reasons.items())[:NAMED]]
        show(*([f"  see {skipped.file}"] if skipped.file else some))
    return records


def new_tokens_of_run(config: RunConfig) -> int:
    """The most tokens of an answer, for all arms: as configured, or what the run stored with its result."""
    configured, output = config.evaluation.max_new_tokens, Path(config.output)
    adapter = output / "adapter" if config.lora and (output / "adapter").exists() else None
    given = None if configured == "auto" else configured
    new_tokens, guessed = max_new_tokens_of(output / "model", adapter, given, "evaluation.max_new_tokens")
    if guessed:
        show(guessed)
    return new_tokens


def show_unfinished(name: str, result: Evaluation, where: str) -> None:
    if note := unfinished_note(result.unfinished, len(result.answers), result.max_new_tokens, where):
        show(f"{name}: {note}")


def prompt_of(adapter: Path | None, given: str | None) -> str:
    """The prompt of the questions: as given, or as the adapter was trained; said where the two differ."""
    trained = training_facts(adapter).prompt if adapter else None
    if given is None:
        return trained or DEFAULT_PROMPT
    if trained not in (None, given):
        show(f"the adapter was trained with the prompt {trained!r}; --prompt asks {given!r}")
    return given


def evaluate_checkpoint(given: argparse.Namespace) -> dict[str, VQAScore]:
    """One checkpoint, with or without an adapter, on files named on the command line."""
    files = files_of(given)
    adapter = find_adapter(given.adapter) if given.adapter else None
    model, revision = given.model, given.revision
    if model is None:
        assert adapter is not None, "the form has a model or an adapter"
        model, revision = find_base(adapter)
    prompt = None if given.jsonl else prompt_of(adapter, given.prompt)
    named = {"model": model, "adapter": str(adapter) if adapter else None, "prompt": prompt}
    asked = contents(questions=given.questions, annotations=given.annotations, jsonl=given.jsonl)
    made_of = named | asked | {"limit": given.limit}
    device = pick_device(given.device)
    distributed.init(device)
    if given.output:
        distributed.on_main(partial(require_same_questions, given.output, made_of))
    records = decodable(first(load_records(**files, prompt=prompt or DEFAULT_PROMPT), given.limit))
    dtype = pick_dtype(given.dtype, device)
    directory = fetch(model, revision)
    new_tokens, guessed = max_new_tokens_of(directory, adapter, given.max_new_tokens, "--max-new-tokens")
    if guessed:
        show(guessed)
    kept = cli.quantization(given.quantize, adapter)
    processor = Processor.from_pretrained(directory)
    records, rows = askable(records, processor, SkippedRecords()), given.batch_size
    result = answer(directory, adapter, processor, records, dtype, device, rows, new_tokens, kept)
    show_unfinished(str(adapter or model), result, "--max-new-tokens")
    if given.output:
        distributed.on_main(partial(result.save, given.output, **named, **{MADE_OF: made_of}))
    show(f"model: {model}", *([f"adapter: {adapter}"] if adapter else []))  # a path would not fit into the table
    return {"adapter" if adapter else "model": result.score}


def files_of(given: argparse.Namespace) -> dict[str, Any]:
    """The files to evaluate a checkpoint on, as `load_records` takes them: official ones, or lines.

    Raises:
        ValueError: some are missing, or options were given that mean nothing for lines.
    """
    if given.jsonl is None:
        require(given, "questions", "annotations", "images", instead=", or --jsonl")
    elif unused := [f"--{name}" for name in ("questions", "annotations", "prompt") if getattr(given, name) is not None]:
        raise ValueError(f"--jsonl takes no {', '.join(unused)}: its lines say what is asked and what is right")
    found = {name: getattr(given, name) for name in ("questions", "annotations", "images", "jsonl")}
    return {name: file for name, file in found.items() if file is not None}


def score_answers(given: argparse.Namespace) -> dict[str, VQAScore]:
    """Answers that exist, those to the first questions alone where there is a limit."""
    require(given, "questions", "annotations")
    made_of = (
        contents(results=given.results)
        | contents(questions=given.questions, annotations=given.annotations)
        | {"limit": given.limit}
    )
    if given.output:
        require_same_questions(given.output, made_of)
    records = load_records(questions=given.questions, annotations=given.annotations)
    answers = read_results(given.results)
    if given.limit is not None:
        beyond = set(records["id"][given.limit :])
        answers = {name: text for name, text in answers.items() if name not in beyond}
    scored = score(answers, first(records, given.limit))
    if given.output:
        write_metrics(given.output, scored, results=given.results, **{MADE_OF: made_of})
    show(f"results: {given.results}")
    return {"results": scored}


def questions_of(config: RunConfig, limit: int | None) -> dict[str, Any]:
    """What decides which questions a run is evaluated on, and how they are put."""
    source = config.data.validation
    assert source is not None, "the configuration has data.validation"
    made_of = contents(questions=source.questions, annotations=source.annotations, jsonl=source.jsonl)
    if source.fraction is not None or source.count is not None:
        made_of |= source.model_dump(include={"fraction", "count", "sample_by"}) | {"seed": config.train.seed}
    return made_of | {"prompt": config.data.prompt if source.questions else None, "limit": limit}


def contents(**files: str | None) -> dict[str, Any]:
    """Size and sha256 of the files that exist; whoever reads them says which do not."""
    return {name: describe(Path(file)) for name, file in files.items() if file and Path(file).is_file()}


def require_same_questions(directory: Path, made_of: Mapping[str, Any]) -> None:
    """ValueError where a directory holds the figures of something else than what is to be evaluated now."""
    try:
        before = json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))[MADE_OF]
    except (OSError, ValueError, KeyError, TypeError):  # none, or of before this was recorded
        return
    if changed := [name for name in {**before, **made_of} if before.get(name) != made_of.get(name)]:
        raise ValueError(
            f"{directory} holds figures of something else ({', '.join(changed)} differ): write to another directory "
            "with --output, or delete it"
        )


def answer(
    directory: Path,
    adapter: Path | None,
    processor: Processor,
    records: Dataset,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    max_new_tokens: int,
    quantize: str | None,
) -> Evaluation:
    """Open a network, let it answer, and let go of it: two of them would not fit on a small card."""
    model = open_base(directory, dtype, device, quantize)
    if adapter:
        load_adapter(model, adapter)
    return evaluate(model, processor, records, max_new_tokens, batch_size=batch_size, progress=progress)


def first(records: Dataset, limit: int | None) -> Dataset:
    return records if limit is None else records.select(range(min(limit, len(records))))


def table_of(scores: dict[str, VQAScore]) -> Table:
    types = sorted({name for scored in scores.values() for name in scored.by_answer_type})
    table = new_table("", "overall", "95%", *types, "questions", title="VQA accuracy, percent")
    for name, scored in scores.items():
        low, high = scored.interval
        by_type = (f"{scored.by_answer_type[kind]:.2f}" if kind in scored.by_answer_type else "" for kind in types)
        table.add_row(name, f"{scored.overall:.2f}", f"{low:.2f} to {high:.2f}", *by_type, f"{scored.questions:,}")
    return table


def form_of(given: argparse.Namespace) -> str:
    """Which of the three forms the arguments are; see the top."""
    if given.config:
        return RUN
    if given.results:
        return ANSWERS
    if given.model or given.adapter:
        return CHECKPOINT
    raise ValueError(
        "expected a CONFIG.yaml; or --model (or --adapter), with --questions, --annotations and --images, or with "
        "--jsonl; or --results, --questions and --annotations"
    )


def require(given: argparse.Namespace, *names: str, instead: str = "") -> None:
    if missing := [f"--{name}" for name in names if getattr(given, name) is None]:
        raise ValueError(f"{form_of(given)} needs {' and '.join(missing)}{instead}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, None where one was neither given nor has a default.

    Raises:
        ValueError: an option was given that means nothing in this form; names it.
    """
    parser = build_parser()
    every = {action.dest for action in parser._actions} - {"help"}
    words = vars(parser.parse_intermixed_args(argv))
    given = argparse.Namespace(**(dict.fromkeys(every) | {"overrides": []} | DEFAULTS | words))
    form = form_of(given)
    if ignored := [name for name in words if name not in TAKEN[form].split()]:
        named = (
            "overrides" if ignored == ["overrides"] else ", ".join("--" + name.replace("_", "-") for name in ignored)
        )
        instead = ""
        if form == RUN:
            instead = "; override its keys instead, such as evaluation.batch_size=4 or model.device=cpu"
            if "adapter" in ignored:
                instead += (
                    ". Another adapter is evaluated on the questions of this configuration with output=DIR --arm "
                    "adapter, where it is DIR/adapter; on others with --adapter DIR --jsonl F, or with --adapter DIR, "
                    "--questions, --annotations and --images"
                )
        raise ValueError(f"the form with {form} takes no {named}{instead}")
    return given


def build_parser() -> argparse.ArgumentParser:
    """Without defaults, so that what was given is known."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )

    def option(name: str, help: str, **settings: Any) -> None:
        default = DEFAULTS.get(name.strip("-").replace("-", "_"))
        parser.add_argument(name, help=help + (f" (default: {default})" if default else ""), **settings)

    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", type=argument, help="the configuration of a run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over it; values are YAML")
    option("--arm", "evaluate this one of a run alone; may be given again for others", choices=ARMS, action="append")
    option("--model", "checkpoint: a directory or a Hub id; by default the base that the adapter names", type=argument)
    option("--revision", "branch, tag or commit of a Hub id")
    option("--adapter", "directory of an adapter on that checkpoint, or of a run", type=path_argument)
    option("--results", "an official results file to score", type=argument)
    option("--questions", "official questions file", type=argument)
    option("--annotations", "official annotations file", type=argument)
    option("--images", "directory of the images (of lines, by default theirs)", type=argument)
    option("--jsonl", "or a file of lines, one JSON object each, with image, prefix and suffix", type=argument)
    option("--prompt", f"{{question}} is where it goes (default: as the adapter was trained, or {DEFAULT_PROMPT!r})")
    option("--limit", "take the first N questions only", type=cli.positive, metavar="N")
    option("--output", "directory for metrics.json and, where there are new answers, results.json", type=path_argument)
    option("--batch-size", "questions at once on the device", type=cli.positive)
    option("--max-new-tokens", cli.NEW_TOKENS_HELP, type=cli.positive)
    option("--dtype", "of base weights and arithmetic", choices=list(DTYPES))
    option("--quantize", cli.QUANTIZE_HELP, choices=["auto", "nf4", "none"])
    option("--device", "auto, cpu, cuda, cuda:N or mps")
    return parser


if __name__ == "__main__":
    cli.run(main)
