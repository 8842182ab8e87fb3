"""The run directory: its resolved configuration, what its data were, and whether a run may resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapters.locate import find_adapter
from finetune.adapters.metadata import WEIGHTS_FILE
from finetune.config.load import dump_config, load_config
from finetune.config.schema import SPLITS, RunConfig
from finetune.config.stages import connector_start
from finetune.system.atomic import damage, describe, describe_all, write_text_whole
from finetune.training.checkpoints import checkpoints, newest_whole
from finetune.training.reference import values_from
from finetune.training.result import Result

DATA_FILE = "data.json"
ABSENT = "(absent)"


def find_checkpoint(config: RunConfig, resume: str, accept_changes: bool = False) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what a person should know of it.

    Args:
        resume: "auto", the newest of the run that is whole, or none; "none"; or the directory of a checkpoint.
        accept_changes: resume with a configuration that leads to another result.

    Raises:
        ValueError: the run was made with another configuration, would be overwritten, or has no checkpoint that is
            whole.
    """
    output = Path(config.output)
    if resume not in ("auto", "none"):
        if reason := damage(Path(resume)):
            raise ValueError(
                f"--resume {resume}: {reason}; expected auto, none or a checkpoint, such as "
                f"{output}/checkpoints/step-000100"
            )
        return Path(resume), []
    found = checkpoints(output / "checkpoints")
    if resume == "none" and found:
        raise ValueError(
            f"{output} holds checkpoints: to start afresh choose another output=..., or delete the directory"
        )
    if not found:
        made = output / ("adapter" if config.lora else "model")
        if not made.exists():
            return None, []
        if is_of_a_stopped_run(output, config):
            return None, [f"{output} was stopped before its first checkpoint: it begins again, and {made} gives way"]
        raise ValueError(f"{made} exists, without checkpoints to go on from: choose another output=..., or delete it")
    newest, skipped = newest_whole(output / "checkpoints")
    if newest is None:
        raise ValueError(
            f"{output} holds no checkpoint that is whole: delete the directory to start afresh\n  "
            + "\n  ".join(skipped)
        )
    changed = differences(load_config(output / "config.yaml"), config)
    changed.setdefault("result", []).extend(edited(output, config))
    result = changed.get("result", [])
    if result and not accept_changes:
        raise ValueError(
            f"{output} holds checkpoints of a configuration that leads to another result; resume what was begun "
            f"({output}/config.yaml, and the data as they were), choose another output=..., or accept what changed "
            "with --accept-changes:\n  " + "\n  ".join(result)
        )
    notes = [f"skipped {line}" for line in skipped]
    notes += [f"changed since, accepted: {line}" for line in result]
    notes += [f"changed since, the same result up to rounding: {line}" for line in changed.get("numerics", [])]
    return newest, notes


def is_of_a_stopped_run(output: Path, config: RunConfig) -> bool:
    """Whether what was kept there is that of this very run, which had not come to its end."""
    kept = Result.read(output)
    return kept is not None and not kept.finished and was_begun_as(output, config)


def is_complete(config: RunConfig) -> bool:
    """Whether a run of this very configuration went to its end, and its result is whole."""
    output = Path(config.output)
    kept, made = Result.read(output), output / ("adapter" if config.lora else "model")
    ended = kept is not None and kept.finished and made.is_dir() and damage(made) is None
    return ended and was_begun_as(output, config)


def was_begun_as(output: Path, config: RunConfig) -> bool:
    """Whether the run there has a configuration and data that lead to the same result."""
    if not (output / "config.yaml").is_file():
        return False
    return not differences(load_config(output / "config.yaml"), config).get("result") and not edited(output, config)


def start_run(config: RunConfig) -> None:
    """Make the run directory and write the resolved configuration into it.

    Raises:
        ValueError: it cannot be written; one that was there stands.
    """
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text_whole(output / "config.yaml", dump_config(config))
        write_text_whole(output / DATA_FILE, json.dumps(contents(config), indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error}\nfix that and start the same command again") from error


def contents(config: RunConfig) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of what the run's examples come from, by its key in the configuration, of the connector that it
    starts with, and of the adapter that it is compared with. A data set on the Hub is not among them: the configuration
    has its commit.
    """
    from data.sources import source_contents  # only now: it needs `datasets`, which training in itself does not

    # What is held out of data.train is among its files.
    splits = SPLITS if config.data.validation != "auto" else ("train",)
    start = connector_start(config)
    weights = find_adapter(Path(start)) / WEIGHTS_FILE if start else None
    name = f"stages/{config.stages[-1].name}/adapter" if config.stages else "connector.start_from"
    starts = {name: weights} if weights else {}
    starts |= {key: find_adapter(Path(where)) / WEIGHTS_FILE for key, where in values_from(config).items()}
    return {key: describe(file) for key, file in starts.items() if file.is_file()} | {
        f"{place}.{name}": describe_all(*of)
        for split in splits
        for place, source in config.data.places(split).items()
        for name, of in source_contents(source.model_dump()).items()
    }


def judged_by(config: RunConfig) -> dict[str, Any]:
    """What a run's figures depend on beside the weights: the validation data and how answers to them are generated."""
    of_answers = {"prompt": config.data.prompt, "max_text_tokens": config.data.max_text_tokens}
    held_out = config.data.validation == "auto"
    begin = "data.train" if held_out else "data.validation"
    files = {key: about for key, about in contents(config).items() if key.startswith(begin)}
    asked = {"seed": config.train.seed, "evaluation": config.evaluation.model_dump(exclude={"batch_size"})}
    validation = config.data.model_dump(mode="json")["train" if held_out else "validation"]
    pairs = {"preference": config.preference.model_dump(), "reference": config.train.reference}
    of_pairs = pairs if config.train.objective == "dpo" else {}  # their loss is the validation loss
    return {"validation": validation, "files": files, **of_answers, **asked, **of_pairs}


def edited(output: Path, config: RunConfig) -> list[str]:
    """Files of examples that are not what they were when the run was started, as lines to show."""
    try:
        before = json.loads((output / DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [f"{key}: the content of the file" for key, now in contents(config).items() if before.get(key, now) != now]


def differences(before: RunConfig, now: RunConfig) -> dict[str, list[str]]:
    """Keys whose values differ, as lines to show, by what they change: the "result", the "numerics" or "nothing". A key
    that is absent on one side, such as those of one more source, is no difference where it is null on the other.
    """
    old, new = (flat(config.model_dump(mode="json")) for config in (before, now))
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key, ABSENT), new.get(key, ABSENT)
        if was != is_now and (was, is_now) not in ((None, ABSENT), (ABSENT, None)):
            found.setdefault(RunConfig.effect_of(key), []).append(f"{key}: was {was}, is {is_now}")
    return found


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; a list of sections has its positions among the keys, such as stages.0.name."""
    values: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(position): item for position, item in enumerate(value)}
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values
