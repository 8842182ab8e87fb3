"""What will fit, said before anything is loaded: from the dimensions and the configuration alone.

The network is built without memory (fake tensors) and one row is passed through it: what autograd keeps is counted,
not modelled, layer by layer for each way of recomputing, and so are the products of its forward and backward pass.
From a budget follow the micro-batch, how much is computed again in the backward pass, and whether the vision tower
leaves the device while the decoder works. What cannot be counted (the device's context, the buffers of a layer at work,
what is lost between allocations) is an estimate, named as one. Not here: how long it takes (probe.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from data.lengths import Longest
from finetune.config.schema import DataConfig, RunConfig
from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.lora.nf4 import decoder_linears, packed_bytes
from finetune.system import distributed
from finetune.system.allocator import cublas_workspaces, expandable_segments, is_wsl_or_windows, reserved_bytes
from finetune.system.device import pick_device, pick_dtype
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma, PaliGemmaConfig

GIB = 2**30
TERA = 10**12
CONTEXT = int(0.45 * GIB)  # estimate: the libraries' own memory, on a card the CUDA context
# Estimates: share of what comes and goes in a step that is lost between allocations, in segments that grow or do not.
SPARE, SPARE_FIXED = 0.1, 0.2
LAUNCH_TOKENS = 64  # estimate: a product costs as much as this many tokens before the first one is computed


ASSUMED = Longest(text=32, answer=8)  # as VQAv2 is published, where the data cannot be read


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by component in a mode, and the budget they were planned for."""

    mode: ExecutionPlan
    components: dict[str, int]
    budget: int

    @property
    def total(self) -> int:
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.budget


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that one row keeps from its forward to its backward pass: per decoder layer, recomputed or not, and
    besides (vision tower, final norm).
    """

    layers: dict[str, list[int]]
    besides: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of products, two for each multiplication with its addition.

    Attributes:
        picture: one picture through vision tower and connector; there and back where they are trained.
        row: one row through the decoder and its head, there and back, nothing computed again.
        again: what recomputing a decoder layer adds to a row, by layer.
    """

    picture: int
    row: int
    again: list[int]

    def total(self, mode: ExecutionPlan, pictures: float) -> float:
        """TFLOP of a row, with what a mode recomputes, and of so many pictures."""
        return (pictures * self.picture + self.row + sum(self.again[: mode.recompute_layers])) / TERA


