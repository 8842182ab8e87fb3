"""The network that preferences are measured against: this very network with other values in its adapters, or with none.

So it takes no memory but for those values. Its log-probabilities of pairs can be computed once, and are kept with what
they depend on (`LogProbs`). Not here: the loss (preferences.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data import Processor
from finetune.adapters.fingerprint import fingerprint
from finetune.adapters.locate import find_adapter
from finetune.adapters.storage import file_parameters, read_adapter, require_base, serialized
from finetune.config.schema import RunConfig
from finetune.lora.protocol import adapters_disabled, trained_parameters
from finetune.system.atomic import write_bytes_whole
from model import PaliGemma

if TYPE_CHECKING:
    from datasets import Dataset

REFERENCE_FILE, START, BASE = "reference.safetensors", "start", "base"
TEXTS = ("id", "prefix", "answer", "rejected", "image_id")  # of a record, what its log-probabilities depend on


@dataclasses.dataclass(frozen=True)
class Reference:
    """A network that differs from the trained one in what is trained.

    Attributes:
        values: of what is trained, by its name there; None: the adapters are disabled.
    """

    values: Mapping[str, Tensor] | None

    @classmethod
    def of(cls, config: RunConfig, model: PaliGemma) -> Reference:
        """The one that `train.reference` names.

        model: with the adapters in place that training starts with, on the device.

        Raises:
            ValueError: an adapter cannot be read, or belongs to another base.
        """
        if not has_values(config):
            return cls(None)
        if (where := adapter_to_compare_with(config)) is None:
            return cls({name: p.detach().clone() for name, p in trained_parameters(model).items()})
        path = find_adapter(Path(where))
        settings, tensors = read_adapter(path)
        require_base(model, path, settings)
        names = {id(parameter): name for name, parameter in file_parameters(model).items()}
        return cls({name: tensors[names[id(p)]].to(p) for name, p in trained_parameters(model).items()})

    @contextlib.contextmanager
    def in_place(self, model: PaliGemma) -> Iterator[None]:
        """Within this context `model` is the reference, without dropout and without a graph."""
        trained = trained_parameters(model)
        own, was_training = {name: parameter.data for name, parameter in trained.items()}, model.training
        model.eval()
        try:
            with torch.no_grad(), adapters_disabled(model) if self.values is None else contextlib.nullcontext():
                for name, value in (self.values or {}).items():
                    trained[name].data = value
                yield
        finally:
            for name, parameter in trained.items():
                parameter.data = own[name]
            model.train(was_training)

    @property
    def digest(self) -> str:
        """Of its values."""
        if self.values is None:
            return "adapters disabled"
        found = hashlib.sha256()
        for name in sorted(self.values):
            found.update(name.encode())
            found.update(self.values[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def has_values(config: RunConfig) -> bool:
    """Whether the reference is more than the base, whose adapters are disabled; a new adapter starts as the base."""
    lora, where = config.lora, config.train.reference
    if config.train.objective == "supervised" or where == BASE or lora is None:
        return False
    return where != START or lora.start_from is not None or bool(lora.modules_to_save)


def values_from(config: RunConfig) -> dict[str, str]:
    """The directory of the adapter whose values the reference has, by the key that names it; none where it has none, or
    those that are drawn at the start.
    """
    if not has_values(config):
        return {}
    if (where := adapter_to_compare_with(config)) is not None:
        return {"train.reference": where}
    return {"lora.start_from": config.lora.start_from} if config.lora and config.lora.start_from else {}


def adapter_to_compare_with(config: RunConfig) -> str | None:
    """The directory of the adapter that `train.reference` names; None where it names none."""
    where = config.train.reference
    return None if where in (START, BASE) else where


class LogProbs:
    """The reference's log-probabilities of pairs, and the file in which they are kept.

    Args:
        file: of them.
        made_of: what they depend on, by name; a file that says otherwise is refused.
        ids: of the records, whose order the file has.

    Attributes:
        values: f64 [N, 2], of the chosen and of the rejected answer, in nats; not a number where not computed yet.

    Raises:
        ValueError: the file cannot be read, or holds log-probabilities of something else: names what differs.
    """

    def __init__(self, file: Path, made_of: Mapping[str, str], ids: list[str]) -> None:
        self.file, self.made_of = file, dict(made_of)
        self.positions = {name: position for position, name in enumerate(ids)}
        self.values = torch.full((len(ids), 2), torch.nan, dtype=torch.float64)
        if file.exists():
            self.values = self._read()

    def _read(self) -> Tensor:
        advice = f"delete it, and it is made again, or choose another output=...: {self.file}"
        try:
            with safe_open(self.file, framework="pt") as stored:
                made_of, values = json.loads(stored.metadata()["made_of"]), stored.get_tensor("log_probs")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the reference's log-probabilities cannot be read ({error}); {advice}") from error
        if differing := [name for name in {**made_of, **self.made_of} if made_of.get(name) != self.made_of.get(name)]:
            raise ValueError(
                f"the reference's log-probabilities were kept for another run, which is not the same in: "
                f"{', '.join(differing)}; restore that, or {advice}"
            )
        if values.shape != self.values.shape or values.dtype != self.values.dtype:
            raise ValueError(f"the reference's log-probabilities are damaged; {advice}")
        return values

    def get(self, id: str) -> Tensor | None:
        """f64 [2] of a record; None where they were not computed."""
        position = self.positions[id]
        return None if self.lacks([position]) else self.values[position]

    def lacks(self, positions: Sequence[int]) -> bool:
        """Whether one of these records has yet to be computed."""
        return bool(self.values[list(positions)].isnan().any())

    def add(self, position: int, values: Tensor) -> None:
        """Take log-probabilities f64 [2] of the record there, if there are none yet."""
        if self.lacks([position]):
            self.values[position] = values

    def save(self) -> None:
        """Write the file whole. OSError where that finds no room."""
        content = serialized({"log_probs": self.values}, {"made_of": json.dumps(self.made_of)})
        write_bytes_whole(self.file, content)


def made_of(
    config: RunConfig, model: PaliGemma, reference: Reference, processor: Processor, records: Dataset
) -> dict[str, str]:
    """What the reference's log-probabilities of these records depend on, by names for a person."""
    from data.lengths import content_hash  # only now: it needs `datasets`, which training in itself does not

    texts = records.select_columns(list(TEXTS)).with_format("arrow")[:]
    return {
        "the base": str(fingerprint(model)),
        "the reference's adapter": reference.digest,
        "the tokenizer": processor.digest,
        "the pairs": content_hash(texts),
        "the length of texts": f"{processor.text_limit} {processor.truncate_answers}",
        "images": str(processor.image_form),
        "model.dtype and model.quantize": f"{model.dtype} {config.model.quantize}",
    }
