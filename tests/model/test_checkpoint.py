"""Published layouts into our names and back: strictly, and within the memory of the weights."""

from __future__ import annotations

import errno
import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

from model import PaliGemma, PaliGemmaConfig, fetch, safetensors_io
from model.random_init import from_random
from model.safetensors_io import MappedFile, StoredTensor, refuse_unreadable
from tests import rounding, tiny
from tests.rounding import computed_by

EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the hub layout, written by us."""
    directory = tmp_path_factory.mktemp("hub")
    tiny.save_library_model(tiny.library_model(tiny.CONFIG), directory / "library")
    PaliGemma.from_pretrained(directory / "library", dtype=torch.float32).save_pretrained(directory / "ours")
    return directory / "ours"


def write(source: Path, directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, directory / "model.safetensors")
    return directory


def rename(key: str, language: str, vision: str, rest: str) -> str:
    """A hub key under other prefixes."""
    for ours, theirs in (("language_model.model.", language), ("vision_tower.vision_model.", vision)):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return rest + key


LAYOUTS = {
    "hub": ("language_model.model.", "vision_tower.vision_model.", ""),
    "5.x from config": ("model.language_model.", "model.vision_tower.", "model."),
    "4.57": ("model.language_model.", "model.vision_tower.vision_model.", "model."),
    "flat": ("language_model.", "vision_tower.", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_every_known_layout_is_read(saved: Path, tmp_path: Path, layout: str, head: str | None) -> None:
    tensors = load_file(saved / "model.safetensors")
    renamed = {rename(key, *LAYOUTS[layout]): tensor for key, tensor in tensors.items()}
    renamed["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 24)
    if head:
        renamed[head] = tensors[EMBEDDING].clone()
    loaded = PaliGemma.from_pretrained(write(saved, tmp_path / "other", renamed), dtype=torch.float32)
    assert loaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_are_cast_on_the_way_in(saved: Path, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {key: tensor.to(stored) for key, tensor in load_file(saved / "model.safetensors").items()}
    loaded = PaliGemma.from_pretrained(write(saved, tmp_path / "cast", tensors), dtype=wanted)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tensors[key].to(wanted)), key


def test_shards_are_read(tmp_path: Path) -> None:
    library = tiny.library_model(tiny.CONFIG)
    library.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    batch = tiny.batch(tiny.CONFIG, [5])
    with torch.no_grad():
        ours = PaliGemma.from_pretrained(tmp_path, dtype=torch.float32)
        mine, theirs = (computed_by(model, lambda m: m(**batch).logits) for model in (ours, library))
    rounding.assert_same(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_opens_what_we_save_with_nothing_missing(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    ours = PaliGemma.from_pretrained(saved, dtype=dtype)
    ours.save_pretrained(tmp_path)
    opened: Any = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    library, info = opened
    assert not any(info.values()), info
    assert library.dtype == dtype
    batch = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])
    real = batch["attention_mask"].bool()
    # In fp32 whatever was stored: transformers 4 and 5 round bf16 in another order.
    library = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ours = PaliGemma.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        theirs = computed_by(library.eval(), lambda model: model(**batch).logits[real])
        del batch["labels"]
        mine = computed_by(ours, lambda model: model(**batch).logits[real])
    rounding.assert_same(mine, theirs)


def test_saved_keys_are_the_hubs_and_side_files_go_along(tmp_path: Path, saved: Path) -> None:
    source = write(saved, tmp_path / "source", load_file(saved / "model.safetensors"))
    (source / "tokenizer.json").write_text("{}")
    (source / "secrets.txt").write_text("not a part of a checkpoint")
    PaliGemma.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert {key.split(".")[0] for key in load_file(tmp_path / "copy/model.safetensors")} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["language_model.model.norm.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.layers.3.mlp.up_proj.weight"] = torch.zeros(64, 32)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["multi_modal_projector.linear.bias"] = torch.zeros(31)


def untie(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors[EMBEDDING] + 1


def repeat(tensors: dict[str, Tensor]) -> None:
    tensors["model.language_model.norm.weight"] = torch.zeros(32)


def test_a_checkpoint_is_saved_over_the_one_that_was_opened(tmp_path: Path) -> None:
    """On a CPU, weights in the file's dtype are its own bytes, mapped into memory."""
    tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path)
    model = PaliGemma.from_pretrained(tmp_path, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    for state in (model.state_dict(), PaliGemma.from_pretrained(tmp_path, dtype=torch.float32).state_dict()):
        assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (drop, r"missing \(1\): language_model.model.norm.weight"),
        (add, r"unexpected \(1\): language_model.model.layers.3.mlp.up_proj.weight"),
        (reshape, r"mis-shaped \(1\): multi_modal_projector.linear.bias \[31\] instead of \[32\]"),
        (untie, "lm_head.weight differs from the embedding"),
        (repeat, r"present twice \(1\): language_model.model.norm.weight"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    saved: Path, tmp_path: Path, corrupt: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = load_file(saved / "model.safetensors")
    corrupt(tensors)
    with pytest.raises(ValueError, match=message):
        PaliGemma.from_pretrained(write(saved, tmp_path / "corrupted", tensors))


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_cut_off_file_is_refused(saved: Path, tmp_path: Path, keep: int) -> None:
    directory = write(saved, tmp_path / "cut", load_file(saved / "model.safetensors"))
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        PaliGemma.from_pretrained(directory)


Header = dict[str, Any]
BIAS, NORM = "multi_modal_projector.linear.bias", "language_model.model.norm.weight"


def overlap(header: Header) -> None:
    header[BIAS]["data_offsets"] = header[NORM]["data_offsets"]


def leave_a_gap(header: Header) -> None:
    del header[BIAS]


def not_whole(header: Header) -> None:
    header[BIAS]["data_offsets"] = [float(offset) for offset in header[BIAS]["data_offsets"]]


def negative(header: Header) -> None:
    header[BIAS]["shape"] = [-1, -32]


def too_large(header: Header) -> None:
    header[BIAS]["shape"] = [2**62, 2**10, 32]  # 32 to whom counts in 64 bits


@pytest.mark.parametrize("corrupt", [overlap, leave_a_gap, not_whole, negative, too_large])
def test_a_header_that_is_not_of_its_file_is_refused(
    saved: Path, tmp_path: Path, corrupt: Callable[[Header], None]
) -> None:
    directory = write(saved, tmp_path / "corrupted", load_file(saved / "model.safetensors"))
    content = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    corrupt(header)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        PaliGemma.from_pretrained(directory)


def test_a_file_with_bytes_after_its_tensors_is_refused(saved: Path, tmp_path: Path) -> None:
    directory = write(saved, tmp_path / "longer", load_file(saved / "model.safetensors"))
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"is damaged .*its tensors end at byte"):
        PaliGemma.from_pretrained(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content", [None, b"[" * 100_000, b"9" * 5000, b'{"weight_map": {"a": 5}}', b'{"text_config": "x"}']
)
def test_json_that_cannot_be_used_is_named(saved: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    directory = write(saved, tmp_path / "garbled", load_file(saved / "model.safetensors"))
    (directory / name).unlink(missing_ok=True)
    if content is None:
        (directory / name).mkdir()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        PaliGemma.from_pretrained(directory)


def test_a_config_that_asks_for_more_than_the_file_has_takes_no_memory(saved: Path, tmp_path: Path) -> None:
    """The embedding alone would be of 4 TB."""
    directory = write(saved, tmp_path / "large", load_file(saved / "model.safetensors"))
    hf = tiny.config(hidden_size=2**20, projection_dim=2**20, text__hidden_size=2**20, text__vocab_size=2**20)
    (directory / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        PaliGemma.from_pretrained(directory)


def test_only_a_plain_network_is_saved(saved: Path, tmp_path: Path) -> None:
    ours = PaliGemma.from_pretrained(saved)
    ours.multi_modal_projector.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"unexpected \(1\): multi_modal_projector.lora_A"):
        ours.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["no/such/dir", "/nowhere", "./owner/name", "name"])
def test_a_directory_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path} is neither a directory nor a Hub id .*: correct the path, or give"):
        PaliGemma.from_pretrained(path)


def response(status: int) -> Any:
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://example.invalid"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.GatedRepoError("gated", response=response(403)), "licence must be accepted first"),
        (
            lambda: errors.RepositoryNotFoundError("absent", response=response(404)),
            "neither a directory here nor a model",
        ),
        (lambda: errors.RevisionNotFoundError("absent", response=response(404)), "no revision 'bf17'"),
        (
            lambda: errors.LocalEntryNotFoundError("offline"),
            r"licence at https://huggingface\.co/google/paligemma-3b-pt-224, run `hf auth login` and start again",
        ),
        (lambda: OSError("no route"), "Correct the path; or, for a model on the Hub"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), r"cannot be written to the Hub's cache .*No space"),
    ],
)
def test_a_hub_model_that_cannot_be_had_gives_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message) as caught:
        PaliGemma.from_pretrained("google/paligemma-3b-pt-224", revision="bf17")
    assert "\n" not in str(caught.value)


