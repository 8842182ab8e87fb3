"""What changes the network: LoRA, adapters on disk, merging, training, evaluation."""

from finetune.adapters.merge import merge_lora
from finetune.adapters.storage import load_adapter, save_adapter
from finetune.lora.linear import LoRAConfig, LoRALinear, inject_lora, remove_lora

__all__ = ["LoRAConfig", "LoRALinear", "inject_lora", "load_adapter", "merge_lora", "remove_lora", "save_adapter"]
