"""The runs that a configuration with `stages` stands for: one for each stage, then the run itself."""

from __future__ import annotations

from pathlib import Path

from finetune.config.schema import CONNECTOR, RunConfig, Stage
from finetune.lora.config import LoRAConfig


def runs_of(config: RunConfig) -> list[RunConfig]:
    """Configurations in the order in which they are trained; the last one is the run itself.

    Each stage trains the connector alone, in OUTPUT/stages/NAME, and starts with the connector of the one before it.
    """
    stages = []
    start = config.connector.start_from
    for stage in config.stages:
        rate = stage.learning_rate or config.connector.learning_rate
        output = stage_output(config, stage)
        changes = {
            "lora": LoRAConfig(targets=(), modules_to_save=(CONNECTOR,)),
            "connector": config.connector.model_copy(update={"start_from": start, "learning_rate": rate}),
            "train": config.train.model_copy(update={"epochs": stage.epochs, "max_steps": stage.max_steps}),
            "output": output,
            "stages": (),
        }
        stages.append(config.model_copy(update=changes))
        start = output
    return [*stages, config]


def connector_start(config: RunConfig) -> str | None:
    """The directory of the run, or of the adapter, whose connector the run itself starts with; None: a new one."""
    return stage_output(config, config.stages[-1]) if config.stages else config.connector.start_from


def without_stages(config: RunConfig) -> RunConfig:
    """The run as it would be without its stages."""
    return config.model_copy(update={"stages": ()})


def stage_output(config: RunConfig, stage: Stage) -> str:
    """The directory of a stage."""
    return str(Path(config.output, "stages", stage.name))
