"""How well a run, a checkpoint, or a results file answers, by the metric of its task.

    python evaluate.py CONFIG.yaml [section.key=value ...]        base, adapter, and the merged checkpoint if it exists
    python evaluate.py --model PATH [--adapter DIR] --questions F --annotations F --images DIR
    python evaluate.py --model PATH [--adapter DIR] --jsonl F [--images DIR]      your own JSON lines
    python evaluate.py --model PATH [--adapter DIR] --source KEY=VALUE ...        any other source of examples
    python evaluate.py --results F --questions F --annotations F  score existing answers

The first form reads the configuration of a run, takes its data.validation, and writes OUTPUT/eval/ARM/results.json (the
official format) and metrics.json for each ARM; with --limit it writes nothing. In every form --output DIR says where to
write. Figures of other questions are not overwritten. JSON lines are as in training, `{"image": ..., "prefix": ...,
"suffix": ...}`; an answer counts if it equals the suffix, or one of several, unless --task says otherwise. --source
takes the keys that data.validation has in a configuration: `--source csv=mine.csv columns.question=query`, `--source
hub=owner/name split=test`. With --candidates FILE, which has one answer a line, such as yes and no, each answer is the
most likely one of these. With `accelerate launch --multi_gpu evaluate.py ...` the GPUs share the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finetune import cli
from finetune.system.paths import argument, path_argument

DEFAULT_PROMPT = "answer en {question}"  # as PaliGemma was transferred to VQAv2
ARMS = ("base", "adapter", "model", "merged")
DEFAULTS: dict[str, int | str] = {
    "batch_size": 16,
    "dtype": "bfloat16",
    "quantize": "auto",
    "device": "auto",
    "task": "auto",
}
TASKS = ("auto", "vqa", "answer", "classify", "document", "chart", "detect", "caption")
RUN, CHECKPOINT, RESULTS = "CONFIG.yaml", "--model (or --adapter)", "--results"
# The arguments that each form accepts.
ACCEPTED = {
    RUN: "config overrides arm limit output candidates",
    CHECKPOINT: "model revision adapter questions annotations images jsonl source task prompt limit output batch_size "
    "max_new_tokens dtype quantize device candidates",
    RESULTS: "results questions annotations limit output",
}


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    form = form_of(given)

    # Only now: --help does without torch, whose import takes seconds.
    from finetune.config.load import load_config
    from finetune.evaluation.checkpoint import CheckpointOptions, evaluate_checkpoint
    from finetune.evaluation.results_file import score_results
    from finetune.evaluation.run import evaluate_run
    from finetune.evaluation.table import score_table
    from finetune.report.model_card import show_cards
    from finetune.report.page import show_page
    from finetune.system import distributed
    from finetune.system.console import show

    accepted = {name: getattr(given, name) for name in ACCEPTED[form].split()}
    if form == RUN:
        config, words = load_config(given.config, given.overrides), [given.config, *given.overrides]
        scores = evaluate_run(config, words, given.arm or (), given.limit, given.output, given.candidates)
        if given.limit is None and given.output is None:
            distributed.on_main(partial(show_page, Path(config.output)))
            distributed.on_main(partial(show_cards, Path(config.output)))
    elif form == CHECKPOINT:
        scores = evaluate_checkpoint(CheckpointOptions(**accepted), DEFAULT_PROMPT)
    else:
        scores = {"results": score_results(**accepted)}
    show(score_table(scores))


def form_of(given: argparse.Namespace) -> str:
    """Which of the forms the arguments have; see the top."""
    if given.config:
        return RUN
    if given.results:
        return RESULTS
    if given.model or given.adapter:
        return CHECKPOINT
    raise ValueError(
        "expected a CONFIG.yaml; or --model (or --adapter), with --questions, --annotations and --images, with "
        "--jsonl, or with --source; or --results, --questions and --annotations"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; None for an argument that was not given and has no default.

    Raises:
        ValueError: an argument is missing, or was given that this form does not accept; names it.
    """
    parser = build_parser()
    every = {action.dest for action in parser._actions} - {"help"}
    words = vars(parser.parse_intermixed_args(argv))
    given = argparse.Namespace(**(dict.fromkeys(every) | {"overrides": []} | DEFAULTS | words))
    form = form_of(given)
    if unknown := [name for name in words if name not in ACCEPTED[form].split()]:
        raise ValueError(f"the form with {form} takes no {refused(unknown)}{alternative(form, unknown)}")
    if given.candidates is not None and "max_new_tokens" in words:
        raise ValueError("--candidates takes no --max-new-tokens: answers are chosen among those of the file")
    if form == RESULTS:
        require(given, "questions", "annotations")
    elif form == CHECKPOINT and given.source is not None:
        if others := [name for name in ("questions", "annotations", "images", "jsonl") if name in words]:
            raise ValueError(
                f"--source takes no {refused(others)}: give it their keys, such as --source csv=mine.csv images=DIR"
            )
    elif form == CHECKPOINT and given.jsonl is None:
        require(given, "questions", "annotations", "images", instead=", or --jsonl, or --source")
    elif form == CHECKPOINT:
        unused = [f"--{name}" for name in ("questions", "annotations", "prompt") if getattr(given, name) is not None]
        if unused:
            raise ValueError(f"--jsonl takes no {', '.join(unused)}: its lines say what is asked and what is right")
    return given


