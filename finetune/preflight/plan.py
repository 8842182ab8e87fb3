"""What a step takes in memory and work, planned before anything is loaded: from dimensions and configuration alone.

What is counted comes from count.py. From a budget follow the micro-batch, how many layers are recomputed in the
backward pass, and whether the vision encoder leaves the device while the decoder works. What cannot be counted (the
device's context, the buffers of a layer at work, fragmentation) is an estimate, named as one. Not here: how long it
takes (probe.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.lora.nf4 import decoder_linears, packed_bytes
from finetune.preflight.count import TERA, count_flops, empty_model, saved_activations
from finetune.system.allocator import cublas_workspaces, expandable_segments, reserved_bytes
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.step_inputs import frozen_shapes, is_trained
from model import PaliGemmaConfig
from model.ops.bf16_on_cpu import native_products

GIB = 2**30
CONTEXT = int(0.45 * GIB)  # estimate: the libraries' own memory, on a card the CUDA context
# Estimates: fragmentation, as a share of what a step allocates and frees, in segments that expand or do not.
FRAGMENTATION, FRAGMENTATION_FIXED = 0.1, 0.2
LAUNCH_TOKENS = 64  # estimate: a product costs as much as this many tokens before the first one is computed


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by component of an execution plan, and the budget they were planned for."""

    execution: ExecutionPlan
    components: dict[str, int]
    budget: int

    @property
    def total(self) -> int:
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.budget


