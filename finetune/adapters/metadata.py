"""What an adapter's files say of its training: on which base, in how many bits, and what its use depends on.

It stands in the metadata of the tensors' file; PEFT's files have none.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Keys in the metadata.
BASE_QUANTIZATION, BASE_FINGERPRINT, TRAINING = "base_quantization", "base_fingerprint", "training"


@dataclasses.dataclass(frozen=True)
class TrainingFacts:
    """What the use of an adapter depends on of its training; None: not known."""

    step: int | None = None
    """The optimizer step whose weights these are."""
    metric: str | None = None
    """Name of the metric that the run was judged by."""
    metric_value: float | None = None
    """Its value at that step."""
    validation_loss: float | None = None
    """In nats per token, at that step."""
    prompt: str | None = None
    """Prompt of the questions, with {question} where the question goes."""
    max_new_tokens: int | None = None
    """Tokens of the longest answer that was trained, <eos> included."""
    max_text_tokens: int | None = None
    """The most that prefix, newline, suffix and <eos> took together."""

    def __post_init__(self) -> None:
        kinds = {"metric": (str,), "prompt": (str,), "metric_value": (int, float), "validation_loss": (int, float)}
        for name, value in vars(self).items():
            fits = type(value) in kinds.get(name, (int,)) and (isinstance(value, str) or 0 <= abs(value) < math.inf)
            if value is not None and not fits:
                expected = " or ".join(kind.__name__ for kind in kinds.get(name, (int,)))
                raise ValueError(f"{name} is {value!r}; expected {expected}, finite, or null")

    def to_json(self) -> str:
        """What is known, as one JSON object."""
        return json.dumps({name: value for name, value in vars(self).items() if value is not None})

    @classmethod
    def from_json(cls, text: str) -> TrainingFacts:
        """Keys that a later version may add are ignored; ValueError where a value is of another type."""
        try:
            stored = json.loads(text)
        except RecursionError as error:
            raise ValueError(f"nested too deeply: {text:.50}") from error
        if not isinstance(stored, dict):
            raise ValueError(f"got {text:.50}; expected an object")
        return cls(**{field.name: stored.get(field.name) for field in dataclasses.fields(cls)})


def trained_on(directory: str | Path) -> str | None:
    """How the base of the adapter in `directory` was quantized in training: "nf4", or None (not known of PEFT's)."""
    quantized = metadata_of(Path(directory)).get(BASE_QUANTIZATION)
    if quantized not in (None, "nf4"):
        raise ValueError(
            f"{Path(directory) / WEIGHTS_FILE} says it was trained on a base in {quantized!r}; expected nf4"
        )
    return quantized


def training_facts(directory: str | Path) -> TrainingFacts:
    """How the adapter in `directory` was trained; nothing is known of PEFT's files.

    Raises:
        ValueError: what is stored cannot be used; names the value.
    """
    stored = metadata_of(Path(directory)).get(TRAINING, "{}")
    try:
        return TrainingFacts.from_json(stored)
    except ValueError as error:
        raise ValueError(
            f"{Path(directory) / WEIGHTS_FILE} says in its metadata, under {TRAINING!r}, what cannot be used: {error}"
        ) from error


def metadata_of(directory: Path) -> dict[str, str]:
    """The metadata of the tensors' file; empty for PEFT's files."""
    try:
        with safe_open(directory / WEIGHTS_FILE, "pt") as file:
            return file.metadata() or {}
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory} holds no {WEIGHTS_FILE}: expected the directory of an adapter, or of a run"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory} holds no readable {WEIGHTS_FILE}: {error}") from error
