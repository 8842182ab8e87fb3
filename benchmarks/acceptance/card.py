"""The device under test, and all that is asked of CUDA itself: memory, a cap on it, host synchronisations, a profile.

On a CPU each call has a stand-in of the same form, so that the checks run there too: memory is that of the process, no
cap holds, and nothing synchronises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import side_by_side
from benchmarks.side_by_side import GIB
from finetune.system.device import pick_device

# Dense bf16 products with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets and architecture papers.
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090": 71,
    "RTX 3080": 59.5,
    "RTX 3070": 40.6,
}
ROOM = 3  # rows
VARIANTS = re.compile(r"\b(Ti|SUPER|Laptop|Max-Q|D|NVL)\b", re.IGNORECASE)  # other cards than the table's
SYNC = re.compile(r"called a synchronizing (CUDA )?operation", re.IGNORECASE)  # torch's words for a warning
ATTENTION = re.compile(r"::_scaled_dot_product_(\w+?)(_backward)?$")  # an operator's name


@dataclasses.dataclass(frozen=True)
class Memory:
    """GiB: allocated by tensors, reserved by torch's allocator (each at its peak), and in use by the driver's count."""

    allocated: float
    reserved: float
    driver: float

    def highest(self, other: Memory) -> Memory:
        """Field by field."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Memory(*(max(pair) for pair in pairs))


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a piece of work did.

    Attributes:
        kernels: microseconds by kernel, the longest first; on a CPU by operator.
        launches: of kernels. attention: which implementations of attention were called.
        seconds: from the first kernel's beginning to the last one's end. busy: the share of it in which one ran.
    """

    kernels: dict[str, float]
    launches: int
    attention: set[str]
    seconds: float
    busy: float


class Card:
    """Args: device: as `--device` says."""

    def __init__(self, device: str) -> None:
        self.device = pick_device(device)
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=self.device)  # the context, before anything is measured

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "CPU"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()

    # Memory.

    def memory(self) -> Memory:
        """Since the last `reset_peak`."""
        self.synchronize()
        peaks = side_by_side.peaks(self.device)
        if not self.is_cuda:
            return Memory(peaks["rss"], peaks["rss"], side_by_side.status_gib("VmRSS"))
        free, total = torch.cuda.mem_get_info(self.device)
        return Memory(peaks["allocated"], peaks["reserved"], (total - free) / GIB)

    def reset_peak(self) -> None:
        self.synchronize()
        side_by_side.reset_peak(self.device)

    @contextlib.contextmanager
    def capped(self, gib: float) -> Iterator[None]:
        """Within this context torch's allocator has so much memory only."""
        if not self.is_cuda:
            yield
            return
        self.empty_cache()
        side_by_side.cap_memory(gib, self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def allocated(self) -> float:
        """GiB of tensors now; on a CPU of the process."""
        return torch.cuda.memory_allocated(self.device) / GIB if self.is_cuda else side_by_side.status_gib("VmRSS")

    def require_room(self, rows: int) -> None:
        """On a CPU, the end of memory for batches above ROOM rows; a GPU finds its own."""
        if not self.is_cuda and rows > ROOM:
            raise torch.OutOfMemoryError(f"{rows} rows where {ROOM} are played to fit")

    @contextlib.contextmanager
    def little_room(self, decoder: nn.Module) -> Iterator[None]:
        """On a CPU, a decoder that finds no room for more than ROOM rows; on a GPU the cap sees to that."""
        hook = decoder.register_forward_pre_hook(lambda _, inputs: self.require_room(len(inputs[0])))
        try:
            yield
        finally:
            hook.remove()

    # Synchronisations.

    @contextlib.contextmanager
    def synchronisations(self) -> Iterator[Counter[str]]:
        """Counts, by source line, the calls in this context that made the host wait for the GPU."""
        counted: Counter[str] = Counter()
        before = torch.cuda.get_sync_debug_mode() if self.is_cuda else 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.is_cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield counted
            finally:
                if self.is_cuda:
                    torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if SYNC.search(str(warning.message)):
                counted[f"{shortened(warning.filename)}:{warning.lineno}"] += 1

    # A profile.

    def profile(self, work: Callable[[], object]) -> Profile:
        """What one run of some work does; `work` has run before."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])]
        self.synchronize()
        with profile(activities=activities) as profiler:
            work()
            self.synchronize()
        events = profiler.events()
        assert events is not None, "the profiler ran"
        on_card = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        ran = on_card if self.is_cuda else [e for e in events if not e.cpu_parent and e.name.startswith("aten::")]
        kernels: Counter[str] = Counter()
        for event in ran:
            kernels[event.name] += event.time_range.elapsed_us()
        intervals = sorted((event.time_range.start, event.time_range.end) for event in ran)
        busy = covered(intervals)
        whole = max(end for _, end in intervals) - intervals[0][0] if intervals else 0
        launches = sum("LaunchKernel" in event.name for event in events) if self.is_cuda else len(ran)
        attention = {found[1] for event in events if (found := ATTENTION.search(event.name))}
        return Profile(dict(kernels.most_common()), launches, attention, whole / 1e6, busy / whole if whole else 0.0)

    # Speed.

    def peak_flops(self) -> tuple[float, str]:
        """FLOP/s of dense bf16 products, and whose word that is; measured where the table does not know the card."""
        known = next((key for key in PEAKS if key in self.name), None)
        if known and not VARIANTS.search(self.name.replace(known, "")):
            return PEAKS[known] * 1e12, f"data sheet of {known}"
        return self.measured_flops(torch.bfloat16), "a large product, measured"

    def measured_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large product."""
        size = 8192 if self.is_cuda else 256
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        work: Callable[[], Tensor] = lambda: torch.mm(a, b, out=product)  # noqa: E731
        side_by_side.timed(work, 3, self.device)
        return 2 * size**3 / side_by_side.timed(work, 10, self.device)


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of sorted intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in intervals:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def shortened(filename: str) -> str:
    """A source file's path, from the checkout or from site-packages on."""
    path = Path(filename)
    if path.is_relative_to(side_by_side.ROOT) and "site-packages" not in path.parts:
        return str(path.relative_to(side_by_side.ROOT))
    return filename.rpartition("site-packages/")[2]


def facts(card: Card) -> dict[str, Any]:
    """The machine, for the head of a report."""
    found: dict[str, Any] = {"machine": side_by_side.machine(), "device": card.name}
    if card.is_cuda:
        properties = torch.cuda.get_device_properties(card.device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / GIB,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found
