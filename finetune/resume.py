"""The run directory: its resolved configuration, and whether a run may go on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.checkpoints import checkpoints
from finetune.config import RunConfig, dump_config, load_config

# What may differ between a run and its continuation: none of it changes what is learned.
FREE = (
    "model.device",
    "data.workers",
    "train.micro_batch",
    "train.recompute",
    "memory",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "tracking",
    "output",
)


def find_checkpoint(config: RunConfig, resume: str) -> Path | None:
    """The checkpoint to go on from: the newest of the run (`auto`), none, or the directory given.

    Raises:
        ValueError: the run was made with another configuration, or would be overwritten.
    """
    output = Path(config.output)
    found = checkpoints(output / "checkpoints")
    if resume not in ("auto", "none"):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ValueError(
                f"--resume {resume}: expected auto, none or a checkpoint, such as {output}/checkpoints/step-000100"
            )
        return Path(resume)
    if not found:
        return None
    if resume == "none":
        raise ValueError(
            f"{output} holds checkpoints: to start afresh choose another output=..., or delete the directory"
        )
    if changed := differences(flat(load_config(output / "config.yaml")), flat(config)):
        raise ValueError(
            f"{output} holds checkpoints of another configuration; go on with its own, {output}/config.yaml, or "
            "choose another output=...:\n  " + "\n  ".join(changed)
        )
    return found[-1]


def start_run(config: RunConfig) -> None:
    """Make the run directory and write the resolved configuration into it."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted keys and values, but those that may differ."""

    def below(section: dict[str, Any], prefix: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in section.items():
            values |= below(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return values

    return {key: value for key, value in below(config.model_dump(mode="json"), "").items() if not key.startswith(FREE)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [*before, *(key for key in now if key not in before)]
    absent = "(absent)"
    return [
        f"{k}: was {before.get(k, absent)}, is {now.get(k, absent)}"
        for k in keys
        if before.get(k, absent) != now.get(k, absent)
    ]
