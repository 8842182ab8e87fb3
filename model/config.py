"""The dimensions of a PaliGemma, and their form in a published `config.json`.

PaliGemma (arXiv 2407.07726) joins a SigLIP So400m vision tower (arXiv 2303.15343) and a Gemma decoder (arXiv
2403.08295). Field names are the published ones. Published configs leave out most fields, so the defaults below are part
of the file format. PaliGemma 2 (a Gemma 2 decoder) is not here; its configs are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TANH_GELU = "gelu_pytorch_tanh"
INSTEAD_OF_QUANTIZED = (
    "its weights can be neither trained on nor merged into here. Give the full-precision checkpoint it was made "
    "from{}, such as google/paligemma-3b-pt-224, and set model.quantize=nf4 to keep that one in four bits"
)
MAX_DIMENSION, MAX_LAYERS = 2**20, 2**10  # a corrupted config.json must not ask for more memory than there is


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower; the defaults are So400m/14 at 224 pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 224  # pixels, square
    patch_size: int = 14  # pixels, square
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        """Number of patches of one image, and so of its image tokens."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Gemma decoder; the defaults are those of PaliGemma 3B."""

    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257216  # rows of the embedding
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """The whole network. `from_hf` and `to_hf` translate the published form."""

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    image_token_id: int = 257152
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

    def __post_init__(self) -> None:
        vision, text = self.vision, self.text
        for place, values in (("vision_config", vision), ("text_config", text), ("the top level", self)):
            for field in dataclasses.fields(values):
                _require_sensible(place, field.name, getattr(values, field.name), field.default)
        for name, number, divisor in (
            ("vision hidden_size by num_attention_heads", vision.hidden_size, vision.num_attention_heads),
            ("text num_attention_heads by num_key_value_heads", text.num_attention_heads, text.num_key_value_heads),
            ("vision image_size by patch_size", vision.image_size, vision.patch_size),
            ("text head_dim by 2", text.head_dim, 2),
        ):
            if number % divisor:
                raise ValueError(f"config.json: {name} must divide evenly, got {number} by {divisor}")
        if self.image_token_id >= self.text.vocab_size:
            raise ValueError(
                f"config.json: image_token_index {self.image_token_id} has no row among the {self.text.vocab_size}"
            )

    @classmethod
    def from_directory(cls, directory: Path) -> PaliGemmaConfig:
        """Read `directory/config.json`. Raises ValueError where it is missing, no JSON, or not a PaliGemma's."""
        path = directory / "config.json"
        try:
            hf = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{directory} holds no config.json: expected a PaliGemma checkpoint directory") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        try:
            return cls.from_hf(hf)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a model configuration: {error}") from error

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> PaliGemmaConfig:
        """Read the published form (transformers 4.x or 5.x).

        Raises:
            ValueError: another architecture, or a setting this network does not implement.
        """
        vision, text = ({**(hf.get(f"{name}_config") or {})} for name in ("vision", "text"))
        _require({"model_type": None, **hf}, "the top level", "model_type", {"paligemma"})
        _refuse_quantized(hf.get("quantization_config") or text.get("quantization_config"), hf.get("_name_or_path"))
        _require(text, "text_config", "model_type", {"gemma"})
        _require(vision, "vision_config", "model_type", {"siglip_vision_model"})
        _require(vision, "vision_config", "hidden_act", {TANH_GELU})
        # "gelu" in old Gemma configs always meant the tanh approximation.
        _require(text, "text_config", "hidden_act", {TANH_GELU, "gelu"})
        _require(text, "text_config", "hidden_activation", {TANH_GELU, "gelu", None})
        _require(text, "text_config", "attention_bias", {False})
        # Unset means the same as True here: the prefix sees itself in both directions.
        _require(text, "text_config", "use_bidirectional_attention", {True, None})
        _require(hf, "the top level", "tie_word_embeddings", {True})
        _require(hf, "the top level", "projection_dim", {text.get("hidden_size", TextConfig.hidden_size), None})
        return cls(
            vision=VisionConfig(**_present(VisionConfig, vision)),
            text=TextConfig(**_present(TextConfig, text) | {"rope_theta": _rope_theta(text)}),
            image_token_id=hf.get("image_token_index", hf.get("image_token_id", cls.image_token_id)),
            **_present(cls, text | dict(hf), {"pad_token_id", "eos_token_id", "bos_token_id"}),
        )

    def to_hf(self, dtype: torch.dtype) -> dict[str, Any]:
        """The published form, every field written out, read alike by transformers 4.57 and 5.x.

        The dtype matters: a file that says float32 is loaded as float32 even where its tensors are bfloat16.
        """
        shared = {"torch_dtype": str(dtype).removeprefix("torch.")}
        tokens = {name: getattr(self, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
        vision = {"model_type": "siglip_vision_model", "hidden_act": TANH_GELU, "vision_use_head": False}
        vision["projection_dim"] = self.text.hidden_size
        text = {"model_type": "gemma", "hidden_act": TANH_GELU, "attention_bias": False, "tie_word_embeddings": True}
        text["num_image_tokens"] = self.vision.num_patches
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": self.image_token_id,
            "hidden_size": self.text.hidden_size,
            "projection_dim": self.text.hidden_size,
            "vocab_size": self.text.vocab_size,
            "tie_word_embeddings": True,
            **shared,
            **tokens,
            "vision_config": {**vision, **shared, **dataclasses.asdict(self.vision)},
            "text_config": {**text, **shared, **tokens, **dataclasses.asdict(self.text)},
        }


def _present(config: type, hf: Mapping[str, Any], names: set[str] | None = None) -> dict[str, Any]:
    names = names or {field.name for field in dataclasses.fields(config)}
    return {name: hf[name] for name in sorted(names) if hf.get(name) is not None}


def _require_sensible(where: str, key: str, value: Any, default: Any) -> None:
    """Of the default's kind: a whole number (tokens from 0 on, sizes from 1), or a finite one above 0."""
    if isinstance(default, int):
        least, most = int(not key.endswith("_token_id")), MAX_LAYERS if key == "num_hidden_layers" else MAX_DIMENSION
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"config.json: {key} at {where} is {value!r}; expected a whole number, {least} to {most}")
    elif isinstance(default, float) and (type(value) not in (int, float) or not 0 < value < math.inf):
        raise ValueError(f"config.json: {key} at {where} is {value!r}; expected a finite number above 0")


