"""What changes the network: LoRA, adapters on disk, merging, training, evaluation."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.adapters.merge import merge_lora as merge_lora
    from finetune.adapters.storage import load_adapter as load_adapter
    from finetune.adapters.storage import save_adapter as save_adapter
    from finetune.lora.config import LoRAConfig as LoRAConfig
    from finetune.lora.linear import LoRALinear as LoRALinear
    from finetune.lora.linear import inject_lora as inject_lora
    from finetune.lora.linear import remove_lora as remove_lora

# Imported when they are asked for: a script's --help needs no torch.
_MODULES = {
    "LoRAConfig": "finetune.lora.config",
    "LoRALinear": "finetune.lora.linear",
    "inject_lora": "finetune.lora.linear",
    "load_adapter": "finetune.adapters.storage",
    "merge_lora": "finetune.adapters.merge",
    "remove_lora": "finetune.lora.linear",
    "save_adapter": "finetune.adapters.storage",
}
__all__ = list(_MODULES)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)
