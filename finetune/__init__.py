"""What changes the network: LoRA, adapters on disk, merging, training, evaluation."""

from finetune.adapter import load_adapter, save_adapter
from finetune.lora import LoRAConfig, LoRALinear, eject_lora, inject_lora
from finetune.merge import merge_lora

__all__ = ["LoRAConfig", "LoRALinear", "eject_lora", "inject_lora", "load_adapter", "merge_lora", "save_adapter"]