class Planner:
    """Memory and FLOPs of training steps, for one network adapted in one way.

    Args:
        config: the network's dimensions.
        lora: the adapters; None where all parameters are trained.
        dtype: of base weights and arithmetic.
        tokens: of the longest row, image and padding included.
        supervised: the most tokens that a row's answer has, `<eos>` included; of several answers all together. The
            first tokens of those share the position that predicts them, which the last layer is counted for each.
        batch_size: examples of a step, or of a process's share of it.
        device: where it would run; on the CPU there is no host memory to move weights to.
        quantize: how the decoder's frozen linears are stored: "nf4", or None for `dtype`.
        answer: tokens that the longest single answer has, of which an evaluation has one a row; None: `supervised`.

    Attributes:
        keeps_reference: whether what is trained is kept a second time, as it was at the start.
        samples: answers that the network draws for each row before a step, those that the row then has; 0: none.
    """

    keeps_reference, samples = False, 0

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
        answer: int | None = None,
    ) -> None:
        self.config, self.lora, self.dtype = config, lora, dtype
        self.tokens, self.supervised = tokens, supervised
        self.answer = supervised if answer is None else answer
        self.batch_size, self.device = batch_size, device
        with FakeTensorMode(), nullcontext() if device.type == "cpu" else native_products():
            self.model = empty_model(config, dtype)
            self.model.language_model.model.fold_heads = device.type == "cpu"  # as in the run
            linears = [linear.weight for linear in decoder_linears(self.model).values()]
            if lora is not None:
                inject_lora(self.model, lora)
            self.model.train()
            self.tower_trains = is_trained(self.model.vision_tower)
            self.vision_trains = self.tower_trains or is_trained(self.model.multi_modal_projector)
            self.saved = saved_activations(self.model, tokens, supervised, self.vision_trains)
        self.flops = count_flops(config, lora, self.vision_trains, tokens, supervised)
        self.trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        self.frozen = sum(p.nbytes for p in self.model.parameters()) - self.trained
        self.vision = sum(p.nbytes for p in self.model.vision_tower.parameters())
        self.dequantized = 0  # bytes of the largest weight that is dequantized for a product
        self.gathered = 0  # bytes of sharded layers that are whole at a time
        self.sizes = {name: p.nbytes for name, p in self.model.named_parameters()}
        if quantize:
            packed = {id(weight): packed_bytes(weight.numel()) for weight in linears}
            self.sizes |= {name: packed[id(p)] for name, p in self.model.named_parameters() if id(p) in packed}
            self.frozen -= sum(weight.nbytes - packed_bytes(weight.numel()) for weight in linears)
            self.dequantized = max(weight.nbytes for weight in linears)

    def shard_decoder(self, count: int) -> None:
        """Plan for one of `count` processes that share the decoder's layers: it holds a shard of each, and two layers
        whole: the one at work, and the one that is gathered meanwhile.
        """
        layers = "language_model.model.layers."
        for name, parameter in self.model.named_parameters():
            if name.startswith(layers):
                others_hold = self.sizes[name] - math.ceil(self.sizes[name] / count)
                self.sizes[name] -= others_hold
                self.trained -= others_hold * parameter.requires_grad
                self.frozen -= others_hold * (not parameter.requires_grad)
        decoder = self.model.language_model.model
        self.gathered = 2 * max(sum(p.nbytes for p in layer.parameters()) for layer in decoder.layers)

    def activations(self, execution: ExecutionPlan) -> int:
        """Bytes that one micro-batch saves in its forward pass for its backward pass, without the logits."""
        layers = self.saved.by_layer(execution.recompute_layers)
        return execution.micro_batch * (sum(layers) + self.saved.other) + self.saved.once

    def rounding(self, offload_vision: bool) -> int:
        """Bytes by which the segments of weights, gradients and optimizer state exceed them, on a card."""
        if self.device.type != "cuda":
            return 0
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        stays = {n: size for n, size in self.sizes.items() if not (offload_vision and n.startswith("vision_tower."))}
        sizes = [*stays.values(), *(self.sizes[name] for name in trained for _ in range(3))]
        return reserved_bytes(sizes, expandable_segments()) - sum(sizes)

    @property
    def encoding(self) -> int:
        """Bytes at work while the vision tower encodes one image, with its tiles, without a graph (an estimate)."""
        vision = self.config.vision
        width = 2 * vision.intermediate_size + 6 * vision.hidden_size
        return self.config.views * vision.num_patches * width * self.dtype.itemsize

    def attention_backward(self, positions: int) -> int:
        """Bytes of the gradients of q, k and v of all heads, and of the fp32 sums of them in CUDA's kernels."""
        text = self.config.text
        return 3 * positions * text.num_attention_heads * text.head_dim * (self.dtype.itemsize + 4)

    def evaluation(self, batch_size: int, new_tokens: int) -> int:
        """Bytes that an evaluation during training takes, which answers `batch_size` questions of the longest length at
        once with `new_tokens` tokens each.
        """
        text, e = self.config.text, self.dtype.itemsize
        logits = max(1, self.answer) * text.vocab_size * (e + 8)  # the loss's; generation has those of one token
        row = max(self.encoding, self.tokens * self.prefill + logits) + self.slot * (self.tokens + new_tokens)
        row += 2 * self.config.num_image_tokens * text.hidden_size * e  # image tokens, and those of the rows
        activations = int((1 + self.fragmentation) * batch_size * row) + self.dequantized + self.gathered
        on_card = cublas_workspaces(self.device) if self.device.type == "cuda" else 0
        kept = (5 if self.keeps_reference else 4) * self.trained
        return self.frozen + kept + self.rounding(False) + activations + on_card + CONTEXT

    @property
    def prefill(self) -> int:
        """Bytes at work for each token of a prompt, without a graph (an estimate)."""
        return (3 * self.config.text.intermediate_size + 6 * self.config.text.hidden_size) * self.dtype.itemsize

    @property
    def slot(self) -> int:
        """Bytes of a token in the cache."""
        text = self.config.text
        return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * self.dtype.itemsize

    def sampling(self, prompts: int) -> int:
        """Bytes at work while the answers to so many prompts are drawn together (an estimate): in the prefill, while
        the cache is repeated for each answer, or with the logits of a token of each, which are copied into fp32, and
        their probabilities and the sums of these in fp64.
        """
        prompt = self.tokens - self.supervised
        rows, slots = prompts * self.samples, prompt + self.supervised // self.samples
        before, cache = (count * slots * self.slot for count in (prompts, rows))
        logits = rows * self.config.text.vocab_size * (self.dtype.itemsize + 4 + 2 * 8)
        return max(before + prompts * prompt * self.prefill, before + cache, cache + logits)

    def evaluation_batch(self, batch_size: int, new_tokens: int, budget: int) -> int:
        """The most questions at once, `batch_size` at most, whose evaluation is within `budget`; 1 where none is."""
        fits = (size for size in range(batch_size, 1, -1) if self.evaluation(size, new_tokens) <= budget)
        return next(fits, 1)

    @property
    def fragmentation(self) -> float:
        """Share of what a step allocates and frees that the allocator cannot use (an estimate)."""
        return FRAGMENTATION if self.device.type != "cuda" or expandable_segments() else FRAGMENTATION_FIXED

    def backward_peak(self, execution: ExecutionPlan, gradients: Callable[[int], int]) -> int:
        """The most bytes in use while a micro-batch's backward pass is in a decoder layer: what that layer and those
        before it have saved, what it recomputes, and its gradients.

        gradients: bytes of a row's gradients, by its number of positions.
        """
        all_saved, saved = self.saved.layers, self.saved.by_layer(execution.recompute_layers)
        norms = 2 * self.config.text.hidden_size * self.dtype.itemsize  # outputs of a position, saved when recomputed
        peak, before = 0, 0
        for layer, (size, size_of_all) in enumerate(zip(saved, all_saved, strict=True)):
            positions = self.tokens if layer < len(saved) - 1 else self.supervised
            recomputed = size_of_all - size + positions * norms if size < size_of_all else 0
            before += size
            peak = max(peak, before + recomputed + gradients(positions))
        return execution.micro_batch * (self.saved.other + peak) + self.saved.once + self.dequantized + self.gathered

    def mlp_backward(self, positions: int) -> int:
        """Bytes of the gradients of gate, up and their product (on a CPU in bf16, these may be summed in fp32), and of
        the layer's input and output (an estimate).
        """
        widths = 5 if self.device.type == "cpu" and self.dtype == torch.bfloat16 else 3
        text = self.config.text
        return positions * (widths * text.intermediate_size + 2 * text.hidden_size) * self.dtype.itemsize

    def plan(self, execution: ExecutionPlan, budget: int) -> Plan:
        """What an execution plan takes, by component."""
        shapes = frozen_shapes(self.config, self.model.multi_modal_projector.groups, not self.vision_trains)
        of_an_image = sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize
        step = self.activation_components(execution)
        components = {
            "base weights": self.frozen - self.vision * execution.offload_vision,
            "trained weights": self.trained,
            "gradients": self.trained,
            "optimizer state": 2 * self.trained,
            **({"reference's adapter": self.trained} if self.keeps_reference else {}),
            "image features of a step": 0 if self.tower_trains else self.batch_size * of_an_image,
            **step,
            "fragmentation (estimate)": int(self.fragmentation * sum(step.values())),
            "context (estimate)": CONTEXT,
        }
        if self.device.type == "cuda":
            components["weights rounded to segments"] = self.rounding(execution.offload_vision)
            components["cuBLAS workspaces (estimate)"] = cublas_workspaces(self.device)
        return Plan(execution, components, budget)

    def activation_components(self, execution: ExecutionPlan) -> dict[str, int]:
        """What a micro-batch allocates and frees; the later ones are what a later phase takes above those before."""
        rows, text = execution.micro_batch, self.config.text
        # Of a logit three numbers in fp32: its log-probability, and the gradients of that and of itself.
        found = {"activations": self.activations(execution), "logits": rows * self.supervised * text.vocab_size * 12}
        # The backward pass frees the logits before it enters the layers, and what a layer has saved before it enters
        # the next; within a layer, the MLP and attention come one after the other.
        phases = {"buffers of a layer's backward (estimate)": self.mlp_backward}
        if self.device.type == "cuda":
            phases["attention's backward above that (estimate)"] = self.attention_backward
        for name, gradients in phases.items():
            found[name] = max(0, self.backward_peak(execution, gradients) - sum(found.values()))
        # Images are encoded first; then the decoder works, with or without the vision encoder on the device.
        vision_phase = rows * self.encoding + self.vision * execution.offload_vision
        found["vision phase above that"] = max(0, vision_phase - sum(found.values()))
        if self.samples:
            found["drawing answers above that (estimate)"] = max(0, self.sampling(rows) - sum(found.values()))
        return found

    def choose(self, budget: int, micro_batch: int | None = None, recompute: int | None = None) -> Plan:
        """The fastest plan within `budget` bytes; where none fits the smallest, whose `fits` is False.

        micro_batch, recompute (number of layers): used as given; None leaves them open.
        """
        best: tuple[float, int, Plan] | None = None
        smallest: Plan | None = None
        for execution in self.candidates(micro_batch, recompute):
            plan = self.plan(execution, budget)
            if smallest is None or plan.total < smallest.total:
                smallest = plan
            if plan.fits and (best is None or (self.cost(execution), plan.total) < best[:2]):
                best = (self.cost(execution), plan.total, plan)
        assert smallest is not None, "there is at least one execution plan"
        return best[2] if best else smallest

    def candidates(self, micro_batch: int | None, recompute: int | None) -> Iterator[ExecutionPlan]:
        """Every execution plan that the given numbers leave open."""
        numbers = range(self.config.text.num_hidden_layers + 1) if recompute is None else [recompute]
        for rows in [micro_batch] if micro_batch else range(1, self.batch_size + 1):
            for layers in numbers:
                for offload in (False, True) if self.device.type != "cpu" and not self.tower_trains else (False,):
                    yield ExecutionPlan(rows, layers, offload)

    def tflop(self, execution: ExecutionPlan, images: float = 1.0) -> float:
        """TFLOP (10^12 floating-point operations) of an example in training, forward and backward.

        images: encoded for one example; below 1 where examples of a step share images.
        """
        return self.flops.tera(execution, images)

    def tflop_of_length(self, execution: ExecutionPlan, tokens: int, supervised: int, images: float = 1.0) -> float:
        """As `tflop`, in rows of another length, with answers of another length."""
        return count_flops(self.config, self.lora, self.vision_trains, tokens, supervised).tera(execution, images)

    def cost(self, execution: ExecutionPlan) -> float:
        """Time of an example, in TFLOP: its work, what every micro-batch costs at any size, and the moves of the vision
        encoder, each about as long as the decoder's work on one example.
        """
        launches = 1 + LAUNCH_TOKENS / (execution.micro_batch * self.tokens)
        moves = self.flops.row / TERA / self.batch_size if execution.offload_vision else 0
        return (self.tflop(execution) + moves) * launches
