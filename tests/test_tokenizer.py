"""The tiny base checkpoint's tokenizer and configuration: reproducible, of published form, the same to transformers."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GemmaTokenizer, PaliGemmaProcessor

from assets import tokenizer as made
from data.synthetic import scenes

BASE = Path(made.__file__).parent / "tiny-base"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "config.json",
    "generation_config.json",
)
TEXTS = (
    "answer en is there a red circle?\n",
    "caption en\n",
    "two red circles, one blue square and one green cross",
    "<image><image><bos>answer en how many crosses are there?\n",
    "detect circle ; <loc0000><loc1023><loc0512><loc0007> <seg000><seg127>",
    "one\n\ntwo\n\n\nthree\n\n\n\nfour\n\n\n\n\nfive",
    "  two  spaces,\ttabs and Zürich, 漢字, 🙂",
    "<mask> <pad> <unk> 2024",
    "",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_the_command_writes_the_shipped_files_byte_for_byte(tmp_path: Path) -> None:
    made.main(["--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (BASE / name).read_bytes(), name


def test_ids_are_laid_out_as_in_gemma(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(7)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "\n\n"]
    first = tokenizer.token_to_id("<loc0000>")
    assert first == tokenizer.get_vocab_size(with_added_tokens=False)
    assert tokenizer.token_to_id("<loc1023>") == first + 1023
    assert tokenizer.token_to_id("<seg000>") == first + 1024
    assert tokenizer.token_to_id("<seg127>") == first + 1151
    assert tokenizer.token_to_id("<image>") == first + 1152 == tokenizer.get_vocab_size() - 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_every_word_of_the_generated_data_is_one_piece(tokenizer: Tokenizer) -> None:
    words = {word.strip("?,:") for line in made.corpus() for word in line.split()}
    assert {"circles", "how", "answer", "caption", *scenes.COLORS, *scenes.SHAPES} <= words
    for word in words - {"x", *"0123456789"}:
        assert len(ids_of(tokenizer, word)) == 1, word
        assert len(ids_of(tokenizer, f" {word}")) == 1, word


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(" 12 3", add_special_tokens=False).tokens == ["▁", "1", "2", "▁", "3"]


def test_no_piece_crosses_a_word(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    assert not [piece for piece in pieces if "▁" in piece[1:] or ("\n" in piece and piece.strip("\n"))]


def test_a_prefix_ending_in_a_newline_merges_with_the_one_that_follows(tokenizer: Tokenizer) -> None:
    """As in Gemma: what makes it necessary to strip a prefix."""
    assert ids_of(tokenizer, "caption en\n\n") != [*ids_of(tokenizer, "caption en\n"), *ids_of(tokenizer, "\n")]
    for n in range(1, 5):
        assert len(ids_of(tokenizer, "\n" * n)) == 1


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode(text).ids == [2, *ids]


def test_unknown_characters_become_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ü", add_special_tokens=False).tokens == ["<0xC3>", "<0xBC>"]


@pytest.mark.parametrize("loader", [AutoTokenizer, GemmaTokenizer, PaliGemmaProcessor])
def test_transformers_reads_the_same_ids_and_adds_no_token(tokenizer: Tokenizer, loader: type) -> None:
    theirs = loader.from_pretrained(BASE)  # type: ignore[attr-defined]
    theirs = getattr(theirs, "tokenizer", theirs)
    assert theirs.get_vocab() == tokenizer.get_vocab()
    assert len(theirs) == tokenizer.get_vocab_size()
    assert [theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id] == [0, 1, 2, 3]
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False), text
        # A processor puts <bos> behind the images itself and turns the tokenizer's own off.
        assert theirs(text).input_ids == ([2, *ids] if loader is not PaliGemmaProcessor else ids), text


def test_the_processor_builds_a_paligemma_batch(tokenizer: Tokenizer) -> None:
    processor = PaliGemmaProcessor.from_pretrained(BASE)
    prefix, suffix = "<image>answer en is there a red circle?", "yes"
    batch = processor(images=Image.new("RGB", (112, 80)), text=prefix, suffix=suffix, return_tensors="pt")
    images = made.IMAGE_TOKENS * [tokenizer.token_to_id("<image>")]
    expected = [*images, *ids_of(tokenizer, f"<bos>{prefix.removeprefix('<image>')}\n{suffix}<eos>")]
    assert batch["input_ids"][0].tolist() == expected
    assert tuple(batch["pixel_values"].shape) == (1, 3, made.IMAGE_SIZE, made.IMAGE_SIZE)


def test_the_configuration_agrees_with_the_tokenizer(tokenizer: Tokenizer) -> None:
    config = AutoConfig.from_pretrained(BASE)
    written = json.loads((BASE / "config.json").read_text())
    assert config.image_token_id == written["image_token_index"] == tokenizer.token_to_id("<image>")
    assert written["vocab_size"] == config.text_config.vocab_size
    assert written["vocab_size"] % 64 == 0
    assert 0 <= written["vocab_size"] - tokenizer.get_vocab_size() < 64
    assert config.vision_config.image_size == made.IMAGE_SIZE
    assert config.text_config.num_image_tokens == made.IMAGE_TOKENS
    assert config.projection_dim == config.text_config.hidden_size
