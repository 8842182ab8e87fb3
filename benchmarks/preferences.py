"""A network that answers everything in one word learns to answer in a sentence, from pairs of its own answers.

    python -m benchmarks.preferences                        train what is missing, write the table and the plot
    python -m benchmarks.preferences --workers 4 --seeds 1 2

Trains configs/preferences/blunt.yaml, lets it answer training and validation questions, makes pairs of these answers
(data.preferences) with a sentence for each right answer, and trains the other configurations there from the blunt
adapter, with several seeds (study.py). Of each network, on all validation questions:

- in a sentence: answers of more words than the question's own answer;
- right: answers whose words are among them in their order, "2" for "two" (data/preference_rules.py `says`);
- the sentence: those that are the very sentence which the pairs would choose;
- pairs: validation pairs whose chosen answer gained more than the rejected one; KL: KL(network || blunt adapter) at the
  chosen answers, in nats a token. Both where the run measures them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import ROOT, Job, begin_mark, draw_seeds, interval, parse, study_parser, train_all, write_table
from data import preferences
from data.preference_rules import says, words
from finetune import cli
from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.config.source import Source
from finetune.evaluation.evaluate import ANSWERS_FILE
from finetune.evaluation.run import evaluate_run
from finetune.system.atomic import write_text_whole
from finetune.system.console import show
from finetune.training.examples import open_records

NAME = "benchmarks.preferences"
CONFIGS = ROOT / "configs/preferences"
BLUNT, ARMS = CONFIGS / "blunt.yaml", ("dpo", "rpo", "supervised")
BEGIN = begin_mark(NAME)
NEW_TOKENS = 24  # of an answer, so that a sentence is not cut off


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a network, in percent of all validation questions, as above. pairs, kl: None where they are not measured."""

    in_a_sentence: float
    right: float
    the_sentence: float
    pairs: float | None = None
    kl: float | None = None


def sentence(question: str, answer: str) -> str:
    """The answer to a question about a scene, in a sentence.

    >>> sentence("how many red shapes are there?", "2")
    'there are 2 red shapes'
    """
    asked = question.rstrip("?")
    if match := re.fullmatch(r"is there (an? .+)", asked):
        return f"yes, there is {match[1]}" if answer == "yes" else f"no, there is no {match[1].split(' ', 1)[1]}"
    if match := re.fullmatch(r"is there anything (.+)", asked):
        return f"yes, something is {match[1]}" if answer == "yes" else f"no, nothing is {match[1]}"
    if match := re.fullmatch(r"how many (.+) are there", asked):
        return f"there are {answer} {match[1]}"
    if match := re.fullmatch(r"what (?:color )?is the (.+)", asked):
        return f"the {match[1]} is {answer}"
    raise ValueError(f"question {question!r}; expected one that data.synthetic.scenes asks")


def answered(config: RunConfig, source: Source, adapter_of: Path, output: Path) -> list[dict[str, Any]]:
    """The lines of answers.jsonl that a run's adapter gives to a source: made once.

    adapter_of: the configuration's file. output: the directory of the answers.
    """
    if not (output / "adapter" / ANSWERS_FILE).is_file():
        data = config.data.model_copy(update={"validation": source})
        evaluation = config.evaluation.model_copy(update={"max_new_tokens": NEW_TOKENS})
        asking = config.model_copy(update={"data": data, "evaluation": evaluation})
        evaluate_run(asking, [str(adapter_of)], ["adapter"], output=output)
    return lines_of(output / "adapter" / ANSWERS_FILE)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def make_pairs(config: RunConfig, runs: Path, split: str) -> None:
    """Write `runs`/`split`.jsonl, of the blunt adapter's answers to data.train or data.validation (`split`)."""
    pairs, source = runs / f"{split}.jsonl", config.data.only(split)
    if pairs.is_file():
        return
    own = runs / f"asked-{split}"
    given = answered(config, source, BLUNT, own)
    asking = config.model_copy(update={"data": config.data.model_copy(update={"validation": source})})
    right = {record["id"]: record["answer"] for record in open_records(asking, "validation").remove_columns("image")}
    sentences = [line | {"answer": sentence(line["question"], right[line["id"]]), "finished": True} for line in given]
    write_text_whole(runs / f"sentences-{split}.jsonl", "".join(json.dumps(line) + "\n" for line in sentences))
    files = {key: getattr(source, key) for key in ("questions", "annotations", "images")}
    options = [word for key, path in files.items() for word in (f"--{key}", str(path))]
    answers = ["--answers", str(own / "adapter" / ANSWERS_FILE), "--sentences", str(runs / f"sentences-{split}.jsonl")]
    preferences.main([*options, *answers, str(pairs)])


