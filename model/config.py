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
CONNECTORS = ("linear", "mlp", "dense_sci", "dense_dci", "resampler", "pixel_shuffle")
# model_type of what PaliGemma as published cannot express, so that no other library opens it as one.
OWN_MODEL_TYPE = "paligemma-lora"


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
        """Number of patches of one image, or of one of its tiles."""
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
class ConnectorConfig:
    """Which connector (model/connectors.py), and how one that replaces the published projector starts."""

    kind: str = "linear"
    """One of CONNECTORS."""
    latents: int = 64
    """resampler: learned queries, and so image tokens of one image."""
    depth: int = 3
    """resampler: layers."""
    factor: int = 2
    """pixel_shuffle: a square of factor x factor patches becomes one token."""
    start: str = "pretrained"
    """pretrained: from the projector that was there; random: all of it is drawn."""
    seed: int = 0
    """Of what is drawn; 0 where nothing is."""

    def __post_init__(self) -> None:
        if self.kind not in CONNECTORS:
            raise ValueError(f"connector {self.kind!r} is not known here; expected {', '.join(CONNECTORS)}")
        if self.start not in ("pretrained", "random"):
            raise ValueError(f"a connector starts from pretrained or random, not from {self.start!r}")
        for name, most in (
            ("latents", MAX_DIMENSION),
            ("depth", MAX_LAYERS),
            ("factor", MAX_DIMENSION),
            ("seed", 2**32),
        ):
            value = getattr(self, name)
            if type(value) is not int or not int(name != "seed") <= value <= most:
                raise ValueError(f"{name} of the connector is {value!r}; expected a whole number, at most {most}")
        if self.start == "pretrained" and self.kind != "resampler":
            object.__setattr__(self, "seed", 0)  # nothing is drawn

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ConnectorConfig:
        """Raises ValueError for a key or value that is not known."""
        if unknown := given.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"connector: {', '.join(sorted(map(str, unknown)))} is not known here")
        return cls(**given)

    def num_tokens(self, num_patches: int) -> int:
        """Image tokens of an image of so many patches."""
        return {"resampler": self.latents, "pixel_shuffle": num_patches // self.factor**2}.get(self.kind, num_patches)

    def require_fit(self, vision: VisionConfig) -> None:
        """ValueError where the connector cannot be put behind such a vision tower."""
        side = vision.image_size // vision.patch_size
        if self.kind == "pixel_shuffle" and side % self.factor:
            raise ValueError(
                f"pixel_shuffle with factor {self.factor} does not fit: an image of {vision.image_size} pixels has "
                f"{side} x {side} patches, and {side} is not divisible by {self.factor}; take a factor that divides "
                "it, or images of another size"
            )
        if self.kind.startswith("dense_") and vision.num_hidden_layers < 3:
            raise ValueError(
                f"{self.kind} does not fit: it takes hidden states of two groups of layers, and the vision tower has "
                f"{vision.num_hidden_layers} layers; expected 3 or more, or another connector, such as mlp"
            )


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """The whole network. `from_hf` and `to_hf` translate the published form."""

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    connector: ConnectorConfig = dataclasses.field(default_factory=ConnectorConfig)
    tiles: int = 1
    """1: an image is encoded whole; 4: its four quarters, and the whole after them (Idefics2, arXiv 2405.02246)."""
    aspect: str = "squash"
    """How an image becomes square: squash, as published, or pad, with grey."""
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
        if self.tiles not in (1, 4) or self.aspect not in ("squash", "pad"):
            raise ValueError(
                f"config.json: tiles {self.tiles!r}, aspect {self.aspect!r}; expected 1 or 4, squash or pad"
            )
        self.connector.require_fit(vision)
        if self.image_token_id >= self.text.vocab_size:
            raise ValueError(
                f"config.json: image_token_index {self.image_token_id} has no row among the {self.text.vocab_size}"
            )

    @property
    def views(self) -> int:
        """How often the vision tower runs for one image: once, or for its tiles and the whole image."""
        return self.tiles + 1 if self.tiles > 1 else 1

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of a row."""
        return self.views * self.connector.num_tokens(self.vision.num_patches)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Of the pixels of one image: [3, H, W], with tiles [5, 3, H, W]."""
        side = self.vision.image_size
        return (*((self.views,) if self.views > 1 else ()), self.vision.num_channels, side, side)

    @property
    def is_published(self) -> bool:
        """Whether the published architecture can express this network: then `transformers` opens it, too."""
        return (self.connector.kind, self.tiles, self.aspect) == ("linear", 1, "squash")

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
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix('config.json: ')}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a model configuration: {error}") from error

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> PaliGemmaConfig:
        """Read the published form (transformers 4.x or 5.x).

        Raises:
            ValueError: another architecture, or a setting this network does not implement.
        """
        vision, text = ({**(hf.get(f"{name}_config") or {})} for name in ("vision", "text"))
        _require({"model_type": None, **hf}, "the top level", "model_type", {"paligemma", OWN_MODEL_TYPE})
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
        config = cls(
            vision=VisionConfig(**_present(VisionConfig, vision)),
            text=TextConfig(**_present(TextConfig, text) | {"rope_theta": _rope_theta(text)}),
            connector=ConnectorConfig.from_dict(hf.get("connector") or {}),
            **_present(cls, hf, {"tiles", "aspect"}),
            image_token_id=hf.get("image_token_index", hf.get("image_token_id", cls.image_token_id)),
            **_present(cls, text | dict(hf), {"pad_token_id", "eos_token_id", "bos_token_id"}),
        )
        if not config.is_published:  # the processor reads the number, and cannot work it out
            _require(text, "text_config", "num_image_tokens", {config.num_image_tokens})
        return config

    def to_hf(self, dtype: torch.dtype) -> dict[str, Any]:
        """The published form, every field written out, read alike by transformers 4.57 and 5.x.

        The dtype matters: a file that says float32 is loaded as float32 even where its tensors are bfloat16.
        """
        shared = {"torch_dtype": str(dtype).removeprefix("torch.")}
        tokens = {name: getattr(self, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
        vision = {"model_type": "siglip_vision_model", "hidden_act": TANH_GELU, "vision_use_head": False}
        vision["projection_dim"] = self.text.hidden_size
        text = {"model_type": "gemma", "hidden_act": TANH_GELU, "attention_bias": False, "tie_word_embeddings": True}
        text["num_image_tokens"] = self.num_image_tokens
        return {
            **({} if self.is_published else self._own_keys()),
            "architectures": ["PaliGemmaForConditionalGeneration" if self.is_published else "PaliGemma"],
            "model_type": "paligemma" if self.is_published else OWN_MODEL_TYPE,
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

    def _own_keys(self) -> dict[str, Any]:
        """What the published form has no keys for."""
        connector = {name: getattr(self.connector, name) for name in ("kind", "latents", "depth", "factor")}
        return {
            "opens_in": "this toolkit alone: its connector or its image tokens are not those of a published PaliGemma",
            "connector": connector,
            "tiles": self.tiles,
            "aspect": self.aspect,
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
