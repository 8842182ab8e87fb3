"""Readers of what people and the world hand over: the documented error or the right result, whatever it is.

The same examples everywhere (derandomize, no database); a deadline that only what hangs can miss.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from data.processor import Processor
from finetune import LoRAConfig, inject_lora, load_adapter, remove_lora, save_adapter
from finetune.adapters.metadata import CONFIG_FILE, WEIGHTS_FILE
from finetune.adapters.storage import PREFIX, WRITTEN, adapter_tensors, peft_config
from finetune.config.load import ConfigError, dump_config, load_config
from finetune.config.schema import RunConfig
from finetune.evaluation.answer import texts_alone
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.vqa_accuracy import normalize_answer, vqa_accuracy
from finetune.lora.protocol import adapters
from model import PaliGemma
from tests import tiny
from tests.config.minimal import keys
from tests.reference_vqa import REFERENCE, ReferenceEvaluation, rule_texts

SECOND = 1000  # milliseconds
steady = settings(derandomize=True, database=None, deadline=60 * SECOND, max_examples=200)

ANY_TEXT = st.text(st.characters())  # surrogates included, which st.text() leaves out
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -(2**63), 1e300])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)


# The configuration: values at keys, in the file and on the command line.

MINIMAL: dict[str, Any] = {
    "model": {"path": "base"},
    "data": {"train": {"jsonl": "train.jsonl"}},
    "train": {"epochs": 1},
    "output": "runs/x",
}
KEYS = st.sampled_from(sorted(keys(RunConfig.model_validate(MINIMAL).model_dump(mode="json"))))
PLAUSIBLE = st.sampled_from(
    ["auto", "nf4", "float32", "float16", "linear", "go_on", "language.*", "{question}", "cuda:0"]
)
VALUES = JSON | PLAUSIBLE | st.integers(-2, 100) | st.floats(0, 1)


def assert_loads_or_is_refused(path: Path, overrides: list[str]) -> None:
    try:
        config = load_config(path, overrides)
    except ConfigError as refusal:
        lines = str(refusal).split("\n")
    else:
        lines = []
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
    assert all(line.startswith((str(path), "override ")) for line in lines), lines


@steady
@given(values=st.lists(st.tuples(KEYS | ANY_TEXT, VALUES), min_size=1, max_size=3))
def test_any_values_at_any_keys_of_the_file_are_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, Any]]
) -> None:
    document = json.loads(json.dumps(MINIMAL))
    for key, value in values:
        section = document
        *above, name = key.split(".")
        for part in above:
            section[part] = section.get(part) if isinstance(section.get(part), dict) else {}
            section = section[part]
        section[name] = value
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")  # every JSON document is YAML
    assert_loads_or_is_refused(path, [])


@steady
@given(overrides=st.lists(st.tuples(KEYS | ANY_TEXT, VALUES.map(json.dumps) | ANY_TEXT), min_size=1, max_size=3))
def test_any_values_laid_over_any_keys_are_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "overrides.yaml"
    path.write_text(json.dumps(MINIMAL), encoding="utf-8")
    assert_loads_or_is_refused(path, [f"{key}={value}" for key, value in overrides])


# The processor: texts and images.

BASE = Path(__file__).parent.parent / "assets" / "tiny-base"
SCRIPTS = [
    "\x00\x01\x1b[0m\x7f",
    "\u202e\u0645\u0631\u062d\u0628\u0627\u202c \u05e9\u05dc\u05d5\u05dd",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301\u0300\u0301" * 9,
    "\ufeff\u200b\ufffe",
    "汉字ไทย",
]
TEXTS = st.lists(ANY_TEXT | st.sampled_from([*SCRIPTS, "\n", "\r\n", " ", "<image>", "<eos>", "<loc0001>"])).map(
    "".join
)
LONG = st.tuples(st.sampled_from([*SCRIPTS, "a", "a ", " ", "\n", "<image>"]), st.just(5_000)).map(
    lambda of: of[0] * of[1]
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BASE, 64, truncate_answers=True)


@steady
@given(prefix=TEXTS, suffix=st.none() | TEXTS)
def test_any_text_is_a_row_of_the_form_or_refused(processor: Processor, prefix: str, suffix: str | None) -> None:
    refused = refusal(processor, prefix, suffix)
    if refused is None:
        assert_is_a_row(processor, prefix, suffix)
        return
    with pytest.raises(ValueError, match=refused):
        processor.encode(prefix, suffix)


@settings(steady, max_examples=12)
@given(prefix=LONG, suffix=LONG)
def test_very_long_texts_are_refused_or_rows_of_the_form(processor: Processor, prefix: str, suffix: str) -> None:
    for text in ("", prefix):
        refused = refusal(processor, text, suffix)
        if refused is None:
            assert_is_a_row(processor, text, suffix)
        else:
            with pytest.raises(ValueError, match=refused):
                processor.encode(text, suffix)


def refusal(processor: Processor, prefix: str, suffix: str | None) -> str | None:
    """What the message must say of a text that no row can be made of; None where one can."""
    try:
        (prefix + (suffix or "")).encode()
    except UnicodeEncodeError:
        return "holds half a character|holds the special token"
    left = re.sub(r"^\s*((<image>|<bos>)\s*)+", "", prefix)
    if any(token in left + (suffix or "") for token in ("<image>", "<eos>", "<bos>", "<pad>", "<unk>")):
        return "holds the special token"
    prompt = len(processor.prompt_ids(prefix))
    answer = 0 if suffix is None else len(processor.answer_ids(suffix))
    return f"its text needs {prompt + answer:,} tokens" if prompt + min(answer, 2) > 64 else None


def assert_is_a_row(processor: Processor, prefix: str, suffix: str | None) -> None:
    """Image tokens, <bos>, text without special tokens, one newline, text, <eos>; the labels after the newline."""
    row = {name: tensor.tolist() for name, tensor in processor.encode(prefix, suffix).items()}
    ids, types = row["input_ids"], row["token_type_ids"]
    images, answer = processor.num_image_tokens, sum(types)
    question = ids[images + 1 : len(ids) - answer]
    special = {processor.image_token_id, processor.bos_id, processor.eos_id, processor.pad_id}
    assert ids[: images + 1] == [processor.image_token_id] * images + [processor.bos_id]
    assert types == [0] * (len(ids) - answer) + [1] * answer
    assert question[-1] == processor.newline_id
    assert special.isdisjoint(question)
    assert len(question) + answer <= processor.max_text_tokens
    if suffix is not None:
        assert row["labels"] == [-100] * (len(ids) - answer) + ids[len(ids) - answer :]
        assert special.isdisjoint(ids[len(ids) - answer : -1])
        assert ids[-1] == processor.eos_id


def encoded(form: str, **keywords: Any) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, form, **keywords)
    return content.getvalue()


IMAGES = [encoded(form) for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")]
IMAGES += [encoded("TIFF", compression="tiff_lzw"), encoded("JPEG", progressive=True)]


@st.composite
def corrupted_images(draw: st.DrawFn) -> bytes:
    """Images with bytes changed, most of them where the header is, and cut off."""
    content = bytearray(draw(st.sampled_from(IMAGES)))
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, min(len(content), 80) - 1) | st.integers(0, len(content) - 1))] = draw(
            st.integers(0, 255)
        )
    return bytes(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is wrong in them
@steady
@given(content=st.binary() | corrupted_images())
def test_any_bytes_are_an_image_or_refused(processor: Processor, content: bytes) -> None:
    try:
        pixels = processor.pixels(content)
    except ValueError as refusal:
        pixels, message = None, str(refusal)
    if pixels is None:
        assert f"image of {len(content):,} bytes" in message
    else:
        assert pixels.shape == (3, processor.image_form.size, processor.image_form.size)
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1


# The metric against the literal program.

ANSWERS = st.lists(
    ANY_TEXT | st.sampled_from([*rule_texts()]) | st.text("aA the'one1,.-;? \n\t٣", max_size=20), max_size=3
)
ANSWER = ANSWERS.map("".join)


@steady
@given(prediction=ANSWER, answers=st.lists(ANSWER, min_size=10, max_size=10), agreeing=st.integers(0, 10))
def test_any_answers_score_as_the_literal_program_does(prediction: str, answers: list[str], agreeing: int) -> None:
    answers = [prediction] * agreeing + answers[agreeing:]
    rows = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]
    annotation = {"question_id": 0, "answers": rows, "answer_type": "other", "question_type": "what"}
    program = ReferenceEvaluation([annotation], [{"question_id": 0, "answer": prediction}])
    program.evaluate()
    assert vqa_accuracy(prediction, answers) == program.evalQA[0]
    record = {"id": "0", "answers": answers, "answer_type": "other", "question_type": "what"}
    assert (
        TASKS["vqa"].score(texts_alone({"0": prediction}), [record]).to_dict()["overall"] == program.accuracy["overall"]
    )
    assert normalize_answer(prediction) == REFERENCE.normalize(prediction)


# The adapter reader.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PaliGemma:
    directory = tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))
    return PaliGemma.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(model: PaliGemma, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an adapter that may be changed."""
    directory = tmp_path_factory.mktemp("whole") / "adapter"
    inject_lora(
        model, LoRAConfig(rank=2, targets=("language.1.q_proj", "vision.fc1"), modules_to_save=("connector.linear",))
    )
    save_adapter(model, directory)
    remove_lora(model)
    (directory / "manifest.json").unlink()
    return directory


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def assert_opens_or_is_refused(model: PaliGemma, directory: Path) -> dict[str, torch.Tensor] | None:
    """The tensors that were put in, None where refused; the model is a plain one afterwards, and was so if refused."""
    message = ""
    try:
        load_adapter(model, directory)
    except ValueError as refusal:
        message = str(refusal)
    if message:
        assert str(directory) in message
        assert not any(adapters(model))
        return None
    loaded = adapter_tensors(model)
    assert all(tensor.isfinite().all() for tensor in loaded.values())
    peft_config(model)
    remove_lora(model)
    return loaded


