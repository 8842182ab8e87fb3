"""The runs that a configuration with `stages` stands for: one for each stage, then the run itself."""

from __future__ import annotations

from pathlib import Path

from finetune.config.schema import CONNECTOR, RunConfig
from finetune.lora.config import LoRAConfig


def runs_of(config: RunConfig) -> list[RunConfig]:
    """Configurations without stages, in the order in which they are trained; the last one is the run itself.

    Each stage trains the connector alone, in OUTPUT/stages/NAME, and each run starts with the connector of the one
    before it.
    """
    runs = []
    start_from = config.connector.start_from
    for stage in config.stages:
        rate = stage.learning_rate or config.connector.learning_rate
        length = {"epochs": stage.epochs, "max_steps": stage.max_steps}
        output = str(Path(config.output, "stages", stage.name))
        changes = {
            "lora": LoRAConfig(targets=(), modules_to_save=(CONNECTOR,)),
            "connector": config.connector.model_copy(update={"start_from": start_from, "learning_rate": rate}),
            "train": config.train.model_copy(update=length),
            "output": output,
            "stages": (),
        }
        runs.append(config.model_copy(update=changes))
        start_from = output
    connector = config.connector.model_copy(update={"start_from": start_from})
    return [*runs, config.model_copy(update={"connector": connector, "stages": ()})]