def measured(lines: Sequence[Mapping[str, Any]], right: Mapping[str, str], run: Path | None = None) -> Measured:
    """What answers are worth. right: the questions' own answers, by id. run: a finished run on pairs."""

    def percent(holds: list[bool]) -> float:
        return 100 * sum(holds) / len(holds)

    given = [(line["question"], line["answer"], right[line["id"]]) for line in lines]
    found = Measured(
        in_a_sentence=percent([len(words(text)) > len(words(answer)) for _, text, answer in given]),
        right=percent([says(text, answer) for _, text, answer in given]),
        the_sentence=percent([words(text) == words(sentence(question, answer)) for question, text, answer in given]),
    )
    last = [line for line in lines_of(run / "metrics.jsonl") if "eval_kl" in line][-1:] if run else []
    return dataclasses.replace(found, pairs=last[0]["eval_pair_accuracy"], kl=last[0]["eval_kl"]) if last else found


def table(blunt: Measured, arms: Mapping[str, Sequence[Measured]]) -> list[str]:
    """A row for each network, as Markdown."""
    rows = [["", "in a sentence", "right", "the sentence", "pairs", "KL"], ["---", *["---:"] * 5]]
    rows.append(["blunt adapter", *(f"{value:.1f}" for value in dataclasses.astuple(blunt)[:3]), "", ""])
    for arm, runs in arms.items():
        columns = zip(*map(dataclasses.astuple, runs), strict=True)
        cells = [
            "" if None in values else f"{interval(values):{'.2f' if n == 4 else '.1f'}}"
            for n, values in enumerate(columns)
        ]
        rows.append([f"`{arm}`", *cells])
    return ["| " + " | ".join(row) + " |" for row in rows]


def plot(file: Path, arms: Mapping[str, Sequence[Measured]], jobs: Mapping[str, Sequence[Job]]) -> None:
    """Over the steps of the first seed pairs told apart and answers that are the sentence; right answers by arm."""
    import matplotlib as mpl

    mpl.use("agg")  # draws into a file, without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (arm, of_arm) in enumerate(jobs.items()):
        lines = [line for line in lines_of(of_arm[0].output / "metrics.jsonl") if "eval_accuracy" in line]
        for key, style, label in (("eval_accuracy", "o-", "the sentence"), ("eval_pair_accuracy", "--", "pairs")):
            if found := [(line["step"], line[key]) for line in lines if key in line]:
                left.plot(*zip(*found, strict=True), style, color=f"C{number}", label=f"{arm}: {label}", markersize=4)
    left.set(xlabel="step", ylabel="percent of the validation pairs", ylim=(-3, 103))
    left.legend(fontsize=8)
    draw_seeds(right, {arm: [run.right for run in runs] for arm, runs in arms.items()}, "right answers, percent")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main(argv: Sequence[str]) -> None:
    parser = study_parser(NAME, __doc__, "alignment.md", seeds=3)
    arguments = parse(parser, argv)
    study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Train, measure, and write."""
    runs: Path = arguments.runs
    begin = Job(BLUNT, 0, runs / "blunt")
    train_all([begin], 1, [])
    blunt = load_config(BLUNT, begin.changes)
    for split in ("train", "validation"):
        make_pairs(blunt, runs, split)
    jobs = {
        arm: [Job(CONFIGS / f"{arm}.yaml", seed, runs / arm / f"seed{seed}") for seed in arguments.seeds]
        for arm in ARMS
    }
    made = [f"data.{split}.jsonl={runs / split}.jsonl" for split in ("train", "validation")]
    overrides = [*made, f"lora.start_from={runs / 'blunt'}", *arguments.overrides]
    train_all([job for together in zip(*jobs.values(), strict=True) for job in together], arguments.workers, overrides)
    asked = blunt.data.only("validation")
    right = {record["id"]: record["answer"] for record in open_records(blunt, "validation").remove_columns("image")}
    results: dict[str, list[Measured]] = {}
    for arm, of_arm in jobs.items():
        for job in of_arm:
            config = load_config(job.config, [*overrides, *job.changes])
            lines = answered(config, asked, job.config, job.output / "asked")
            results.setdefault(arm, []).append(measured(lines, right, job.output))
    of_blunt = measured(lines_of(runs / "asked-validation/adapter" / ANSWERS_FILE), right)
    write_table(arguments.document, BEGIN, found := table(of_blunt, results))
    plot(arguments.plot, results, jobs)
    show("\n".join(found), f"written into {arguments.document}, beside {arguments.plot}")


if __name__ == "__main__":
    cli.run(main)
