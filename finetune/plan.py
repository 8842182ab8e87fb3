"""What will fit, said before anything is loaded: from the dimensions and the configuration alone.

The network is built without memory (fake tensors) and one row is passed through it: what autograd keeps is counted,
not modelled, layer by layer for each way of recomputing. From a budget follow the micro-batch, how much is computed
again in the backward pass, and whether the vision tower leaves the device while the decoder works. What cannot be
counted (the device's context, the buffers of a layer at work, what is lost between allocations) is an estimate, named
as one.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.config import RunConfig
from finetune.device import pick_device, pick_dtype
from finetune.lora import LoRAConfig, inject_lora
from model import PaliGemma, PaliGemmaConfig
from model.gemma import Sight

GIB = 2**30
CONTEXT = int(0.45 * GIB)  # estimate: the libraries' own memory, on a card the CUDA context
SPARE = 0.1  # estimate: share of what comes and goes in a step that is lost between allocations
ANSWER_TOKENS = 8  # assumed of the longest answer, where only the configuration is known
LAUNCH_TOKENS = 64  # estimate: a product costs as much as this many tokens before the first one is computed


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a step is cut into micro-batches, what is computed again, where the vision tower is meanwhile."""

    micro_batch: int
    recompute_layers: int = 0
    recompute_gate_up: bool = False
    vision_leaves: bool = False

    def __str__(self) -> str:
        again = f"the first {self.recompute_layers} layers" if self.recompute_layers else "nothing"
        again = "gate and up" if self.recompute_gate_up else again
        away = "; the vision tower leaves the device while the decoder works" if self.vision_leaves else ""
        return f"micro-batches of {self.micro_batch}, computing {again} again{away}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by component in a mode, and the budget they were planned for."""

    mode: Mode
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
    """Bytes that one row keeps from its forward to its backward pass: per decoder layer for each way of recomputing,
    and besides (vision tower, final norm).
    """

    layers: dict[str, list[int]]
    besides: int


