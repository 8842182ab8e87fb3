"""What a model card is about: an adapter or a checkpoint, its base, and the run that it belongs to."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from finetune.adapters.locate import find_base
from finetune.adapters.metadata import CONFIG_FILE, WEIGHTS_FILE, TrainingFacts, training_facts
from finetune.adapters.network import changes_in
from finetune.report.result_page import shortened
from finetune.report.run_data import Arm, RunData, read_run
from model import PaliGemmaConfig

TOOLKIT = "paligemma-lora"
GEMMA_VOCABULARY = 257_152  # tokens of the published checkpoints, without their padding
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        directory: the adapter, or the checkpoint.
        adapter: the adapter itself, or the one that was merged into the checkpoint; None where all was trained.
        run: where it was trained, if that is known.
        repo: its id on the Hub, where it is pushed.
        named_base: the adapter's base on the Hub, where the adapter itself names a directory.
    """

    directory: Path
    adapter: Path | None
    run: RunData | None
    repo: str | None = None
    named_base: str | None = None

    @property
    def is_adapter(self) -> bool:
        return self.directory == self.adapter

    @property
    def name(self) -> str:
        """What opens it: its id on the Hub, or a path that is relative."""
        return self.repo or shortened(str(self.directory), os.getcwd())

    @property
    def base(self) -> tuple[str | None, str | None]:
        """The base checkpoint and its revision: a directory or a Hub id; None where it is not known."""
        if self.named_base:
            return self.named_base, None
        if self.adapter is None:
            return (self.run.config.model.path, self.run.config.model.revision) if self.run else (None, None)
        try:
            return find_base(self.adapter)
        except ValueError:
            return None, None

    @property
    def hub_base(self) -> str | None:
        """The base, if it is one on the Hub."""
        base, _ = self.base
        return base if base and HUB_ID.fullmatch(base) and not Path(base).is_dir() else None

    @property
    def base_to_open(self) -> str:
        """What opens the base: its id on the Hub, a path that is relative and there, or one to be filled in."""
        known = self.hub_base or Path(self.shown_base).is_dir()
        return self.shown_base if known else f"PATH/TO/{self.shown_base}"

    @property
    def shown_base(self) -> str:
        """The base's name without the path to it."""
        base, _ = self.base
        output = str(self.run.directory) if self.run else str(self.directory)
        return shortened(base, output) if base else "a checkpoint that is not named"

    @property
    def facts(self) -> TrainingFacts:
        """What is stored with the adapter; where all was trained, what the run says."""
        if self.adapter:
            return training_facts(self.adapter)
        if self.run is None or self.run.result is None:
            return TrainingFacts()
        return dataclasses.replace(self.run.result.facts, prompt=self.run.config.data.prompt_of_all)

    @property
    def opens_elsewhere(self) -> bool:
        """Whether PEFT opens the adapter, or transformers the checkpoint, as the network that was trained."""
        base = Path(self.base[0] or "unknown")
        if self.is_adapter and changes_in(self.directory):
            return False
        checkpoint = base if self.is_adapter else self.directory
        if not (checkpoint / "config.json").is_file():
            return True  # a base on the Hub, where the published ones are
        return PaliGemmaConfig.from_directory(checkpoint).is_published

    @property
    def has_gemma_weights(self) -> bool:
        """Whether the base has the published checkpoints' vocabulary, or is on the Hub."""
        base, _ = self.base
        directory = Path(base or "unknown") if self.is_adapter else self.directory
        if self.is_adapter and not (directory / "config.json").is_file():
            return True
        return PaliGemmaConfig.from_directory(directory).text.vocab_size >= GEMMA_VOCABULARY

    @property
    def arms(self) -> dict[str, Arm]:
        """Its own scores, and the base's on the same questions; none where it was not evaluated as it is now."""
        if self.run is None or self.directory.resolve().parent != self.run.directory.resolve():
            return {}
        arm = self.run.arms.get(self.directory.name)
        if arm is None or self.run.is_outdated(arm):
            return {}
        base = self.run.base_beside(arm)
        return {arm.name: arm} | ({"base": base} if base else {})

    @property
    def weights_file(self) -> str:
        return WEIGHTS_FILE if self.is_adapter else "model.safetensors"


def subject_of(directory: Path, adapter: Path | None = None, repo: str | None = None) -> Subject:
    """What is in a directory, an adapter's or a checkpoint's, and the run that it belongs to.

    Args:
        adapter: the one that was merged into a checkpoint; by default that of its run.
        repo: its id on the Hub, where it is pushed.

    Raises:
        ValueError: there is neither; or what is there cannot be read.
    """
    if (directory / CONFIG_FILE).is_file():
        adapter = directory
    elif not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} holds neither {CONFIG_FILE} nor config.json: expected a run, an adapter or a checkpoint"
        )
    elif adapter is None and directory.name == "merged" and (directory.parent / "adapter" / CONFIG_FILE).is_file():
        adapter = directory.parent / "adapter"
    place = (adapter or directory).absolute().parent
    run = read_run(place) if (place / "config.yaml").is_file() else None
    return Subject(directory, adapter, run, repo)
