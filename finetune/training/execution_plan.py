"""How a step is computed: what the plan before a run chooses, and the Trainer follows."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExecutionPlan:
    """How a step is cut into micro-batches, what is recomputed, where the vision tower is meanwhile."""

    micro_batch: int
    recompute_layers: int = 0
    offload_vision: bool = False

    def __str__(self) -> str:
        recomputed = f"the first {self.recompute_layers} layers" if self.recompute_layers else "nothing"
        away = "; the vision tower leaves the device while the decoder works" if self.offload_vision else ""
        return f"micro-batches of {self.micro_batch}, recomputing {recomputed}{away}"