class Planner:
    """The memory and the work of training steps, for one network adapted in one way.

    Args:
        config: the network's dimensions.
        lora: the adapters; None where all parameters are trained.
        dtype: of base weights and arithmetic.
        tokens: of the longest row, image and padding included.
        supervised: tokens that the longest answer has, `<eos>` included.
        batch_size: examples of a step.
        device: where it would run; on the CPU no weights can leave for elsewhere.
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
    ) -> None:
        self.config, self.dtype, self.tokens, self.supervised = config, dtype, tokens, supervised
        self.batch_size, self.device = batch_size, device
        with FakeTensorMode():
            self.model = empty(config, dtype)
            if lora is not None:
                inject_lora(self.model, lora)
            self.model.train()
            towers = (self.model.vision_tower, self.model.multi_modal_projector)
            self.vision_trains = any(p.requires_grad for tower in towers for p in tower.parameters())
            self.kept = self.count_kept()
        self.trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        self.frozen = sum(p.nbytes for p in self.model.parameters()) - self.trained
        self.tower = sum(p.nbytes for p in self.model.vision_tower.parameters())

    def count_kept(self) -> Kept:
        decoder, layers, besides = self.model.language_model.model, {}, 0
        for name, how in (("nothing", {}), ("gate_up", {"gate_up": True}), ("layer", {"layers": 10**6})):
            decoder.set_recompute(**how)
            counted = kept_bytes(self.model, self.tokens, self.supervised, self.vision_trains)
            besides = counted.pop()
            layers[name] = counted
        return Kept(layers, besides)

    def activations(self, mode: Mode) -> int:
        """Bytes that the graph of one micro-batch keeps from its forward to its backward pass, logits aside."""
        again, rest = mode.recompute_layers, "gate_up" if mode.recompute_gate_up else "nothing"
        layers = self.kept.layers["layer"][:again] + self.kept.layers[rest][again:]
        return mode.micro_batch * (sum(layers) + self.kept.besides)

    def plan(self, mode: Mode, budget: int) -> Plan:
        """What a mode takes, by component."""
        rows, e = mode.micro_batch, self.dtype.itemsize
        text, vision = self.config.text, self.config.vision
        # One layer at work in the backward pass: gradients of gate, up and their product, the two made again; and all
        # that a recomputed layer keeps for that moment.
        workspace = rows * self.tokens * 5 * text.intermediate_size * e
        if mode.recompute_layers:
            workspace += rows * max(self.kept.layers["nothing"])
        elif mode.recompute_gate_up:
            workspace += rows * self.tokens * 2 * text.intermediate_size * e
        decoder = {
            "activations": self.activations(mode),
            "logits": rows * self.supervised * text.vocab_size * (2 * e + 8),  # in e and fp32, with their gradients
            "buffers of a layer (estimate)": workspace,
        }
        tower_at_work = rows * vision.num_patches * (2 * vision.intermediate_size + 6 * vision.hidden_size) * e
        # Pictures are encoded first; then the decoder works, with or without the tower beside it.
        before = self.tower + tower_at_work if mode.vision_leaves else tower_at_work
        decoder["vision phase beyond that"] = max(0, before - sum(decoder.values()))
        image_tokens = 0 if self.vision_trains else self.batch_size * vision.num_patches * text.hidden_size * e
        components = {
            "base weights": self.frozen - self.tower * mode.vision_leaves,
            "trained weights": self.trained,
            "gradients": self.trained,
            "optimizer": 2 * self.trained,
            "image tokens of a step": image_tokens,
            **decoder,
            "between allocations (estimate)": int(SPARE * sum(decoder.values())),
            "context (estimate)": CONTEXT,
        }
        return Plan(mode, components, budget)

    def choose(self, budget: int, micro_batch: int | None = None, recompute: tuple[int, bool] | None = None) -> Plan:
        """The fastest mode within `budget` bytes; where none fits the leanest, whose `fits` is False.

        micro_batch, recompute (layers, gate and up): taken as given, where they are.
        """
        best: tuple[float, int, Plan] | None = None
        leanest: Plan | None = None
        for mode in self.modes(micro_batch, recompute):
            plan = self.plan(mode, budget)
            if leanest is None or plan.total < leanest.total:
                leanest = plan
            if plan.fits and (best is None or (self.work(mode), plan.total) < best[:2]):
                best = (self.work(mode), plan.total, plan)
        assert leanest is not None, "there is at least one mode"
        return best[2] if best else leanest

    def modes(self, micro_batch: int | None, recompute: tuple[int, bool] | None) -> Iterator[Mode]:
        ways = [(layers, False) for layers in range(self.config.text.num_hidden_layers + 1)] + [(0, True)]
        for rows in [micro_batch] if micro_batch else range(1, self.batch_size + 1):
            for layers, gate_up in [recompute] if recompute else ways:
                for leaves in (False, True) if self.device.type != "cpu" and not self.vision_trains else (False,):
                    yield Mode(rows, layers, gate_up, leaves)

    def work(self, mode: Mode) -> float:
        """Relative time of an example: products, of those again, and what each micro-batch costs whatever its size.

        Of a layer computed again the last product, down, is left out; forward and backward pass cost the same, for
        frozen weights have no gradient.
        """
        text = self.config.text
        mlp = 3 * text.hidden_size * text.intermediate_size
        attention = 2 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
        layer = mlp * 2 / 3 + (0 if mode.recompute_gate_up else attention)
        again = (text.num_hidden_layers if mode.recompute_gate_up else mode.recompute_layers) * layer
        # A move of the tower there takes about as long as the decoder's work on one example.
        moves = 1 / self.batch_size if mode.vision_leaves else 0
        products = 2 * text.num_hidden_layers * (mlp + attention) * (1 + moves) + again
        return products * (1 + LAUNCH_TOKENS / (mode.micro_batch * self.tokens))


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
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    alive: list[Tensor] = []  # or an address could be met again
    kept, current = [0] * (len(decoder.layers) + 1), -1

    def count(tensor: Tensor, place: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(tensor)
            kept[place] += storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        count(tensor, current)
        return tensor

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal current
        current = places.get(module, -1)
        for sight in (value for value in inputs if isinstance(value, Sight)):
            for tensor in (sight.cos, sight.sin, sight.bias):
                count(tensor, -1)

    places = {layer: i for i, layer in enumerate(decoder.layers)}
    handles = [module.register_forward_pre_hook(enter) for module in (*decoder.layers, decoder.norm)]
    dtype = decoder.embed_tokens.weight.dtype
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.zeros(rows, tokens, config.text.hidden_size, dtype=dtype)
        if vision:
            side = config.vision.image_size
            images = model.encode_images(torch.zeros(rows, config.vision.num_channels, side, side, dtype=dtype))
            x = torch.cat((images, x[:, config.vision.num_patches :]), dim=1)
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
        positions = torch.arange(tokens).expand(rows, -1)
        used = torch.arange(supervised).expand(rows, -1)
        decoder(x, mask, positions, used=used)
    for handle in handles:
        handle.remove()
    return kept


def plan_run(run: RunConfig, config: PaliGemmaConfig) -> tuple[Planner, Plan, str]:
    """The plan of a run: planner, what it chose within what the configuration leaves open, and whose the budget is.

    Rows are taken at their longest, data.max_text_tokens, with answers of at most ANSWER_TOKENS.
    """
    device = pick_device(run.model.device)
    dtype, train = pick_dtype(run.model.dtype, device), run.train
    text = run.data.max_text_tokens
    tokens, supervised = config.vision.num_patches + 1 + text, min(ANSWER_TOKENS, text)
    planner = Planner(config, run.lora, dtype, tokens, supervised, train.batch_size, device)
    budget, whose = budget_of(device, run.memory.budget_gib)
    micro_batch = None if train.micro_batch == "auto" else train.micro_batch
    recompute = {"auto": None, "gate_up": (0, True)}.get(str(train.recompute), (train.recompute, False))
    return planner, planner.choose(budget, micro_batch, recompute), whose  # type: ignore[arg-type]


def budget_of(device: torch.device, budget_gib: float | None) -> tuple[int, str]:
    """Bytes that a run may take, and whose they are: as asked, or what is free now."""
    if budget_gib is not None:
        return int(budget_gib * GIB), "memory.budget_gib"
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + CONTEXT, f"free on {torch.cuda.get_device_name(device)}"
    import psutil

    return psutil.virtual_memory().available, "free in this machine's memory"


def spill_warning(device: torch.device) -> str | None:
    """What a person on Windows or WSL must know, or None."""
    if device.type == "cuda" and (platform.system() == "Windows" or "microsoft" in platform.release().lower()):
        return (
            "on Windows and WSL the driver moves what does not fit into host memory instead of failing, and training "
            "becomes many times slower: in the NVIDIA control panel set 'CUDA - Sysmem Fallback Policy' to 'Prefer No "
            "Sysmem Fallback', and keep memory.budget_gib below what is free"
        )
    return None