def test_a_revision_of_a_directory_is_said_to_have_no_effect(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"is a directory: revision 'bfloat16', of a Hub id, has no effect"):
        fetch(saved, "bfloat16")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes, 4 bits, nf4",
        ),
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes, int8"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
    ],
)
@pytest.mark.parametrize("section", [None, "text_config"])
def test_a_quantised_checkpoint_is_told_what_it_is(
    saved: Path, tmp_path: Path, settings: dict[str, Any], kind: str, section: str | None
) -> None:
    hf = json.loads((saved / "config.json").read_text()) | {"_name_or_path": "google/origin"}
    (hf[section] if section else hf)["quantization_config"] = settings
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=rf"is quantised \({kind}\).*made from \(google/origin\).*model\.quantize=nf4"):
        PaliGemma.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int32])
def test_packed_weights_are_no_damage(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Where config.json does not say that the checkpoint is quantised, its tensors do."""
    tensors = load_file(saved / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.float32).to(dtype)
    directory = write(saved, tmp_path / "packed", tensors)
    with pytest.raises(ValueError, match=rf"is of a quantised checkpoint \({name} is stored in .*model\.quantize=nf4"):
        PaliGemma.from_pretrained(directory)
    with pytest.raises(ValueError, match="is of a quantised checkpoint"):
        refuse_unreadable(directory)


def test_the_hub_is_asked_for_the_revision_and_only_for_what_is_read(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("google/paligemma-3b-pt-224", "bfloat16")
        assert "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert PaliGemma.from_pretrained("google/paligemma-3b-pt-224", revision="bfloat16").source == saved


MEASURE = """
import sys, torch
from model import PaliGemma, safetensors_io
safetensors_io.CHUNK //= 16  # as this network is smaller than the published one
def status(name):
    return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1]) * 1024
