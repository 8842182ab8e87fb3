"""The processor against transformers' PaliGemmaProcessor with its Pillow image processor, and where it must differ."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PaliGemmaConfig, PaliGemmaProcessor

from data.image_form import ImageForm, quarters
from data.images import open_image
from data.processor import Processor, single_line
from model import ConnectorConfig, PaliGemma
from model import PaliGemmaConfig as OurConfig
from model.convert import changed as changed_network
from model.convert import convert

IS_4 = transformers.__version__.startswith("4.")
SiglipImageProcessorPil: Any = transformers.SiglipImageProcessor if IS_4 else transformers.SiglipImageProcessorPil
BASE = Path(__file__).parents[2] / "assets" / "tiny-base"
PAD, EOS, BOS = 0, 1, 2
SIDE = json.loads((BASE / "config.json").read_text())["vision_config"]["image_size"]
N = (SIDE // 14) ** 2
SPECIAL = ("<image>", "<bos>", "<eos>", "<pad>", "<unk>")


@pytest.fixture(scope="module")
def ours() -> Processor:
    return Processor.from_pretrained(BASE, max_text_tokens=1000)  # rare characters take four tokens each


def library(directory: Path) -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil.from_pretrained(directory)
    return PaliGemmaProcessor(images, AutoTokenizer.from_pretrained(directory))


@pytest.fixture(scope="module")
def theirs() -> PaliGemmaProcessor:
    return library(BASE)


def random_image(width: int = 67, height: int = 31) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def shown(processor: Processor, row: dict[str, torch.Tensor]) -> list[str]:
    """The tokens of a row after <image> x N <bos>."""
    ids = row["input_ids"].tolist()
    assert ids[: N + 1] == [processor.image_token_id] * N + [BOS]
    tokens = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    return [str(tokens.id_to_token(i)) for i in ids[N + 1 :]]


PIECES = ["answer en ", "what color is ", "the", "circle", "  ", "?", "<loc0001>", "<seg012>", "<mask>", "é"]
CHARACTERS = st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])


def texts(*pieces: str) -> st.SearchStrategy[str]:
    """Words, tokens and noise, without special tokens."""
    parts = st.lists(st.one_of(st.text(CHARACTERS, max_size=5), st.sampled_from([*PIECES, *pieces])), max_size=8)
    return parts.map("".join).filter(lambda text: not any(token in text for token in SPECIAL))


def test_half_a_character_is_refused(ours: Processor) -> None:
    with pytest.raises(ValueError, match=r"the prefix 'a\\ud83d' holds half a character"):
        ours.encode("a\ud83d")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prefix=texts(), suffix=texts("\n", "\n\n"))
def test_a_row_is_the_librarys_token_for_token(
    ours: Processor, theirs: PaliGemmaProcessor, prefix: str, suffix: str
) -> None:
    expected = theirs(images=[random_image(8, 8)], text=["<image>" + prefix], suffix=[suffix])
    row = ours.encode(prefix, suffix)
    assert row["input_ids"].tolist() == expected["input_ids"][0]
    assert row["token_type_ids"].tolist() == expected["token_type_ids"][0]
    assert row["labels"].tolist() == list(expected["labels"][0])
    alone = theirs(images=[random_image(8, 8)], text=["<image>" + prefix])
    row = ours.encode(prefix)
    assert row["input_ids"].tolist() == alone["input_ids"][0]
    assert row["token_type_ids"].tolist() == [0] * len(row["input_ids"])


def test_a_batch_is_the_librarys(ours: Processor, theirs: PaliGemmaProcessor) -> None:
    prefixes = ["answer en how many circles are there?", "caption en", "detect circle ; cross"]
    suffixes = ["3", "a red circle", "<loc0100><loc0200><loc0300><loc0400> circle"]
    images = [random_image(67, 31), random_image(20, 90), random_image(56, 56)]
    expected = theirs(
        images=[[image] for image in images],
        text=["<image>" + prefix for prefix in prefixes],
        suffix=suffixes,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    batch = ours(images=images, prefixes=prefixes, suffixes=suffixes)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "pixel_values", "token_type_ids"]
    for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name
        assert batch[name].dtype == expected[name].dtype
    assert torch.equal(batch["labels"], expected["labels"].masked_fill(expected["attention_mask"] == 0, -100))


def test_without_suffixes_there_are_no_labels(ours: Processor) -> None:
    batch = ours(images=[random_image()], prefixes=["caption en"])
    assert "labels" not in batch
    assert batch["token_type_ids"].sum() == 0
    assert "labels" not in ours.encode("caption en")


@pytest.mark.parametrize("size", [(SIDE, SIDE), (640, 480), (31, 200), (3, 2), (1, 1)])
def test_pixels_are_the_librarys_bit_for_bit(
    ours: Processor, theirs: PaliGemmaProcessor, size: tuple[int, int]
) -> None:
    image = random_image(*size)
    expected = theirs.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    found = ours.pixels(image)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def test_every_level_of_every_channel_is_the_librarys(ours: Processor, theirs: PaliGemmaProcessor) -> None:
    levels = np.arange(SIDE * SIDE * 3).reshape(SIDE, SIDE, 3) % 256
    image = Image.fromarray(levels.astype(np.uint8))
    expected = theirs.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    assert len(expected.unique()) == 256
    assert torch.equal(ours.pixels(image), expected)
    assert (expected.min(), expected.max()) == (-1, 1)


def test_pixels_are_those_of_the_opened_image(ours: Processor, tmp_path: Path) -> None:
    """Orientation and transparency go through data/images.py, for every form of image."""
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[274] = 6
    image = random_image()
    image.putalpha(100)
    image.save(path, exif=exif)
    expected = ours.pixels(open_image(path))
    for source in (path, str(path), path.read_bytes(), {"path": str(path), "bytes": None}):
        assert torch.equal(ours.pixels(source), expected)
    with pytest.raises(ValueError, match=r"gone\.jpg"):
        ours(images=[tmp_path / "gone.jpg"], prefixes=["caption en"])


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("text", ["what is {} here", "a{}", "{} {}"])
def test_special_tokens_in_a_text_are_refused(ours: Processor, token: str, text: str) -> None:
    """Also in a worker's copy of the processor, and of a prefix those behind what may lead it."""
    text = text.replace("{}", token)
    for processor in (ours, pickle.loads(pickle.dumps(ours))):
        with pytest.raises(ValueError, match=f"the suffix .* holds the special token {token}: remove it"):
            processor.encode("caption en", text)
        if text.startswith(token) and token in ("<image>", "<bos>"):
            assert torch.equal(processor.encode(text)["input_ids"], processor.encode("")["input_ids"])
            continue
        with pytest.raises(ValueError, match=f"the prefix .* holds the special token {token}: remove it"):
            processor.encode(f"<image>{text}", "yes")