class Planner:
    """The memory and the work of training steps, for one network adapted in one way.

    Args:
        config: the network's dimensions.
        lora: the adapters; None where all parameters are trained.
        dtype: of base weights and arithmetic.
        tokens: of the longest row, image and padding included.
        supervised: tokens that the longest answer has, `<eos>` included.
        batch_size: examples of a step, or of a process's part of it.
        device: where it would run; on the CPU no weights can leave for elsewhere.
        quantize: how the decoder's frozen linears are kept: "nf4", or None for as they are.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        lora: LoRAConfig | None,
        dtype: torch.dtype,
        tokens: int,
        supervised: int,
        batch_size: int,
        device: torch.device,
        quantize: str | None = None,
    ) -> None:
        self.config, self.lora, self.dtype = config, lora, dtype
        self.tokens, self.supervised = tokens, supervised
        self.batch_size, self.device = batch_size, device
        with FakeTensorMode():
            self.model = empty(config, dtype)
            self.model.language_model.model.fold_heads = device.type == "cpu"  # as it will be there
            linears = [linear.weight for linear in decoder_linears(self.model).values()]
            if lora is not None:
                inject_lora(self.model, lora)
            self.model.train()
            towers = (self.model.vision_tower, self.model.multi_modal_projector)
            self.vision_trains = any(p.requires_grad for tower in towers for p in tower.parameters())
            self.kept = self.count_kept()
        self.counted = count_work(config, lora, self.vision_trains, tokens, supervised)
        self.trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        self.frozen = sum(p.nbytes for p in self.model.parameters()) - self.trained
        self.tower = sum(p.nbytes for p in self.model.vision_tower.parameters())
        self.dense = 0  # bytes of the largest matrix that is made dense for a product, and of layers gathered whole
        self.sizes = {name: p.nbytes for name, p in self.model.named_parameters()}
        if quantize:
            packed = {id(weight): packed_bytes(weight.numel()) for weight in linears}
            self.sizes |= {name: packed[id(p)] for name, p in self.model.named_parameters() if id(p) in packed}
            self.frozen -= sum(weight.nbytes - packed_bytes(weight.numel()) for weight in linears)
            self.dense = max(weight.nbytes for weight in linears)

    def shard_decoder(self, count: int) -> None:
        """Plan for one of `count` processes that share the decoder's layers: it holds a shard of each, and two layers
        whole, the one at work and the one that is gathered meanwhile.
        """
        layers = "language_model.model.layers."
        for name, parameter in self.model.named_parameters():
            if name.startswith(layers):
                others_hold = self.sizes[name] - math.ceil(self.sizes[name] / count)
                self.sizes[name] -= others_hold
                self.trained -= others_hold * parameter.requires_grad
                self.frozen -= others_hold * (not parameter.requires_grad)
        decoder = self.model.language_model.model
        self.dense += 2 * max(sum(p.nbytes for p in layer.parameters()) for layer in decoder.layers)

    def count_kept(self) -> Kept:
        decoder, layers, besides = self.model.language_model.model, {}, 0
        for name, recomputed in (("nothing", 0), ("layer", len(decoder.layers))):
            decoder.set_recompute(recomputed)
            counted = kept_bytes(self.model, self.tokens, self.supervised, self.vision_trains)
            besides = counted.pop()
            layers[name] = counted
        return Kept(layers, besides)

    def activations(self, mode: ExecutionPlan) -> int:
        """Bytes that the graph of one micro-batch keeps from its forward to its backward pass, logits aside."""
        again = mode.recompute_layers
        layers = self.kept.layers["layer"][:again] + self.kept.layers["nothing"][again:]
        return mode.micro_batch * (sum(layers) + self.kept.besides)

    def rounding(self, offload_vision: bool) -> int:
        """Bytes by which the segments of weights, gradients and optimizer state exceed them, on a card."""
        if self.device.type != "cuda":
            return 0
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        stays = {n: size for n, size in self.sizes.items() if not (offload_vision and n.startswith("vision_tower."))}
        sizes = [*stays.values(), *(self.sizes[name] for name in trained for _ in range(3))]
        return reserved_bytes(sizes, expandable_segments()) - sum(sizes)

    def attention_backward(self, positions: int) -> int:
        """Bytes of the gradients of q, k and v of all heads, and of the fp32 sums that CUDA's kernels keep of them."""
        text = self.config.text
        return 3 * positions * text.num_attention_heads * text.head_dim * (self.dtype.itemsize + 4)

    def evaluation(self, batch_size: int, new_tokens: int) -> int:
        """Bytes that answering so many questions at once takes, between the steps of a training, at their longest."""
        text, vision, e = self.config.text, self.config.vision, self.dtype.itemsize
        encoding = vision.num_patches * (2 * vision.intermediate_size + 6 * vision.hidden_size) * e
        prefill = self.tokens * (3 * text.intermediate_size + 6 * text.hidden_size) * e
        slots = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * e  # of a token in the cache
        logits = max(1, self.supervised) * text.vocab_size * (e + 8)  # the loss's; generation has those of one token
        row = max(encoding, prefill + logits) + slots * (self.tokens + new_tokens)
        row += 2 * vision.num_patches * text.hidden_size * e  # image tokens, and those of the rows
        passing = int((1 + self.spare) * batch_size * row) + self.dense
        on_card = cublas_workspaces(self.device) if self.device.type == "cuda" else 0
        return self.frozen + 4 * self.trained + self.rounding(False) + passing + on_card + CONTEXT

    def evaluation_batch(self, batch_size: int, new_tokens: int, budget: int) -> int:
        """The most questions at once, `batch_size` at most, whose evaluation is within `budget`; 1 where none is."""
        fits = (size for size in range(batch_size, 1, -1) if self.evaluation(size, new_tokens) <= budget)
        return next(fits, 1)

    @property
    def spare(self) -> float:
        return SPARE if self.device.type != "cuda" or expandable_segments() else SPARE_FIXED

    def backward_peak(self, mode: ExecutionPlan, gradients: Callable[[int], int]) -> int:
        """Bytes at most while the backward pass of a micro-batch works in a decoder layer: what that layer and those
        before it keep, what it recomputes, and its gradients: bytes of a row by its positions.
        """
        again = mode.recompute_layers
        kept = self.kept.layers["layer"][:again] + self.kept.layers["nothing"][again:]
        norms = 2 * self.config.text.hidden_size * self.dtype.itemsize  # outputs of a position, kept where recomputed
        peak, before = 0, 0
        for layer, (bytes_kept, bytes_of_all) in enumerate(zip(kept, self.kept.layers["nothing"], strict=True)):
            positions = self.tokens if layer < len(kept) - 1 else self.supervised
            recomputed = bytes_of_all - bytes_kept + positions * norms if bytes_kept < bytes_of_all else 0
            before += bytes_kept
            peak = max(peak, before + recomputed + gradients(positions))
        return mode.micro_batch * (self.kept.besides + peak) + self.dense

    def mlp_backward(self, positions: int) -> int:
        """Bytes of the gradients of gate, up and their product (on a CPU in bf16, these may be summed in fp32), and of
        the layer's input and output (an estimate).
        """
        widths = 5 if self.device.type == "cpu" and self.dtype == torch.bfloat16 else 3
        text = self.config.text
        return positions * (widths * text.intermediate_size + 2 * text.hidden_size) * self.dtype.itemsize

    def plan(self, mode: ExecutionPlan, budget: int) -> Plan:
        """What a mode takes, by component."""
        rows, e = mode.micro_batch, self.dtype.itemsize
        text, vision = self.config.text, self.config.vision
        # Of a logit three numbers in fp32: its log-probability, and the gradients of that and of itself.
        decoder = {"activations": self.activations(mode), "logits": rows * self.supervised * text.vocab_size * 12}
        # The backward pass frees the logits before it enters the layers, and what a layer keeps before it enters the
        # next; within a layer the MLP's moment is another than attention's.
        moments = {"buffers of a layer beyond that (estimate)": self.mlp_backward}
        if self.device.type == "cuda":
            moments["attention's backward beyond that (estimate)"] = self.attention_backward
        for name, gradients in moments.items():
            decoder[name] = max(0, self.backward_peak(mode, gradients) - sum(decoder.values()))
        tower_at_work = rows * vision.num_patches * (2 * vision.intermediate_size + 6 * vision.hidden_size) * e
        # Pictures are encoded first; then the decoder works, with or without the tower beside it.
        before = self.tower + tower_at_work if mode.offload_vision else tower_at_work
        decoder["vision phase beyond that"] = max(0, before - sum(decoder.values()))
        image_tokens = 0 if self.vision_trains else self.batch_size * vision.num_patches * text.hidden_size * e
        components = {
            "base weights": self.frozen - self.tower * mode.offload_vision,
            "trained weights": self.trained,
            "gradients": self.trained,
            "optimizer": 2 * self.trained,
            "image tokens of a step": image_tokens,
            **decoder,
            "between allocations (estimate)": int(self.spare * sum(decoder.values())),
            "context (estimate)": CONTEXT,
        }
        if self.device.type == "cuda":
            components["weights rounded to segments"] = self.rounding(mode.offload_vision)
            components["cuBLAS workspaces (estimate)"] = cublas_workspaces(self.device)
        return Plan(mode, components, budget)

    def choose(self, budget: int, micro_batch: int | None = None, recompute: int | None = None) -> Plan:
        """The fastest mode within `budget` bytes; where none fits the leanest, whose `fits` is False.

        micro_batch, recompute (number of layers): taken as given, where they are.
        """
        best: tuple[float, int, Plan] | None = None
        leanest: Plan | None = None
        for mode in self.modes(micro_batch, recompute):
            plan = self.plan(mode, budget)
            if leanest is None or plan.total < leanest.total:
                leanest = plan
            if plan.fits and (best is None or (self.cost(mode), plan.total) < best[:2]):
                best = (self.cost(mode), plan.total, plan)
        assert leanest is not None, "there is at least one mode"
        return best[2] if best else leanest

    def modes(self, micro_batch: int | None, recompute: int | None) -> Iterator[ExecutionPlan]:
        numbers = range(self.config.text.num_hidden_layers + 1) if recompute is None else [recompute]
        for rows in [micro_batch] if micro_batch else range(1, self.batch_size + 1):
            for layers in numbers:
                for leaves in (False, True) if self.device.type != "cpu" and not self.vision_trains else (False,):
                    yield ExecutionPlan(rows, layers, leaves)

    def work(self, mode: ExecutionPlan, pictures: float = 1.0) -> float:
        """TFLOP (10^12 floating-point operations) of an example in training, forward and backward.

        pictures: that pass the vision tower for one example; below 1 where examples of a step share pictures.
        """
        return self.counted.total(mode, pictures)

    def mean_work(self, mode: ExecutionPlan, tokens: int, supervised: int, pictures: float = 1.0) -> float:
        """TFLOP of an example in rows of another length, with answers of another length; else as `work`."""
        return count_work(self.config, self.lora, self.vision_trains, tokens, supervised).total(mode, pictures)

    def cost(self, mode: ExecutionPlan) -> float:
        """What an example takes, in TFLOP: its work, and besides what each micro-batch costs whatever its size, and the
        moves of the tower, each about as long as the decoder's work on one example.
        """
        launches = 1 + LAUNCH_TOKENS / (mode.micro_batch * self.tokens)
        moves = self.counted.row / TERA / self.batch_size if mode.offload_vision else 0
        return (self.work(mode) + moves) * launches