@steady
@given(
    content=st.binary(max_size=200)
    | st.builds(lambda n, rest: n.to_bytes(8, "little") + rest, st.integers(0, 90), st.binary())
)
def test_any_bytes_as_tensors_are_refused(model: PaliGemma, adapter: Path, content: bytes) -> None:
    with replaced(adapter / WEIGHTS_FILE, content):
        assert assert_opens_or_is_refused(model, adapter) is None


@steady
@given(content=st.binary(max_size=200) | JSON.map(json.dumps).map(str.encode))
def test_any_json_as_configuration_is_refused(model: PaliGemma, adapter: Path, content: bytes) -> None:
    with replaced(adapter / CONFIG_FILE, content):
        assert assert_opens_or_is_refused(model, adapter) is None


SETTINGS = ["r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "modules_to_save"]
SETTINGS += [
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "bias",
    "peft_type",
    "init_lora_weights",
    "layers_to_transform",
]
REGEX = st.text(alphabet=".*()|[]\\?+{}9q_proj", max_size=12)


@steady
@given(
    changes=st.dictionaries(
        st.sampled_from(SETTINGS) | ANY_TEXT,
        JSON | REGEX | st.lists(REGEX) | st.dictionaries(REGEX, st.integers(1, 8)),
        min_size=1,
        max_size=2,
    )
)
def test_any_values_of_settings_open_with_finite_scales_or_are_refused(
    model: PaliGemma, adapter: Path, changes: dict[str, Any]
) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text()) | changes
    with replaced(adapter / CONFIG_FILE, json.dumps(config).encode()):
        assert_opens_or_is_refused(model, adapter)


