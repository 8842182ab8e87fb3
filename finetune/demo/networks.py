"""The networks that a page asks: the base as it is published, and one for each adapter, all on the same base weights.

Each adapter has a network of its own whose base parameters are those of the base, not copies: nothing is switched
between two questions, and a second adapter costs its own parameters alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data import Processor
from finetune import cli
from finetune.adapters.generation_config import DEFAULT_NEW_TOKENS, stored_max_new_tokens
from finetune.adapters.locate import find_adapter, find_base
from finetune.adapters.metadata import CONFIG_FILE, training_facts
from finetune.adapters.network import adapted_config
from finetune.adapters.storage import load_adapter
from finetune.lora.nf4 import open_base
from finetune.system.device import pick_device, pick_dtype
from finetune.training.examples import processor_of
from model import PaliGemma, fetch

BASE = "base"
DEFAULT_PROMPT = "answer en {question}"


@dataclasses.dataclass(frozen=True)
class Network:
    """What answers, under the name that the page shows."""

    name: str
    model: PaliGemma
    processor: Processor


@dataclasses.dataclass(frozen=True)
class Opened:
    """The base, then the adapters in their order.

    Attributes:
        max_new_tokens: the longest answer that one of the adapters was trained on.
        prompt: with {question} where the question goes.
    """

    networks: list[Network]
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    prompt: str = DEFAULT_PROMPT


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the adapters are, by name, and the checkpoint and revision that all of them belong to."""

    adapters: dict[str, Path]
    base: str
    revision: str | None


def find_sources(runs: Sequence[Path], model: str | None = None, revision: str | None = None) -> Sources:
    """The adapters of runs, or directories of adapters, and their base: `model`, or else the one that they name.

    Raises:
        ValueError: one holds no adapter, two have the same name, or they name different bases.
    """
    adapters = {run.resolve().name: adapter_of(run) for run in runs}
    if len(adapters) < len(runs) or BASE in adapters:
        names = ", ".join(map(str, runs))
        raise ValueError(f"expected directories of different names, none of them {BASE!r}, to tell them apart: {names}")
    if model is not None:
        return Sources(adapters, model, revision)
    bases = {name: find_base(adapter) for name, adapter in adapters.items()}
    if len({(str(Path(base).resolve()), branch) for base, branch in bases.values()}) > 1:
        named = "; ".join(f"{name} names {base}{f' ({at})' if at else ''}" for name, (base, at) in bases.items())
        raise ValueError(f"the adapters are of different bases ({named}): show those of one base, or give --model")
    return Sources(adapters, *next(iter(bases.values())))


def adapter_of(run: Path) -> Path:
    """The directory of a run's adapter. ValueError where there is none."""
    adapter = find_adapter(run)
    if not (adapter / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run} holds no adapter: expected the directory of a run that trained one, such as runs/quickstart, or of "
            "an adapter; predict.py --model asks a network that was trained in full"
        )
    return adapter


def open_networks(sources: Sources, dtype: str = "bfloat16", device: str = "auto", quantize: str = "auto") -> Opened:
    """Open the base once, and each adapter on its weights; `quantize` as for predict.py.

    Raises:
        ValueError: the base cannot be opened, an adapter does not fit it, or adapters were trained on a base in four
            bits and on a dense one.
    """
    quantization = one_quantization(sources, quantize)
    directory, place = fetch(sources.base, sources.revision), pick_device(device)
    base = open_base(directory, pick_dtype(dtype, place), place, quantization)
    networks = [Network(BASE, base, processor_of(directory, base.config))]
    for name, adapter in sources.adapters.items():
        adapted = on_same_weights(base)
        load_adapter(adapted, adapter)
        networks.append(Network(name, adapted, processor_of(directory, adapted_config(directory, adapter))))
    lengths = [stored_max_new_tokens(directory, adapter) for adapter in sources.adapters.values()]
    prompts = [training_facts(adapter).prompt for adapter in sources.adapters.values()]
    longest = max((length for length in lengths if length is not None), default=DEFAULT_NEW_TOKENS)
    return Opened(networks, longest, next((prompt for prompt in prompts if prompt), DEFAULT_PROMPT))


def one_quantization(sources: Sources, asked: str) -> str | None:
    """How the base of all adapters is kept. ValueError where they were trained on different ones, and none is asked."""
    found = {name: cli.quantization(asked, adapter) for name, adapter in sources.adapters.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"the adapters were trained on a base in different forms ({found}): one form is kept in memory, choose it "
            "with --quantize nf4 or --quantize none"
        )
    return next(iter(found.values()))


def on_same_weights(model: PaliGemma) -> PaliGemma:
    """A second network of the same modules whose parameters and buffers are those of `model`, not copies of them."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
