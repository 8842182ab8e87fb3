"""The tokenizer and configuration files of the tiny base checkpoint, as google/paligemma-3b-pt-224 publishes its own.

    python -m assets.tokenizer --output assets/tiny-base

The tokenizer is Gemma's in kind: spaces become "▁", byte-pair merges that never cross a word, digits one by one, bytes
for what is unknown, runs of newlines as pieces of their own, then <loc0000>..<loc1023>, <seg000>..<seg127> and, last,
<image>. It is trained on the words of data/synthetic/scenes.py until each is one piece. Not here: the weights.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.synthetic import scenes

SPECIAL = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}  # ids 0 to 3, as in Gemma
MASK = "<mask>"  # id 4
NEWLINES = tuple("\n" * n for n in range(1, 5))
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
CHARACTERS = ("▁", *(chr(code) for code in range(33, 127)))
LOCATIONS = (*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128)))
IMAGE = "<image>"
IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, MLP_SIZE = 56, 14, 128, 512
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def corpus() -> list[str]:
    """Every word of the generated data, within a line and at the start of one."""
    lines = [*scenes.ALTERNATIVES, *(answer for answers in scenes.ALTERNATIVES.values() for answer in answers)]
    for index in range(1000):
        scene = scenes.make_scene(scenes.rng_of("tokenizer", 0, index, "scene"))
        rng = scenes.rng_of("tokenizer", 0, index, "questions")
        asks = (scenes.ask_whether, scenes.ask_how_many, scenes.ask_which)
        asked = [ask(scene, rng) for ask in asks for _ in range(2)]
        lines += [f"answer en {text}" for text in dict.fromkeys(question.text for question in asked if question)]
        captions = scenes.make_captions(scene, scenes.rng_of("tokenizer", 0, index, "captions"))
        lines += [f"{prefix} {caption}" for prefix, caption in captions]
    words = sorted({word for line in lines for word in line.split()})
    return [*lines, *words, *(f" {word}" for word in words)]


def train_tokenizer() -> Tokenizer:
    """Learns merges from the corpus, then lays the pieces out in Gemma's order."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[a-z]+|."), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=list(CHARACTERS), show_progress=False)
    learner.train_from_iterator(corpus(), trainer)
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    merges += [("\n" * k, "\n" * (n - k)) for n in range(2, len(NEWLINES) + 1) for k in range(1, n)]
    joined = (left + right for left, right in merges)
    pieces = dict.fromkeys((*SPECIAL.values(), MASK, *NEWLINES, *BYTES, *CHARACTERS, *joined))
    vocab = {piece: i for i, piece in enumerate(pieces)}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Gemma's own: after the normalizer there is no space left to split at.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL.values()])
    tokenizer.add_tokens([AddedToken(token) for token in (MASK, *LOCATIONS)])
    tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=False)])
    return tokenizer


def added_token(tokenizer: Tokenizer, token: str) -> dict[str, Any]:
    """One entry of tokenizer_config.json's added_tokens_decoder."""
    special = token in (*SPECIAL.values(), IMAGE)
    return {**token_form(token, normalized=not special), "special": special}


def token_form(token: str, normalized: bool = False) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    added = sorted((tokenizer.token_to_id(token), token) for token in (*SPECIAL.values(), MASK, *LOCATIONS, IMAGE))
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): added_token(tokenizer, token) for i, token in added},
        "additional_special_tokens": [IMAGE],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "processor_class": "PaliGemmaProcessor",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    }


def special_tokens_map() -> dict[str, Any]:
    return {
        "additional_special_tokens": [token_form(IMAGE)],
        **{f"{name}_token": token_form(token) for name, token in SPECIAL.items()},
    }


def preprocessor_config() -> dict[str, Any]:
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": IMAGE_TOKENS,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of the published config.json, plus those in which this model differs from the published defaults."""
    rows = -(-tokenizer.get_vocab_size() // 64) * 64
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": tokenizer.token_to_id(SPECIAL["bos"]),
        "eos_token_id": tokenizer.token_to_id(SPECIAL["eos"]),
        "hidden_size": HIDDEN_SIZE,
        "ignore_index": -100,
        "image_token_index": tokenizer.token_to_id(IMAGE),
        "model_type": "paligemma",
        "pad_token_id": tokenizer.token_to_id(SPECIAL["pad"]),
        "projection_dim": HIDDEN_SIZE,
        "text_config": {
            "head_dim": 32,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": MLP_SIZE,
            "model_type": "gemma",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_image_tokens": IMAGE_TOKENS,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
            "vocab_size": rows,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.41.0.dev0",
        "vision_config": {
            "hidden_size": HIDDEN_SIZE,
            "image_size": IMAGE_SIZE,
            "intermediate_size": MLP_SIZE,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_image_tokens": IMAGE_TOKENS,
            "patch_size": PATCH_SIZE,
            "projection_dim": HIDDEN_SIZE,
            "projector_hidden_act": "gelu_fast",
            "vision_use_head": False,
        },
        "vocab_size": rows,
    }


def generation_config() -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "transformers_version": "4.41.0.dev0",
    }


def write_files(directory: Path) -> None:
    """Writes the six files; the same bytes every time."""
    tokenizer = train_tokenizer()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    contents = {
        "tokenizer_config.json": tokenizer_config(tokenizer),
        "special_tokens_map.json": special_tokens_map(),
        "preprocessor_config.json": preprocessor_config(),
        "config.json": model_config(tokenizer),
        "generation_config.json": generation_config(),
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write the tokenizer and configuration files of the tiny base checkpoint."
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    write_files(parser.parse_args(argv).output)


if __name__ == "__main__":
    main()
