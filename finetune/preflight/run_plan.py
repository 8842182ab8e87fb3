"""The plan of a run: from its configuration and the lengths of its data to an execution plan within the budget."""

from __future__ import annotations

import dataclasses
import math

import torch

from data.lengths import Longest
from finetune.config.schema import RunConfig
from finetune.preflight.plan import CONTEXT, GIB, Plan, Planner
from finetune.system import distributed
from finetune.system.allocator import is_wsl_or_windows
from finetune.system.device import pick_device, pick_dtype
from finetune.training.reference import has_values
from model import PaliGemmaConfig

# Where the data cannot be read: as VQAv2 is published, with one answer in a row, and with those of all ten annotators;
# and pairs of a sentence each.
ASSUMED, ASSUMED_ALL = Longest(text=32, supervised=8, answer=8), Longest(text=64, supervised=40, answer=8)
ASSUMED_PAIR = Longest(text=88, supervised=64, answer=32)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What was planned for a run: the chosen plan, who can plan another, and where the budget comes from."""

    planner: Planner
    plan: Plan
    budget_source: str


def plan_run(run: RunConfig, config: PaliGemmaConfig, longest: Longest) -> RunPlan:
    """The fastest plan within the budget, and within what the configuration leaves open.

    Every row is taken to be as long as the one with the longest text, with as many supervised tokens as a row has at
    most, and to have an image: an upper bound where that row has none. Of several processes each plans its share of a
    step.

    Raises:
        ValueError: train.recompute is more than the network has layers.
    """
    layers, train = config.text.num_hidden_layers, run.train
    if isinstance(train.recompute, int) and train.recompute > layers:
        raise ValueError(f"train.recompute is {train.recompute}; this network has {layers} decoder layers")
    # With a budget, a device of another machine can be planned for, too.
    here = run.model.device == "auto" or run.memory.budget_gib is None
    device = pick_device(run.model.device) if here else torch.device(run.model.device)
    dtype = pick_dtype(run.model.dtype, device)
    tokens = config.num_image_tokens + 1 + longest.text
    share = math.ceil(train.batch_size / distributed.count())
    lengths = (tokens, longest.supervised, share)
    planner = Planner(config, run.lora, dtype, *lengths, device, run.model.quantize, longest.answer)
    planner.keeps_reference = has_values(run)
    planner.samples = run.reward.samples if train.objective == "reward" else 0
    if distributed.asks_for_fsdp():
        planner.shard_decoder(distributed.count())
    budget, source = budget_of(device, run.memory.budget_gib)
    micro_batch = None if train.micro_batch == "auto" else train.micro_batch
    recompute = None if train.recompute == "auto" else train.recompute
    return RunPlan(planner, planner.choose(budget, micro_batch, recompute), source)


def assumed_lengths(run: RunConfig) -> Longest:
    """What to take for the longest row where the data cannot be read."""
    data, assumed = run.data, {"all": ASSUMED_ALL, "pair": ASSUMED_PAIR}.get(run.learned_answers, ASSUMED)
    text = assumed.text if data.max_text_tokens == "auto" else data.max_text_tokens
    answer = min(assumed.answer, text)
    if run.learned_answers == "prompt":
        limit = run.evaluation.max_new_tokens
        drawn = run.reward.samples * (answer if limit == "auto" else limit)
        return Longest(text - answer + drawn, drawn, answer)
    return Longest(text, min(assumed.supervised, text), answer)


def require_fit(run: RunConfig, planned: RunPlan) -> None:
    """That the plan fits.

    Raises:
        ValueError: it does not; says what of the configuration to change.
    """
    plan = planned.plan
    if plan.fits:
        return
    train, fixes = run.train, ["close what else uses the device"]
    if run.memory.budget_gib is not None:
        fixes = ["raise memory.budget_gib"]
    if train.micro_batch != "auto" or train.recompute != "auto":
        fixes.append("leave train.micro_batch and train.recompute at auto")
    if run.model.dtype == "float32":
        fixes.append("take model.dtype=bfloat16")
    if run.lora is None:
        fixes.append("train an adapter (lora) instead of all parameters")
    elif run.model.quantize is None:
        fixes.append("quantize the base to four bits with model.quantize=nf4")
    if train.objective == "reward":
        fixes.append("draw fewer or shorter answers (reward.samples, evaluation.max_new_tokens)")
    fixes.append("set a smaller data.max_text_tokens: records with longer texts are skipped, or their answers cut")
    raise ValueError(
        f"this does not fit: {plan.total / GIB:.2f} GiB are needed at least, the budget is {plan.budget / GIB:.2f} "
        f"({planned.budget_source}). What helps: {'; '.join(fixes)}; a smaller checkpoint"
    )


def budget_of(device: torch.device, budget_gib: float | None) -> tuple[int, str]:
    """Bytes that a run may take, and where that number comes from: as asked, or what is free now."""
    if budget_gib is not None:
        return int(budget_gib * GIB), "memory.budget_gib"
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + CONTEXT, f"free on {torch.cuda.get_device_name(device)}"
    import psutil

    return psutil.virtual_memory().available // distributed.count(), "free in this machine's memory"


def spill_warning(device: torch.device) -> str | None:
    """What a person on Windows or WSL must know, or None."""
    if device.type == "cuda" and is_wsl_or_windows():
        return (
            "on Windows and WSL the driver moves what does not fit into host memory instead of failing, and training "
            "becomes many times slower: in the NVIDIA control panel set 'CUDA - Sysmem Fallback Policy' to 'Prefer No "
            "Sysmem Fallback', and keep memory.budget_gib below what is free"
        )
    return None
