"""The network: a PaliGemma written from scratch. Needs torch and safetensors only."""

from model.batch import IGNORE_INDEX, TokenBatch
from model.config import ConnectorConfig, PaliGemmaConfig, TextConfig, VisionConfig
from model.hub import fetch
from model.layers import prefix_lm_mask
from model.ops.kernels import choose_kernels
from model.paligemma import PaliGemma, PaliGemmaOutput
from model.score import Scores

__all__ = [
    "IGNORE_INDEX",
    "ConnectorConfig",
    "PaliGemma",
    "PaliGemmaConfig",
    "PaliGemmaOutput",
    "Scores",
    "TextConfig",
    "TokenBatch",
    "VisionConfig",
    "fetch",
    "prefix_lm_mask",
]

choose_kernels()