def refused(names: Sequence[str]) -> str:
    """Arguments as they are on the command line."""
    return "overrides" if names == ["overrides"] else ", ".join("--" + name.replace("_", "-") for name in names)


def alternative(form: str, names: Sequence[str]) -> str:
    """What to do instead of giving the arguments `names` in a form that does not accept them."""
    if form != RUN:
        return ""
    advice = "; override its keys instead, such as evaluation.batch_size=4 or model.device=cpu"
    if "adapter" in names:
        advice += (
            ". Another adapter is evaluated on the questions of this configuration with output=DIR --arm adapter, if "
            "it is DIR/adapter; on others with --adapter DIR --jsonl F, or with --adapter DIR, --questions, "
            "--annotations and --images"
        )
    return advice


def require(given: argparse.Namespace, *names: str, instead: str = "") -> None:
    if missing := [f"--{name}" for name in names if getattr(given, name) is None]:
        raise ValueError(f"{form_of(given)} needs {' and '.join(missing)}{instead}")


def build_parser() -> argparse.ArgumentParser:
    """Without defaults, so that what was given is known."""
    parser = cli.script_parser("evaluate.py", __doc__)
    parser.argument_default = argparse.SUPPRESS

    def option(name: str, help: str, **settings: Any) -> None:
        default = DEFAULTS.get(name.strip("-").replace("-", "_"))
        parser.add_argument(name, help=help + (f" (default: {default})" if default else ""), **settings)

    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", type=argument, help="the configuration of a run")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="override of a key; its value is YAML"
    )
    option(
        "--arm",
        "which weights of a run (default: all); may be repeated",
        choices=ARMS,
        action="append",
    )
    option("--model", "checkpoint: a directory or a Hub id; by default the base that the adapter names", type=argument)
    option("--revision", "branch, tag or commit of a Hub id")
    option("--adapter", "directory of an adapter on that checkpoint, or of a run", type=path_argument)
    option("--results", "an official results file to score", type=argument)
    option("--questions", "official questions file", type=argument)
    option("--annotations", "official annotations file", type=argument)
    option("--images", "directory of the images (default with --jsonl: that of the file)", type=argument)
    option("--jsonl", "your own examples: a file of JSON lines with image, prefix and suffix", type=argument)
    option(
        "--source",
        "any source of examples, by the keys of data.validation of `paligemma-lora config`: csv=FILE, folder=DIR, "
        "hub=OWNER/NAME, columns.question=query, ...",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
    )
    option("--task", "what answers are judged by: data.validation.task of `paligemma-lora config`", choices=TASKS)
    option(
        "--candidates",
        "file of the answers that are allowed, one a line: the most likely one is taken, instead of a generated text",
        metavar="FILE",
        type=path_argument,
    )
    option("--prompt", f"of official questions (default: as the adapter was trained, or {DEFAULT_PROMPT!r})")
    option("--limit", "evaluate on the first N questions only", type=cli.positive, metavar="N")
    option("--output", "directory for metrics.json and, for new answers, results.json", type=path_argument)
    option("--batch-size", "questions at once on the device", type=cli.positive)
    option("--max-new-tokens", cli.NEW_TOKENS_HELP, type=cli.positive)
    option("--dtype", "of base weights and arithmetic", choices=list(cli.DTYPES))
    option("--quantize", cli.QUANTIZE_HELP, choices=["auto", "nf4", "none"])
    option("--device", "auto, cpu, cuda, cuda:N or mps")
    return parser


if __name__ == "__main__":
    cli.run(main)
