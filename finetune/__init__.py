"""Fine-tuning: LoRA, adapters on disk, merging, training, evaluation.

The names below are imported on first use, as PEP 562 describes: importing `finetune.cli` for `--help` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.adapters.merge import merge_lora
    from finetune.adapters.storage import load_adapter, save_adapter
    from finetune.lora.linear import LoRAConfig, LoRALinear, inject_lora, remove_lora

__all__ = ["LoRAConfig", "LoRALinear", "inject_lora", "load_adapter", "merge_lora", "remove_lora", "save_adapter"]

_MODULES = {
    "finetune.adapters.merge": ("merge_lora",),
    "finetune.adapters.storage": ("load_adapter", "save_adapter"),
    "finetune.lora.linear": ("LoRAConfig", "LoRALinear", "inject_lora", "remove_lora"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