@pytest.mark.parametrize(
    "leading", ["<image>", "<image><image>", "<image> ", "<image>\n", "<bos>", "<image>" * 16 + "<bos>"]
)
def test_a_leading_image_token_is_taken_off(ours: Processor, theirs: PaliGemmaProcessor, leading: str) -> None:
    """As in transformers' own form, which gives the same row."""
    row = ours.encode(leading + "caption en", "a circle")
    for name, tensor in ours.encode("caption en", "a circle").items():
        assert torch.equal(row[name], tensor), name
    assert (ours.prompt(leading + "caption en"), ours.is_marked(leading + "caption en")) == ("caption en", True)
    assert not ours.is_marked("caption <image> en")
    if leading == "<image>":
        expected = theirs(images=[random_image(8, 8)], text=[leading + "caption en"], suffix=["a circle"])
        assert row["input_ids"].tolist() == expected["input_ids"][0]


def test_locations_and_segments_stay_tokens(ours: Processor) -> None:
    row = ours.encode("detect cat", "<loc0010><loc0020><seg003> cat")
    answer = row["input_ids"][row["token_type_ids"] == 1]
    assert shown(ours, row)[-len(answer) :][:3] == ["<loc0010>", "<loc0020>", "<seg003>"]
    assert ours.decode(answer) == "<loc0010><loc0020><seg003> cat"


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\n", "a"), ("\n\na\r\n", "a"), ("a\nb", "a b"), ("a\n\n\r\nb", "a b"), (" a ", " a "), ("\n", ""), ("", "")],
)
def test_newlines_in_a_prefix_become_spaces(ours: Processor, text: str, line: str) -> None:
    assert single_line(text) == line
    tokens = shown(ours, ours.encode(text, "x"))
    assert tokens.count("\n") == 1
    assert tokens[-3:] == ["\n", "x", "<eos>"]
    assert torch.equal(ours.encode(text)["input_ids"], ours.encode(line)["input_ids"])


