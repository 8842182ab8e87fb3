"""What a network keeps of what it could: captions after learning to answer, from questions alone and from a mixture.

    python -m benchmarks.mixture

Trains configs/mixture.yaml twice, with all of its sources and with its questions alone, on as many questions, evaluates
both and the base on questions and captions, and writes the table in docs/mixtures.md. Both keep their last step: the
best one by captions would be an early one of questions alone. A run that is finished is not repeated,
one that was interrupted resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune import cli
from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.config.source import Source
from finetune.evaluation.run import evaluate_run
from finetune.evaluation.score import Score
from finetune.run import learn
from finetune.system.atomic import write_text_whole
from finetune.system.console import show
from finetune.training.result import Result

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/mixture.yaml"
PAGE = ROOT / "docs/mixtures.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.mixture -->", "<!-- end -->"


def questions_alone(mixture: RunConfig) -> RunConfig:
    """The run with the first of its sources alone, and as many steps as take as many examples of that."""
    first, *_ = sources = mixture.data.sources("train")
    share = (first.weight or 0) / sum(source.weight or 0 for source in sources)
    steps = round((mixture.train.max_steps or 0) * share)
    return mixture.model_copy(
        update={
            "data": mixture.data.model_copy(update={"train": (unweighted(first),)}),
            "train": mixture.train.model_copy(update={"max_steps": steps}),
            "output": str(Path(mixture.output).with_name("questions")),
        }
    )


def unweighted(source: Source) -> Source:
    return source.model_copy(update={"weight": None})


def measured(mixture: RunConfig) -> dict[str, Score]:
    """The score of the base, of questions alone and of the mixture, trained where that is left to do."""
    found: dict[str, Score] = {}
    last = {"eval_every": None}
    mixture = mixture.model_copy(update={"train": mixture.train.model_copy(update=last)})
    for name, config in (("questions alone", questions_alone(mixture)), ("mixture", mixture)):
        result = Result.read(Path(config.output))
        if result is None or not result.finished:
            learn(config, [str(CONFIG)])
        arms = ("adapter",) if found else ("base", "adapter")
        scores = evaluate_run(config, [str(CONFIG)], arms)
        found |= {"base": scores["base"]} if not found else {}
        found[name] = scores["adapter"]
    return found


def table(scores: dict[str, Score]) -> str:
    """The scores by source as a table of Markdown, with 95% intervals."""
    sources = next(iter(scores.values())).by_source
    rows = [["", *(f"{name}: {score.metric}" for name, score in sources.items())], ["---"] * (1 + len(sources))]
    for arm, score in scores.items():
        rows.append([arm, *map(cell, score.by_source.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(score: Score) -> str:
    low, high = score.interval
    return f"{score.overall:.2f} ({low:.2f} to {high:.2f})"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over the configuration")
    arguments = parser.parse_args(argv)
    found = table(measured(load_config(CONFIG, arguments.overrides)))
    show(found)
    if not arguments.overrides:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        write_text_whole(PAGE, f"{before}{BEGIN}\n\n{found}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    cli.run(main)
