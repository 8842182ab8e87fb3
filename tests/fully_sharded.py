"""Two processes on the CPU that share the decoder's layers: run by tests/lora/test_sharding.py.

python -m tests.fully_sharded FILE: the loss, what each process holds, and whether loss and gradients are those of one
process, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from finetune import LoRAConfig, inject_lora
from finetune.lora.protocol import adapters, set_dropout_seeds, trained_parameters
from finetune.system import sharding
from model import PaliGemma, PaliGemmaConfig
from tests import tiny

PROCESSES = 2


def adapted(dtype: torch.dtype) -> PaliGemma:
    """In fp64, or in bf16 with adapters in fp32: in every linear of the decoder, off their start; a norm in full."""
    model = PaliGemma(PaliGemmaConfig.from_hf(tiny.CONFIG))
    tiny.randomize(model)
    model.to(dtype)
    inject_lora(model, LoRAConfig(rank=4, dropout=0.2, targets=("language.*",), modules_to_save=("language.norm",)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    set_dropout_seeds(model, torch.arange(3, dtype=torch.int32))
    model.language_model.model.set_recompute(layers=1)
    return (model.double() if dtype == torch.float64 else model).train()


def loss_and_gradients(model: PaliGemma) -> tuple[Tensor, dict[str, Tensor]]:
    batch = tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in trained_parameters(model).items() if p.grad is not None}
    return loss.detach(), gradients


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(module: nn.Module) -> int:
    """Bytes of parameters that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in module.parameters())


def run(rank: int, file: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    found = [compared(dtype) for dtype in (torch.float64, torch.bfloat16)]
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, found)
    if rank == 0:
        Path(file).write_text(json.dumps([one for process in everyone for one in process]))
    # The process ends here, without Python's own end: a thread of gloo's may be about to free a tensor that Python
    # knows, and one that does so while Python ends takes the process with it (std::terminate).
    os._exit(0)


def compared(dtype: torch.dtype) -> dict[str, float | bool]:
    expected_loss, expected = loss_and_gradients(adapted(dtype))
    model = adapted(dtype)
    layers = model.language_model.model.layers
    before, weights = held(layers), [weakref.ref(parameter) for parameter in layers.parameters()]
    sharding.shard(model.language_model.model, layers, torch.device("cpu"))
    gc.collect()
    loss, gradients = loss_and_gradients(model)
    summed = {name for name, parameter in trained_parameters(layers).items() if isinstance(parameter, DTensor)}
    gradients |= {name: gradients[name] / PROCESSES for name in gradients if name.partition("layers.")[2] in summed}
    sharded = all(isinstance(p, DTensor) for _, a in adapters(layers) for p in a.parameters())
    same = expected.keys() == gradients.keys() and all(
        torch.allclose(gradients[name], expected[name], rtol=1e-10, atol=1e-12) for name in expected
    )
    return {
        "share": held(layers) / before,
        "sharded": sharded,
        "whole": sum(weight() is not None for weight in weights),
        "loss": abs(float(loss / expected_loss - 1)),
        "gradients": same,
        "trained": len(gradients),
    }


def main(argv: Sequence[str]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29511")}
    torch.set_num_threads(1)  # no threads in this process: it forks
    start_processes(run, (argv[0],), nprocs=PROCESSES, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1:])