def test_newlines_in_a_suffix_stay(ours: Processor) -> None:
    row = ours.encode("read", "one\ntwo")
    assert ours.decode(row["input_ids"][row["token_type_ids"] == 1]) == "one\ntwo"


def needed(processor: Processor, prefix: str, suffix: str | None) -> tuple[int, int]:
    """Tokens of the prompt with its newline, and of the answer with <eos>."""
    answer = [] if suffix is None else processor.answer_ids(suffix)
    return len(processor.prompt_ids(prefix)), len(answer)


@pytest.mark.parametrize("limit", [3, 4, 5, 8, 12, 13, 14, 40])
@pytest.mark.parametrize("suffix", [None, "", "x", "x " * 6, "x " * 300])
@pytest.mark.parametrize("prefix", ["", "caption en", "answer en " + "q " * 30])
def test_nothing_is_cut_in_silence(ours: Processor, limit: int, suffix: str | None, prefix: str) -> None:
    """A text is whole or refused with the length it needs; asked to cut, only the end of the answer goes."""
    prompt, answer = needed(ours, prefix, suffix)
    whole = {name: row.tolist() for name, row in ours.encode(prefix, suffix).items()}
    assert len(whole["input_ids"]) == N + 1 + prompt + answer
    refused = rf"its text needs {prompt + answer:,} tokens.*; max_text_tokens is {limit}"
    for cuts in (False, True):
        processor = Processor.from_pretrained(BASE, limit, truncate_answers=cuts)
        if prompt + answer <= limit:
            assert {name: row.tolist() for name, row in processor.encode(prefix, suffix).items()} == whole
        elif not cuts or prompt + min(answer, 2) > limit:
            with pytest.raises(ValueError, match=refused):
                processor.encode(prefix, suffix)
        else:
            row = {name: row.tolist() for name, row in processor.encode(prefix, suffix).items()}
            assert len(row["input_ids"]) == N + 1 + limit
            assert row["input_ids"] == [*whole["input_ids"][: N + limit], EOS]
            assert row["token_type_ids"] == whole["token_type_ids"][: N + 1 + limit]
            assert row["labels"] == [*whole["labels"][: N + limit], EOS]


def test_a_long_answer_leaves_its_prompt_whole(ours: Processor) -> None:
    """200 words behind `caption en`, with a limit of 128, once left nothing of the prompt."""
    with pytest.raises(
        ValueError, match=r"needs (\d+) tokens \(\d+ of its prompt, \d+ of its answer\).*is 128: raise it"
    ):
        Processor.from_pretrained(BASE, 128).encode("caption en", "circle " * 200)
    row = Processor.from_pretrained(BASE, 128, truncate_answers=True).encode("caption en", "circle " * 200)
    prompt = ours.encode("caption en")["input_ids"]
    assert torch.equal(row["input_ids"][: len(prompt)], prompt)
    assert (len(row["input_ids"]), row["input_ids"][-1]) == (N + 1 + 128, EOS)