PATHS = ["language_model.model.layers.1.self_attn.q_proj", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"]
NAMES = st.sampled_from([f"{PREFIX}{WRITTEN(path)}.lora_{side}.weight" for path in PATHS for side in "AB"]) | ANY_TEXT
SHAPES = st.lists(st.integers(0, 3) | st.sampled_from([24, 32, 64]), max_size=3)
READABLE = [torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
OTHERS += [torch.int32, torch.uint16, torch.uint8, torch.bool]
DTYPES = st.sampled_from([*READABLE, *OTHERS])


@steady
@given(given=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), max_size=5))
def test_any_tensors_are_refused_if_they_are_not_the_adapters(
    model: PaliGemma, adapter: Path, given: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    with contextlib.suppress(UnicodeEncodeError):  # a name no file can hold
        content = save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in given.items()})
        with replaced(adapter / WEIGHTS_FILE, content):
            assert assert_opens_or_is_refused(model, adapter) is None


@settings(steady, max_examples=50)
@given(dtypes=st.lists(DTYPES, min_size=1, max_size=4), seed=st.integers(0, 9))
def test_the_adapters_own_tensors_open_in_every_float_of_checkpoints_and_in_no_other_dtype(
    model: PaliGemma, adapter: Path, dtypes: list[torch.dtype], seed: int
) -> None:
    inject_lora(
        model, LoRAConfig(rank=2, targets=("language.1.q_proj", "vision.fc1"), modules_to_save=("connector.linear",))
    )
    tensors = {
        n: torch.randn(t.shape, generator=torch.Generator().manual_seed(seed))
        for n, t in adapter_tensors(model).items()
    }
    remove_lora(model)
    cast = {name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(tensors.items())}
    with replaced(adapter / WEIGHTS_FILE, save(cast)):
        loaded = assert_opens_or_is_refused(model, adapter)
    readable = all(dtype in READABLE for dtype in dtypes)
    assert (loaded is not None) == readable
    assert loaded is None or all(torch.equal(loaded[name], tensor.float()) for name, tensor in cast.items())