def empty(config: PaliGemmaConfig, dtype: torch.dtype) -> PaliGemma:
    """The network within a FakeTensorMode: shapes and dtypes, no values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return PaliGemma(config)
    finally:
        torch.set_default_dtype(before)


def kept_bytes(model: PaliGemma, tokens: int, supervised: int, vision: bool, rows: int = 1) -> list[int]:
    """Bytes that a pass over micro-batches of these shapes keeps: of each decoder layer, and at the end of all else.

    Each storage counts once, where it is kept first; parameters do not count. What all layers share (rotation,
    attention bias) is kept whether layers are computed again or not.
    """
    decoder, config = model.language_model.model, model.config
    # The storages are held, or an address could be met again.
    known = {storage._cdata: storage for storage in (parameter.untyped_storage() for parameter in model.parameters())}
    kept, current = [0] * (len(decoder.layers) + 1), -1

    def count(tensor: Tensor, place: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage
            kept[place] += storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        count(tensor, current)
        return tensor

    def start(*_: object) -> None:
        nonlocal current
        current = 0

    def count_shared(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        rotary, bias = inputs[1:3]
        for tensor in (*rotary, bias):
            count(tensor, -1)

    # A layer that is recomputed saves its input before it is entered.
    def leave(*_: object) -> None:
        nonlocal current
        current += 1

    handles = [decoder.register_forward_pre_hook(start)]
    for layer in decoder.layers:
        handles += [layer.register_forward_pre_hook(count_shared), layer.register_forward_hook(leave)]
    side, patches = config.vision.image_size, config.vision.num_patches
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.zeros(rows, tokens, config.text.hidden_size, dtype=model.dtype)
        if vision:
            images = model.encode_images(torch.zeros(rows, config.vision.num_channels, side, side, dtype=model.dtype))
            x = torch.cat((images, x[:, patches:]), dim=1)
        decode(model, x, supervised)
    for handle in handles:
        handle.remove()
    return kept


def decode(model: PaliGemma, x: Tensor, supervised: int) -> Tensor:
    """Input embeddings [B, S, D] -> final hidden states [B, U, D] of as many positions as are `supervised`."""
    rows, tokens, _ = x.shape
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=x.device)
    positions = torch.arange(tokens, device=x.device).expand(rows, -1)
    queries = torch.arange(supervised, device=x.device).expand(rows, -1)
    hidden: Tensor = model.language_model.model(x, mask, positions, query_positions=queries)
    return hidden


def counting() -> FlopCounterMode:
    """Counts the operations of products within it, the in-place one of the adapters too, which torch does not know."""

    def product(_: Any, left: list[int], right: list[int], **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def count_work(config: PaliGemmaConfig, lora: LoRAConfig | None, vision: bool, tokens: int, supervised: int) -> Work:
    """The products of a picture and of a row, counted while they pass a network without values, forward and backward.

    vision: whether anything is trained before the decoder.
    """
    with torch.device("meta"):
        model = PaliGemma(config)
        pixels = torch.zeros(1, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
        x = torch.zeros(1, tokens, config.text.hidden_size, requires_grad=vision)
    if lora is not None:
        inject_lora(model, lora)
    model.eval()  # dropout multiplies no matrices
    again: list[int] = []
    before = 0

    def passed(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal before
        forward, before = counter.get_total_flops() - before, counter.get_total_flops()
        product = 2 * output.shape[1] * config.text.hidden_size * config.text.intermediate_size
        again.append((forward - product) * output.requires_grad)  # the last, down: nothing behind it is needed

    with counting() as counter:
        with torch.set_grad_enabled(vision):
            images = model.encode_images(pixels)
        if vision:
            images.sum().backward()
        picture = before = counter.get_total_flops()
        for layer in model.language_model.model.layers:
            layer.register_forward_hook(passed)
        model.language_model.head(decode(model, x, supervised)).sum().backward()
    return Work(picture, counter.get_total_flops() - picture, again)


def assumed(data: DataConfig) -> Longest:
    """What to take for the longest text and answer where the data cannot be read."""
    text = ASSUMED.text if data.max_text_tokens == "auto" else data.max_text_tokens
    return Longest(text, min(ASSUMED.answer, text))


def plan_run(run: RunConfig, config: PaliGemmaConfig, longest: Longest) -> tuple[Planner, Plan, str]:
    """The plan of a run: planner, what it chose within what the configuration leaves open, and whose the budget is.

    Every row is taken to be as long as the longest text, and every answer as the longest answer. Of several processes
    each plans its share of a step.
    """
    layers, train = config.text.num_hidden_layers, run.train
    if isinstance(train.recompute, int) and train.recompute > layers:
        raise ValueError(f"train.recompute is {train.recompute}; this network has {layers} decoder layers")
    # With a budget, a device that is elsewhere can be planned for, too.
    here = run.model.device == "auto" or run.memory.budget_gib is None
    device = pick_device(run.model.device) if here else torch.device(run.model.device)
    dtype = pick_dtype(run.model.dtype, device)
    tokens = config.vision.num_patches + 1 + longest.text
    share = math.ceil(train.batch_size / distributed.count())
    planner = Planner(config, run.lora, dtype, tokens, longest.answer, share, device, run.model.quantize)
    if distributed.asks_for_fsdp():
        planner.shard_decoder(distributed.count())
    budget, whose = budget_of(device, run.memory.budget_gib)
    micro_batch = None if train.micro_batch == "auto" else train.micro_batch
    recompute = None if train.recompute == "auto" else train.recompute
    return planner, planner.choose(budget, micro_batch, recompute), whose


def require_fit(run: RunConfig, plan: Plan, whose: str) -> None:
    """ValueError where a plan does not fit; it says what there is to change."""
    if plan.fits:
        return
    train, mends = run.train, ["close what else uses the device"]
    if run.memory.budget_gib is not None:
        mends = ["raise memory.budget_gib"]
    if train.micro_batch != "auto" or train.recompute != "auto":
        mends.append("leave train.micro_batch and train.recompute at auto")
    if run.model.dtype == "float32":
        mends.append("take model.dtype=bfloat16")
    if run.lora is None:
        mends.append("train an adapter (lora) instead of all parameters")
    elif run.model.quantize is None:
        mends.append("keep the base in four bits with model.quantize=nf4")
    mends.append("set a smaller data.max_text_tokens, beyond which records are skipped or their answers cut")
    raise ValueError(
        f"this does not fit: {plan.total / GIB:.2f} GiB are needed at least, the budget is {plan.budget / GIB:.2f} "
        f"({whose}). What helps: {'; '.join(mends)}; a smaller checkpoint"
    )


def budget_of(device: torch.device, budget_gib: float | None) -> tuple[int, str]:
    """Bytes that a run may take, and whose they are: as asked, or what is free now."""
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