def _require(hf: Mapping[str, Any], where: str, key: str, allowed: set[Any]) -> None:
    if key in hf and hf[key] not in allowed:
        expected = " or ".join(sorted(repr(value) for value in allowed))
        raise ValueError(f"config.json: {key} at {where} is {hf[key]!r}; this network implements {expected} only")


def _refuse_quantized(settings: Any, origin: Any) -> None:
    """ValueError for a checkpoint whose weights are stored in fewer bits; says which, and what to take instead."""
    if not settings:
        return
    given = settings if isinstance(settings, Mapping) else {}
    method = given.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in given else "an unknown method")
    if given.get("load_in_4bit") or given.get("_load_in_4bit"):
        method = f"{method}, 4 bits, {given.get('bnb_4bit_quant_type', 'fp4')}"
    elif given.get("load_in_8bit") or given.get("_load_in_8bit"):
        method = f"{method}, int8"
    elif "bits" in given:
        method = f"{method}, {given['bits']} bits"
    named = f" ({origin})" if origin and isinstance(origin, str) else ""
    raise ValueError(f"config.json: this checkpoint is quantised ({method}); {INSTEAD_OF_QUANTIZED.format(named)}")


def _rope_theta(text: Mapping[str, Any]) -> Any:
    """`rope_theta` (4.x) or `rope_parameters` (5.x); only the plain rotary embedding exists here."""
    parameters = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rope type is {kind!r}; this network implements 'default' only")
    return parameters.get("rope_theta", text.get("rope_theta", TextConfig.rope_theta))