with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # the meta device imports 75 MB of code once, whatever the size of the network
before = status("VmRSS")
model = PaliGemma.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / weights)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fp32, beside whose weights what Python takes is little."""
    directory = tmp_path_factory.mktemp("wide")
    hf = tiny.config(text__hidden_size=1024, hidden_size=1024, projection_dim=1024, text__intermediate_size=16384)
    (directory / "config.json").write_text(json.dumps(hf))
    from_random(directory, seed=0).save_pretrained(directory)
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("wanted", "least", "most"), [("float32", 0.0, 0.1), ("bfloat16", 0.9, 1.1)])
def test_loading_takes_little_more_than_the_weights(wide: Path, wanted: str, least: float, most: float) -> None:
    """Cast, one copy of what was asked for; as they are, nothing until they are looked at."""
    ran = subprocess.run([sys.executable, "-c", MEASURE, wide, wanted], capture_output=True, text=True, check=True)
    assert least <= float(ran.stdout) < most


def test_what_is_written_to_loaded_weights_does_not_reach_their_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    from_random(tmp_path, seed=0).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = PaliGemma.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path)
    assert not any(p.any() for p in PaliGemma.from_pretrained(tmp_path, dtype=torch.float32).parameters())


def test_a_config_survives_the_way_there_and_back() -> None:
    config = PaliGemmaConfig.from_hf(tiny.CONFIG)
    assert PaliGemmaConfig.from_hf(config.to_hf(torch.bfloat16)) == config


def test_the_published_224_config_means_its_defaults() -> None:
    """What the published file says; everything it leaves out has to come from the defaults."""
    published = {
        "model_type": "paligemma",
        "hidden_size": 2048,
        "image_token_index": 257152,
        "projection_dim": 2048,
        "vocab_size": 257216,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 256,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
            "vocab_size": 257216,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_image_tokens": 256,
            "patch_size": 14,
            "projection_dim": 2048,
            "projector_hidden_act": "gelu_fast",
            "vision_use_head": False,
        },
    }
    config = PaliGemmaConfig.from_hf(published)
    assert config == PaliGemmaConfig()
    assert (config.text.head_dim, config.text.rope_theta, config.text.rms_norm_eps) == (256, 10000.0, 1e-6)
    assert (config.vision.image_size, config.vision.num_patches, config.vision.layer_norm_eps) == (224, 256, 1e-6)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in PaliGemma(config).parameters()) == 2_923_466_480


@pytest.mark.parametrize(
    ("form", "theta"),
    [
        ({"rope_theta": 5000.0}, 5000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, 5000.0),
        ({"rope_scaling": None, "rope_theta": 5000.0}, 5000.0),
        ({"hidden_act": "gelu", "hidden_activation": None}, 10000.0),
    ],
)
def test_both_config_forms_are_read(form: dict[str, Any], theta: float) -> None:
    hf = tiny.config()
    hf["text_config"].update(form)
    assert PaliGemmaConfig.from_hf(hf).text.rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type at the top level is 'llava'"),
        ({"text__model_type": "gemma2"}, "'gemma2'; this network implements 'gemma' only"),
        ({"text__hidden_act": "silu"}, "hidden_act at text_config is 'silu'"),
        ({"text__rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"projection_dim": 64}, "projection_dim"),
        ({"vision__patch_size": 13}, "image_size by patch_size"),
        ({"image_token_index": 128}, "image_token_index 128 has no row"),
        ({"image_token_index": -1}, "image_token_id at the top level is -1; expected a whole number, 0 to"),
        ({"text__head_dim": 16.0}, "head_dim at text_config is 16.0; expected a whole number, 1 to"),
        ({"vision__hidden_size": "24"}, "hidden_size at vision_config is '24'; expected a whole number"),
        ({"text__num_hidden_layers": 10**6}, "num_hidden_layers at text_config is 1000000; expected .* 1 to 1024"),
        ({"text__rope_theta": math.nan}, "rope_theta at text_config is nan; expected a finite number above 0"),
        ({"vision__layer_norm_eps": "1e-6"}, "layer_norm_eps at vision_config is '1e-6'; expected a finite number"),
    ],
)
def test_other_architectures_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaliGemmaConfig.from_hf(tiny.config(**changes))


@pytest.mark.parametrize("offset", [0, 4, 2, 7])
def test_a_tensor_is_read_from_wherever_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """In chunks and by a cast, and what lies beside it in the file is still there afterwards."""
    monkeypatch.setattr(safetensors_io, "CHUNK", 1000)
    values = torch.randn(37, 100)
    file = tmp_path / "tensors"
    file.write_bytes(bytes(range(offset)) + values.numpy().tobytes() + b"beside")
    mapped, target = MappedFile(file), torch.empty(37, 100, dtype=torch.bfloat16)
    StoredTensor(file, offset, torch.float32, (37, 100)).read_into(target, mapped)
    assert torch.equal(target, values.bfloat16())
    assert bytes(mapped.content[-6:].tolist()) == b"beside"
    assert bytes(mapped.content[:offset].tolist()) == bytes(range(offset))
