"""What a run trains: its network, opened and adapted as the configuration says, and its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from finetune.adapters.locate import find_adapter
from finetune.adapters.network import network_text
from finetune.adapters.start_from import connector_tensors, load_connector, require_agreement, start
from finetune.config.schema import RunConfig
from finetune.config.stages import connector_start
from finetune.lora.config import SCOPES
from finetune.lora.linear import adapter_table
from finetune.lora.nf4 import open_base, quantize
from finetune.system import distributed, sharding
from finetune.system.console import new_table, show
from finetune.system.device import pick_device, pick_dtype
from finetune.training.batch_sampler import BatchSampler, steps_of_epochs
from finetune.training.examples import network_config
from finetune.training.reference import adapter_to_compare_with
from finetune.training.step_inputs import is_trained
from model import PaliGemma, PaliGemmaConfig, fetch
from model.convert import convert
from model.random_init import from_random

FEW_STEPS = 50


def open_model(directory: Path, config: RunConfig) -> PaliGemma:
    """The network to start from, on its device; in host memory where it will be sharded.

    Raises:
        ValueError: a base in four bits is to be sharded.
    """
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    if distributed.asks_for_fsdp():
        if config.model.quantize:
            raise ValueError(
                f"model.quantize={config.model.quantize} under FSDP: packed weights are not sharded here. Set "
                "model.quantize=null, or launch with --multi_gpu, where each process holds all of the packed network"
            )
        device = torch.device("cpu")
    if config.model.weights == "random":
        return from_random(directory, config.train.seed, dtype, device)
    return open_base(directory, dtype, device, config.model.quantize)


def random_model(directory: Path, config: RunConfig, device: torch.device) -> PaliGemma:
    """A network that takes as long as the one to start from, whose weights are not read."""
    dtype = pick_dtype(config.model.dtype, device)
    if config.model.quantize:
        return quantize(from_random(directory, config.train.seed, dtype), device)
    return from_random(directory, config.train.seed, dtype, device)


def plan_steps(config: RunConfig, sizes: Sequence[int]) -> BatchSampler:
    """The steps of a run whose sources of training examples have these sizes."""
    train, weights = config.train, [source.weight for source in config.data.sources("train")]
    assert train.max_steps or train.epochs, "the configuration has epochs or max_steps"
    total = train.max_steps or steps_of_epochs(sum(sizes), train.batch_size, train.epochs or 1)
    given = tuple(weight for weight in weights if weight is not None)
    return BatchSampler(tuple(sizes), train.batch_size, train.seed, total, given)


def shortness_note(steps: BatchSampler) -> str | None:
    """What a person should know of a run that can learn little, because it has few steps or few examples, or takes none
    of a source's; or None.
    """
    size, examples = steps.batch_size, steps.num_records
    if never := steps.never_drawn:
        names = " and ".join(f"data.train.{source}" for source in never)
        return (
            f"{names} {'are' if len(never) > 1 else 'is'} never drawn in the {steps.total * size:,} examples that the "
            "run takes: raise the weight, or make the run longer (train.epochs, train.max_steps)"
        )
    if size > examples:
        return (
            f"a step of train.batch_size={size} is more than the {examples:,} examples of data.train: it takes some of "
            "them more than once; a smaller train.batch_size makes more steps of an epoch"
        )
    if steps.total >= FEW_STEPS:
        return None
    smaller = max(1, size * steps.total // FEW_STEPS)
    more = f"a smaller train.batch_size, such as {smaller}, makes more steps of an epoch; or " if size > 1 else ""
    return (
        f"the run has {steps.total:,} steps, and fewer than {FEW_STEPS} rarely teach an adapter much: {more}raise "
        "train.epochs or train.max_steps"
    )


def adapt(model: PaliGemma, config: RunConfig, anew: bool = False) -> None:
    """Convert the network as the configuration says, and put the adapters in, or free all parameters.

    anew: not with the values of lora.start_from, connector.start_from and stages.
    """
    assert model.source is not None, "the network was opened from a directory"
    convert(model, network_config(model.source, config))
    if config.lora is None:
        model.requires_grad_(True)
    else:
        start(model, dataclasses.replace(config.lora, start_from=None) if anew else config.lora, config.train.seed)
    if (directory := connector_start(config)) is not None and not anew:
        load_connector(model, find_adapter(Path(directory)))


def require_starts(directory: Path, config: RunConfig) -> None:
    """That the adapters which a run starts from, or is compared with, fit its network, by names and shapes: no weights
    of the base are read.

    Raises:
        ValueError: lora.start_from, connector.start_from or train.reference cannot be read or does not fit; says
            in what.
    """
    connector, lora = connector_start(config), config.lora
    reference = adapter_to_compare_with(config)
    if connector is None and reference is None and (lora is None or lora.start_from is None):
        return
    with torch.device("meta"):
        model = PaliGemma(network_config(directory, config))
    model.opened_config = PaliGemmaConfig.from_directory(directory)
    if connector is not None:
        names = {name: p for name, p in model.named_parameters() if name.startswith(SCOPES["connector"])}
        connector_tensors(find_adapter(Path(connector)), model.config.connector, names)
    if lora is not None and lora.start_from is not None:
        require_agreement(model, lora)
    if lora is not None and reference is not None:
        require_agreement(model, dataclasses.replace(lora, start_from=reference), "train.reference")


def image_note(config: PaliGemmaConfig) -> str:
    """How many tokens the decoder gets of an image, and of what they are made."""
    return f"{config.num_image_tokens:,} tokens an image, by {network_text(config)}"


def start_note(config: RunConfig) -> str | None:
    """What to know of a connector that cannot start as the pretrained projector; None where it does, where training
    starts with a trained one, or where the connector alone is trained, as is advised.
    """
    connector, lora = config.connector, config.lora
    if connector.start == "random":
        reason = "connector.start is random, so that all of the connector is drawn"
    elif config.model.connector == "resampler":
        reason = "the layers of a resampler are drawn"
    elif config.model.connector == "pixel_shuffle":
        reason = "a pixel_shuffle begins as the mean of what the projector makes of its patches"
    else:
        return None
    directory = fetch(config.model.path, config.model.revision, weights=False)
    if network_config(directory, config).connector == PaliGemmaConfig.from_directory(directory).connector:
        return None  # the checkpoint's own
    if config.stages or connector.start_from or (lora and (lora.start_from or not lora.targets)):
        return None
    note = f"training cannot start at the pretrained network: {reason}"
    if lora is None:
        return f"{note}; everything is trained at once from there"
    return f"{note}. Advised is a stage that trains it alone first: stages: [{{name: align, max_steps: ...}}]"


def shard_decoder(model: PaliGemma, config: RunConfig) -> None:
    """Bring the network to its device, the layers of its decoder sharded over the processes: what holds most of the
    weights, and is run through its forward alone. Vision tower, connector, embedding and final norm stay whole.
    """
    device, decoder = pick_device(config.model.device), model.language_model.model
    sharding.shard(decoder, decoder.layers, device)
    if is_trained(model.vision_tower) or is_trained(model.multi_modal_projector):
        sharding.require_gradient_of_input(decoder)  # rows of text alone have nothing before the decoder to go back to
    model.to(device)


def table_of_adapters(model: PaliGemma) -> Table:
    table = new_table("tower", "module", "adapted", "rank", "parameters", title="what is trained")
    for scope, name, count, rank, parameters in adapter_table(model):
        table.add_row(scope, name, str(count), str(rank) if rank else "in full", f"{parameters:,}")
    return table


def show_trained(model: PaliGemma) -> None:
    """What will be trained, in a line; `--dry-run` has the table."""
    counts: dict[tuple[str, int], int] = {}
    for scope, _, count, rank, _ in adapter_table(model):
        counts[scope, rank] = counts.get((scope, rank), 0) + count
    where = [
        f"{scope}, {count} {'module' if count == 1 else 'modules'} of rank {rank}" if rank else f"{scope} in full"
        for (scope, rank), count in counts.items()
    ]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # A byte of an NF4 weight holds two of its values.
    everything = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    where.append(f"{trained:,} of {everything:,} parameters, on {model.device} in {dtype}")
    show(f"trained: {'; '.join(where)}")
