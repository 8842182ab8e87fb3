"""What changes the network: LoRA, adapters on disk, merging, training, evaluation."""

from finetune.adapter import load_adapter, save_adapter
from finetune.lora import LoRAConfig, LoRALinear, inject_lora, remove_lora
from finetune.merge import merge_lora

__all__ = ["LoRAConfig", "LoRALinear", "inject_lora", "load_adapter", "merge_lora", "remove_lora", "save_adapter"]
