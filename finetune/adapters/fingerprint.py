"""Which base an adapter belongs to: a digest of a few values of every weight, so that another base is noticed.

A merge moves every element of the linears it touches, so a base with an adapter merged into it is another one. Values
count in bf16 and by their names here: fp32 and bf16 files of one checkpoint, in any layout, are the same base. What
`convert` (model/convert.py) replaced counts with the values that the checkpoint has: interpolated ones would depend on
the dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from finetune.lora.nf4 import original_sample, sample_of
from finetune.lora.protocol import AdapterModule
from model.convert import CONNECTOR, POSITIONS

# What shapes do not tell of a configuration.
SETTINGS = {
    "vision": ("num_attention_heads", "layer_norm_eps"),
    "text": ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"),
}


def fingerprint(model: nn.Module) -> str | None:
    """64 hexadecimal digits: the same with adapters in place or not, in fp32 or bf16, of a base in NF4 or not. None
    for a model on the meta device, whose weights have no values.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    digest = hashlib.sha256()
    if (config := getattr(model, "config", None)) is not None:
        for section, names in SETTINGS.items():
            values = {name: getattr(getattr(config, section), name) for name in names}
            digest.update(f"{section} {values}\n".encode())
    for name, shape, sample in sorted(base_weights(model), key=lambda weight: weight[0]):
        digest.update(f"{name} {shape}\n".encode())
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape and some values of every weight of the base, also where an adapter stands in its place."""
    replaced: dict[str, Tensor] = getattr(model, "replaced", {})
    for name, value in replaced.items():
        yield name, tuple(value.shape), sample_of(value)
    gone = tuple({place for place in (POSITIONS, CONNECTOR) if any(name.startswith(place) for name in replaced)})
    for path, module in model.named_modules():
        if f"{path}.".startswith(gone):
            continue
        base = module.base_module() if isinstance(module, AdapterModule) else module
        for name, parameter in base.named_parameters(recurse=False):
            shape, sample = tuple(parameter.shape), original_sample(base)
            if name == "weight" and isinstance(base, nn.Linear) and sample is not None:
                yield f"{path}.{name}", (base.out_features, base.in_features), sample
            else:
                yield f"{path}.{name}", shape, sample_of(parameter)