def test_a_row_of_several_suffixes_is_the_prompt_and_each_as_it_is_alone(ours: Processor) -> None:
    """The types number them; every token has the weight of its suffix, all others none."""
    texts, prompt = ["3", "three circles", "", "3"], ours.encode("how many?")["input_ids"].tolist()
    answers = [ours.answer_ids(text) for text in texts]
    assert list(map(len, answers)) == [2, 3, 1, 2]
    row = ours.encode_suffixes("how many?", texts, [0.5, 0.25, 0.125, 0.125])
    after = [token for answer in answers for token in answer]
    assert row["input_ids"].tolist() == prompt + after
    assert row["labels"].tolist() == [-100] * len(prompt) + after
    assert row["token_type_ids"].tolist() == [0] * len(prompt) + [1, 1, 2, 2, 2, 3, 4, 4]
    assert row["loss_weights"].tolist() == [0.0] * len(prompt) + [0.5] * 2 + [0.25] * 3 + [0.125] * 3
    assert row["loss_weights"].dtype == torch.float32
    alone, one = ours.encode_suffixes("how many?", texts[:1]), ours.encode("how many?", "3")
    assert alone.keys() == one.keys()
    assert all(torch.equal(alone[name], one[name]) for name in one)


@pytest.mark.parametrize(
    ("suffixes", "weights", "message"),
    [
        ([], None, r"suffixes are \[\]; expected a list of at least one"),
        ("yes", None, "suffixes are 'yes'; expected a list of at least one"),
        (["yes", "no"], [1.0], r"weights are \[1.0\]; expected 2, one for each suffix"),
        (["yes", "no"], [1.0, -0.5], "each a number above 0"),
        (["yes", "no"], [1.0, 0.0], "leave out a suffix that should not count"),
        (["yes"], [float("nan")], "each a number above 0"),
        (["yes", "<eos>"], None, "the suffix '<eos>' holds the special token <eos>"),
    ],
)
def test_suffixes_and_weights_that_make_no_row_are_refused(
    ours: Processor, suffixes: list[str], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours.encode_suffixes("is it?", suffixes, weights)


def test_suffixes_that_do_not_fit_together_are_refused_or_the_longest_cut(ours: Processor) -> None:
    """To one length, the largest that fits: the short ones stay whole."""
    texts = ["x", "x " * 9, "x " * 6]
    prompt, lengths = len(ours.prompt_ids("caption en")), [len(ours.answer_ids(text)) for text in texts]
    assert lengths == [2, 19, 13]
    limit = prompt + 23
    refused = rf"needs {prompt + 34} tokens \({prompt} of its prompt, 34 of its 3 answers\); max_text_tokens is {limit}"
    with pytest.raises(ValueError, match=refused):
        Processor.from_pretrained(BASE, limit).encode_suffixes("caption en", texts)
    cutting = Processor.from_pretrained(BASE, limit, truncate_answers=True)
    assert cutting.fit(prompt, *lengths) == [2, 10, 10]
    row = cutting.encode_suffixes("caption en", texts, [0.5, 0.25, 0.25])
    assert row["token_type_ids"].bincount().tolist() == [N + 1 + prompt, 2, 10, 10]
    ends = row["token_type_ids"].bincount().cumsum(dim=0)[1:] - 1
    assert row["input_ids"][ends].tolist() == row["labels"][ends].tolist() == [EOS] * 3
    assert Processor.from_pretrained(BASE, prompt + 6, truncate_answers=True).fit(prompt, *lengths) == [2, 2, 2]
    with pytest.raises(ValueError, match="a prompt is never cut, nor an answer to less than a token and <eos>"):
        Processor.from_pretrained(BASE, prompt + 5, truncate_answers=True).encode_suffixes("caption en", texts)


def test_without_a_limit_the_models_positions_are_one(tmp_path: Path) -> None:
    directory = changed(tmp_path, "config.json", lambda c: c["text_config"].update(max_position_embeddings=N + 41))
    processor = Processor.from_pretrained(directory)
    longest = "q " * 19
    assert len(processor.prompt_ids(longest)) == 39
    assert len(processor.encode(longest, "")["input_ids"]) == N + 41
    assert len(processor.encode_suffixes("q " * 17, ["", "x", "x"])["input_ids"]) == N + 41
    with pytest.raises(
        ValueError, match=rf"41 tokens .*3 answers\); the {N + 41} positions of the model leave 40 for it"
    ):
        processor.encode_suffixes("q " * 17, ["x", "x", "x"])
    with pytest.raises(ValueError, match=rf"the {N + 41} positions of the model leave 40 for it: shorten it"):
        processor.encode(longest + "q", "")


def rows_of(count: int) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["text_config"].update(vocab_size=count)


def test_more_token_ids_than_rows_are_refused(tmp_path: Path) -> None:
    """Each would be an IndexError in the embedding. The published network has rows to spare: 257,216 for 257,153."""
    highest = max(Tokenizer.from_file(str(BASE / "tokenizer.json")).get_vocab().values())
    for rows in (highest + 1, highest + 64):
        Processor.from_pretrained(changed(tmp_path, "config.json", rows_of(rows)))
    directory = changed(tmp_path, "config.json", rows_of(highest))
    with pytest.raises(ValueError, match=rf"token ids up to {highest:,}, and the embedding has {highest:,} rows"):
        Processor.from_pretrained(directory)


def test_decode_stops_at_eos_and_drops_special_tokens(ours: Processor) -> None:
    answer = ours.encode("", "a red circle")["input_ids"][N + 2 :]
    assert ours.decode(answer) == "a red circle"
    assert ours.decode([PAD, BOS, *answer.tolist(), *answer.tolist(), PAD]) == "a red circle"
    assert ours.decode(answer[:-1]) == "a red circle"
    assert ours.decode([ours.image_token_id, *answer.tolist()]) == "a red circle"
    assert ours.decode([]) == ""
    assert ours.decode([EOS, *answer.tolist()]) == ""
    assert ours.decode(ours.encode("", " é 猫 ")["input_ids"][N + 2 :]) == "é 猫"


def test_counts_must_agree(ours: Processor) -> None:
    with pytest.raises(ValueError, match="1 images, 2 prefixes and 2 suffixes"):
        ours(images=[random_image()], prefixes=["a", "b"], suffixes=["c", "d"])
    with pytest.raises(ValueError, match="1 images, 1 prefixes and 2 suffixes"):
        ours(images=[random_image()], prefixes=["a"], suffixes=["c", "d"])


@pytest.mark.skipif(IS_4, reason="4.x saves another form")
def test_the_form_5x_saves_is_read_alike(ours: Processor, theirs: PaliGemmaProcessor, tmp_path: Path) -> None:
    """processor_config.json instead of preprocessor_config.json, no special_tokens_map.json, another config.json."""
    theirs.save_pretrained(tmp_path)
    PaliGemmaConfig.from_pretrained(BASE).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    processor = Processor.from_pretrained(tmp_path)
    image, prefix, suffix = random_image(), "answer en is there a <loc0001> circle?", "yes"
    for name, tensor in ours([image], [prefix], [suffix]).items():
        assert torch.equal(processor([image], [prefix], [suffix])[name], tensor), name


def changed(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the base whose JSON file `name` is changed."""
    for path in BASE.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    content = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_what_the_files_say_about_pixels_is_honoured(tmp_path: Path) -> None:
    """Not only SigLIP's values: checked against the library, which reads the same file."""
    form = {"image_mean": [0.4, 0.45, 0.5], "image_std": [0.2, 0.3, 0.4], "resample": 2, "rescale_factor": 1 / 128}
    directory = changed(tmp_path, "preprocessor_config.json", lambda content: content.update(form))
    expected = SiglipImageProcessorPil.from_pretrained(directory)(images=[random_image()], return_tensors="pt")
    assert torch.equal(Processor.from_pretrained(directory).pixels(random_image()), expected["pixel_values"][0])


def test_missing_values_are_siglips(ours: Processor, tmp_path: Path) -> None:
    def strip(content: dict[str, Any]) -> None:
        for key in list(content):
            if key != "image_processor_type":
                del content[key]

    directory = changed(tmp_path, "preprocessor_config.json", strip)
    assert torch.equal(Processor.from_pretrained(directory).pixels(random_image()), ours.pixels(random_image()))


def test_a_tokenizer_saved_after_truncating_does_not_truncate(ours: Processor, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    directory = changed(tmp_path, "tokenizer.json", lambda content: content.update(truncation=truncation))
    text = "answer en what color is the circle?"
    assert torch.equal(Processor.from_pretrained(directory).encode(text)["input_ids"], ours.encode(text)["input_ids"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("preprocessor_config.json", {"size": {"height": 223, "width": 224}}, f"size is .*223.* it should be .*{SIDE}"),
        ("preprocessor_config.json", {"image_seq_length": 255}, "image_seq_length is 255, by config.json"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0]}, "no std of 0"),
        ("processor_config.json", {"image_processor": {"image_mean": [0.4, 0.5, 0.5]}}, "both alike"),
        ("config.json", {"image_token_index": 5}, r"<image> is 5 in config.json, \d+ as special"),
        ("config.json", {"eos_token_id": 107}, "<eos> is 107 in config.json, 1 as special"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    directory = changed(tmp_path, name, lambda content: content.update(change))
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(directory)


def test_a_tokenizer_that_would_take_image_for_a_word_is_refused(tmp_path: Path) -> None:
    """An added token that is not special cannot be spelled out: a person's "<image>" would be one."""

    def demote(content: dict[str, Any]) -> None:
        next(token for token in content["added_tokens"] if token["content"] == "<image>")["special"] = False

    with pytest.raises(ValueError, match=r"<image> is \d+ in config\.json, None as special"):
        Processor.from_pretrained(changed(tmp_path, "tokenizer.json", demote))


def test_a_processor_config_without_pixels_changes_nothing(tmp_path: Path) -> None:
    directory = changed(tmp_path, "processor_config.json", lambda content: content.update(processor_class="x"))
    assert Processor.from_pretrained(directory).image_form.size == SIDE


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_missing_and_broken_files_are_named(tmp_path: Path, name: str) -> None:
    directory = changed(tmp_path, name, lambda content: None)
    (directory / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        Processor.from_pretrained(directory)
    (directory / name).unlink()
    with pytest.raises(ValueError, match=name):
        Processor.from_pretrained(directory)


def test_a_limit_too_small_for_any_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="max_text_tokens is 2; expected at least 3"):
        Processor.from_pretrained(BASE, max_text_tokens=2)


TILED = ImageForm(SIDE, 4, "squash", 5 * N)
SIZES = [(SIDE, SIDE), (64, 48), (67, 31), (31, 200), (3, 2), (1, 5), (5, 1), (1, 1)]


def crops_of_idefics2(image: Image.Image) -> list[np.ndarray[Any, Any]]:
    """Four tiles and the whole, u8[3, H, W]; of an image of one pixel some are empty."""
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    split: list[np.ndarray[Any, Any]] = Idefics2ImageProcessorPil().split_images(np.asarray(image).transpose(2, 0, 1))
    return split


@pytest.mark.skipif(IS_4, reason="4.x has no Pillow processor of Idefics2")
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_idefics2_pixel_for_pixel(size: tuple[int, int]) -> None:
    """Row by row. Where theirs is empty, in an image one pixel wide or high, ours is the pixels that there are."""
    image = random_image(*size)
    *expected, whole = crops_of_idefics2(image)
    assert np.array_equal(whole, np.asarray(image).transpose(2, 0, 1))
    found = [np.asarray(quarter).transpose(2, 0, 1) for quarter in quarters(image)]
    assert len(found) == len(expected) == 4
    for tile, theirs in zip(found, expected, strict=True):
        if theirs.size:
            assert np.array_equal(tile, theirs)
        else:
            assert min(size) == 1
            height, width = (max(1, half) for half in theirs.shape[1:])
            assert tile.shape == (3, height, width)


@pytest.mark.parametrize("size", SIZES)
def test_every_tile_is_resized_as_an_image_and_the_whole_comes_last(
    theirs: PaliGemmaProcessor, size: tuple[int, int]
) -> None:
    image = random_image(*size)
    found = Processor.from_pretrained(BASE, image_form=TILED).pixels(image)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((5, 3, SIDE, SIDE), torch.float32, True)
    for view, pixels in zip((*quarters(image), image), found, strict=True):
        if min(view.size) == 1 and IS_4:
            continue  # 4.57 takes its channels for its width
        expected = theirs.image_processor(images=[view], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected)


def test_tiles_show_where_things_are(ours: Processor) -> None:
    """Four colours, one in each quarter of a wide image: upper left, upper right, lower left, lower right, whole."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    image = Image.new("RGB", (80, 40))
    for index, color in enumerate(colors):
        image.paste(color, (40 * (index % 2), 20 * (index // 2), 40 * (index % 2) + 40, 20 * (index // 2) + 20))
    *tiles, whole = Processor.from_pretrained(BASE, image_form=TILED).pixels(image)
    for tile, color in zip(tiles, colors, strict=True):
        assert torch.equal(tile, ours.pixels(Image.new("RGB", (40, 20), color)))
    assert torch.equal(whole, ours.pixels(image))


def padded_by_llava(image: Image.Image, form: dict[str, Any]) -> torch.Tensor:
    """f32[3, H, W]: padded to a square with the mean's colour, then as SigLIP's processor."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = {"height": SIDE, "width": SIDE}
    processor = LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=size, resample=3, **form)
    pixels: torch.Tensor = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    return pixels


@pytest.mark.skipif(IS_4, reason="4.x has no Pillow processor of LLaVA")
@pytest.mark.parametrize("mean", [[0.5, 0.5, 0.5], [0.48, 0.45, 0.4]])
@pytest.mark.parametrize("size", [*SIZES, (48, 64), (31, 67), (4, 1), (2, 5)])
def test_padding_is_llavas(tmp_path: Path, size: tuple[int, int], mean: list[float]) -> None:
    """In the middle, in the grey (or colour) of the mean; a square image is as it was."""
    form = {"image_mean": mean, "image_std": [0.5, 0.25, 0.5]}
    directory = changed(tmp_path, "preprocessor_config.json", lambda content: content.update(form))
    processor = Processor.from_pretrained(directory, image_form=ImageForm(SIDE, 1, "pad", N))
    image = random_image(*size)
    assert torch.equal(processor.pixels(image), padded_by_llava(image, form))
    squashed = Processor.from_pretrained(directory).pixels(image)
    assert torch.equal(processor.pixels(image), squashed) == (size[0] == size[1])


@pytest.mark.skipif(IS_4, reason="4.x has no Pillow processor of LLaVA")
@pytest.mark.parametrize("size", [(64, 48), (31, 200), (1, 5)])
def test_a_padded_image_is_cut_into_tiles_afterwards(ours: Processor, size: tuple[int, int]) -> None:
    found = Processor.from_pretrained(BASE, image_form=TILED._replace(aspect="pad")).pixels(random_image(*size))
    half = ImageForm(SIDE, 1, "pad", N)
    assert torch.equal(found[-1], Processor.from_pretrained(BASE, image_form=half).pixels(random_image(*size)))
    side = max(size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(random_image(*size), ((side - size[0]) // 2, (side - size[1]) // 2))
    for tile, crop in zip(found, crops_of_idefics2(square)[:4], strict=False):
        assert torch.equal(tile, ours.pixels(Image.fromarray(crop.transpose(1, 2, 0))))


def saved_network(tmp_path: Path, connector: ConnectorConfig | None = None, **changes: Any) -> tuple[Path, OurConfig]:
    """A checkpoint of the base with a changed network, as `merge_lora.py` writes one, and its configuration."""
    model = PaliGemma.from_pretrained(BASE)
    config = changed_network(model.config, connector, **changes)
    convert(model, config)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", config


CHANGES: list[tuple[ConnectorConfig | None, dict[str, Any]]] = [
    (None, {"tiles": 4}),
    (None, {"image_size": 84, "aspect": "pad"}),
    (ConnectorConfig("mlp"), {}),
    (ConnectorConfig("resampler", latents=7, depth=1), {"tiles": 4, "aspect": "pad"}),
    (ConnectorConfig("pixel_shuffle"), {"image_size": 84}),
]


@pytest.mark.parametrize(("connector", "changes"), CHANGES)
def test_a_saved_networks_directory_says_what_its_processor_does(
    tmp_path: Path, connector: ConnectorConfig | None, changes: dict[str, Any]
) -> None:
    """Without the network's code: its own config.json and preprocessor_config.json are enough."""
    directory, config = saved_network(tmp_path, connector, **changes)
    processor = Processor.from_pretrained(directory)
    size, tokens = config.vision.image_size, config.num_image_tokens
    assert processor.image_form == ImageForm(size, config.tiles, config.aspect, tokens)
    assert processor.pixels(random_image()).shape == config.pixel_shape
    assert (processor.encode("q")["input_ids"] == processor.image_token_id).sum() == tokens
    form = json.loads((directory / "preprocessor_config.json").read_text())
    assert (form["size"], form["image_seq_length"]) == ({"height": size, "width": size}, tokens)
    of_the_base = Processor.from_pretrained(BASE, image_form=processor.image_form)
    assert torch.equal(processor.pixels(random_image()), of_the_base.pixels(random_image()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "preprocessor_config.json",
            {"image_seq_length": 36},
            "image_seq_length is 36, by config.json it should be 35",
        ),
        ("preprocessor_config.json", {"size": {"height": 84, "width": 84}}, "size is .*84.* by config.json"),
        ("config.json", {"text_config": {"num_image_tokens": 36}}, "image_seq_length is 35, by config.json .* 36"),
        ("config.json", {"text_config": {}}, "config.json: num_image_tokens at text_config is None"),
        ("config.json", {"text_config": {"num_image_tokens": "35"}}, "num_image_tokens at text_config is '35'"),
        ("config.json", {"tiles": 9}, "config.json: tiles is 9 and aspect 'squash'; expected 1 or 4"),
        ("config.json", {"aspect": "stretch"}, "aspect 'stretch'; expected 1 or 4, squash or pad"),
    ],
)
def test_a_saved_network_whose_files_disagree_is_refused(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    directory, _ = saved_network(tmp_path, ConnectorConfig("resampler", latents=7, depth=1), tiles=4)
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(directory)


def test_a_wrong_number_of_image_tokens_is_refused_by_the_network_too(tmp_path: Path) -> None:
    """Where preprocessor_config.json says nothing that the processor could compare with."""
    directory, _ = saved_network(tmp_path, ConnectorConfig("resampler", latents=7, depth=1), tiles=4)
    content = json.loads((directory / "config.json").read_text())
    content["text_config"]["num_image_tokens"] = 36
    (directory / "config.json").write_text(json.dumps(content))
    form = json.loads((directory / "preprocessor_config.json").read_text())
    del form["image_seq_length"]
    (directory / "preprocessor_config.json").write_text(json.dumps(form))
    assert Processor.from_pretrained(directory).num_image_tokens == 36
    with pytest.raises(ValueError, match=r"num_image_tokens at text_config is 36; this network implements 35 only"):
        PaliGemma.from_pretrained(directory)


def test_many_image_tokens_leave_less_room_for_text(tmp_path: Path) -> None:
    directory = changed(tmp_path, "config.json", lambda c: c["text_config"].update(max_position_embeddings=5 * N + 21))
    processor = Processor.from_pretrained(directory, image_form=TILED)
    assert processor.text_limit == 20
    assert Processor.from_pretrained(directory, 12, image_form=TILED).text_limit == 12
    assert Processor.from_pretrained(directory, 30, image_form=TILED).text_limit == 20
    assert Processor.from_pretrained(directory).text_limit == 4 * N + 20
    longest = "q " * 9
    assert len(processor.prompt_ids(longest)) == 19
    row = processor.encode(longest, "")
    assert len(row["input_ids"]) == 5 * N + 21
    assert (row["input_ids"][: 5 * N] == processor.image_token_id).all()
    assert row["labels"][: 5 * N].eq(-100).all()
    with pytest.raises(ValueError, match=rf"the {5 * N + 21} positions of the model leave 20 for it: shorten it"):
        processor.encode(longest + "q", "")
