"""A checkpoint of PaliGemma 3B's true dimensions with random weights: to try, time and measure without the gated one.

    python -m benchmarks.random_checkpoint --output /tmp/paligemma-3b-random

Config and special ids are the published ones (2,923,466,480 parameters, 5.85 GB in bfloat16). The text side of the
tokenizer is the tiny base's, with <loc0000>, <seg000> and <image> at their published places; what it answers is noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune import cli
from finetune.system.device import DTYPES
from finetune.system.paths import path_argument
from model import PaliGemmaConfig
from model.random_init import from_random

TINY = Path(__file__).parent.parent / "assets" / "tiny-base"
PUBLISHED_IDS = {
    **{f"<loc{i:04}>": 256_000 + i for i in range(1024)},
    **{f"<seg{i:03}>": 257_024 + i for i in range(128)},
    "<image>": 257_152,
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_checkpoint", description=__doc__)
    parser.add_argument("--output", type=path_argument, required=True, help="directory to write to")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    arguments = parser.parse_args(argv)
    write_checkpoint(arguments.output, PaliGemmaConfig(), DTYPES[arguments.dtype], arguments.seed)


def write_checkpoint(directory: Path, config: PaliGemmaConfig, dtype: torch.dtype, seed: int) -> None:
    """Weights, config, tokenizer and processor files for a network of these dimensions."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf(dtype), indent=2) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer()) + "\n", encoding="utf-8")
    preprocessor = json.loads((TINY / "preprocessor_config.json").read_text(encoding="utf-8"))
    side, images = config.vision.image_size, config.num_image_tokens
    preprocessor |= {"size": {"height": side, "width": side}, "image_seq_length": images}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
    from_random(directory, seed, dtype).save_pretrained(directory)


def tokenizer() -> dict[str, object]:
    """The tiny base's tokenizer.json with places, outlines and <image> where the published vocabulary has them."""
    made = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    for token in made["added_tokens"]:
        token["id"] = PUBLISHED_IDS.get(token["content"], token["id"])
    made["model"]["vocab"] |= PUBLISHED_IDS
    return made


if __name__ == "__main__":
    cli.run(main)
