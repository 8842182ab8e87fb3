"""Corrupt adapters, training checkpoints and base checkpoints in every way we know, open them, and see what happens.

    python -m tests.fuzz --files 10000 [--seed 0]

Each case corrupts one file of a whole directory. It must end in one of three ways:

    refused      a ValueError that names the file or its directory; a training checkpoint is passed over for the one
                 before it, with the reason
    the same     what was loaded equals the original bit for bit: parameters, and whatever else the files declare
    as it says   where no manifest lists the file, and the values of tensors or a setting of a configuration were
                 changed: nobody can know that from the file, but what was loaded is what the changed files mean, by the
                 reader written here and PEFT's rule for patterns

Under a manifest, every change of a listed file must be refused. Anything else, another exception, five minutes without
an answer or a gigabyte asked for, is a violation, is printed with its seed, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from peft.utils.other import get_pattern_key
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import LoRAConfig, inject_lora, load_adapter, remove_lora, save_adapter
from finetune.adapters.storage import LAYOUTS, PREFIX
from finetune.lora.nf4 import open_base
from finetune.lora.protocol import AdapterModule, adapters, trained_parameters
from finetune.system.atomic import MANIFEST, write_whole
from finetune.training.checkpoints import (
    gather_state,
    newest_whole,
    read_optimizer_state,
    read_parameters,
    write_checkpoint,
)
from model import ConnectorConfig, PaliGemma, PaliGemmaConfig
from model.config import TextConfig, VisionConfig
from model.convert import changed, convert
from model.random_init import from_random
from tests import tiny

OUTCOMES = ("refused", "the same", "as it says", "violation")
SECONDS, MEMORY = 300, 2**30  # that a case may take, and that it may ask for
ADAPTER = LoRAConfig(
    rank=4,
    alpha=8,
    targets=("language.*", "vision.fc1"),
    dropout=0.1,
    rslora=True,
    rank_pattern={"language.q_proj": 2},
    alpha_pattern={"language.1.q_proj": 5},
    modules_to_save=("connector.linear",),
)
NETWORK = (ConnectorConfig("resampler", latents=3, depth=1, seed=5), 56, 4, "pad")  # connector, size, tiles, aspect
JUNK: list[Any] = [None, True, False, 0, 1, 2, -1, 7, 64, 0.5, 4.0, 1e300, math.inf, math.nan, 10**30, 2**40, "", "x"]
JUNK += ["4", "(", "(a+)+$", "a{99999999999}", "\ud800", "\0", "x" * 300, ".", ".*", [], [1], ["q_proj"], [[]], {}]
JUNK += [{"a": 1}, {"q_proj": 8}, {"(": 2}]

Random = random.Random
Snapshot = dict[str, Any]
Entry = dict[str, Any]  # of a safetensors header: dtype, shape, data_offsets


class StuckError(BaseException):
    """No answer in time: no reader may take it for a fault of the file."""


# The files' formats, read by nothing of ours.


def unpack(content: bytes) -> tuple[dict[str, Entry], bytes]:
    """Header and values of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack(header: Any, values: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def values_of(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes as fp32 of every tensor of a file."""
    header, values = unpack(path.read_bytes())
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(values[start:stop]), dtype=types[entry["dtype"]])
            found[name] = (tuple(entry["shape"]), flat.float().numpy().tobytes())
    return found


def frozen(tensors: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """The same of tensors in memory."""
    return {name: (tuple(t.shape), t.detach().float().contiguous().numpy().tobytes()) for name, t in tensors.items()}


def renamed(found: dict[str, Any], spelled: dict[str, str]) -> dict[str, Any]:
    """By our names; a tensor that no spelling of them names stays apart under its own."""
    return {spelled.get(name, name): value for name, value in found.items()}


# What is opened.


class Family(Protocol):
    """A whole directory, how it is loaded, and all that its files may mean."""

    directory: Path

    def load(self) -> Snapshot: ...

    def meanings(self) -> list[Snapshot]: ...


class Adapters:
    """An adapter with all that an adapter may have; the base it is put into is a single one throughout.

    network: it was trained on another network than the base's.
    """

    def __init__(self, directory: Path, listed: bool, network: bool = False) -> None:
        self.directory, self.base = directory, tiny_model(directory.parent)
        self.model = copy.deepcopy(self.base)
        if network:
            convert(self.model, changed(self.model.config, *NETWORK))
        full = ("connector.*",) if network else ADAPTER.modules_to_save
        inject_lora(self.model, dataclasses.replace(ADAPTER, modules_to_save=full))
        with torch.no_grad():
            for parameter in trained_parameters(self.model).values():
                parameter.add_(torch.randn_like(parameter))
        save_adapter(self.model, directory)
        self.modules = {path: adapter.settings is None for path, adapter in adapters(self.model)}
        names = trained_parameters(self.model)
        self.spelled = {
            prefix + layout(name) + end: name
            for name in names
            for layout in LAYOUTS.values()
            for prefix in (PREFIX, "")
            for end in ("", ".weight")
        }
        self.empty()
        if not listed:
            (directory / MANIFEST).unlink()

    def load(self) -> Snapshot:
        try:
            load_adapter(self.model, self.directory)
        except Exception:
            other = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
            other += [path for path, _ in adapters(self.model)]
            other += [
                name for name, p in self.base.named_parameters() if not torch.equal(p, self.model.get_parameter(name))
            ]
            same_config = self.model.config == self.base.config
            self.empty()
            assert same_config, "not loaded, but the network is another"
            assert not other, f"not loaded, but the network has another {other[0]}"
            raise
        declared = {path: settings_of(a) for path, a in adapters(self.model)}
        network = network_of(self.model.config)
        snapshot = {"tensors": frozen(trained_parameters(self.model)), "declared": declared, "network": network}
        self.empty()
        return snapshot

    def empty(self) -> None:
        """Take out whatever was put into the base, and what it was converted to."""
        if self.model.config == self.base.config:
            remove_lora(self.model)
            self.model.requires_grad_(True)
        else:
            self.model = copy.deepcopy(self.base)

    def network(self, config: dict[str, Any]) -> dict[str, Any]:
        """What a configuration says of the network, with what the base and the connectors' defaults say beside it."""
        said = config.get("network", {})
        found = network_of(self.base.config) | connector_of(said.get("connector", {})) | said
        return {key: found[key] for key in network_of(self.base.config)}

    def meanings(self) -> list[Snapshot]:
        """One for each layout that the names in patterns may be meant in."""
        config = json.loads((self.directory / "adapter_config.json").read_text())
        tensors = renamed(values_of(self.directory / "adapter_model.safetensors"), self.spelled)
        return [
            {
                "tensors": tensors,
                "network": self.network(config),
                "declared": {
                    path: None if in_full else self.declared(config, layout(path))
                    for path, in_full in self.modules.items()
                },
            }
            for layout in LAYOUTS.values()
        ]

    def declared(self, config: dict[str, Any], spelled: str) -> tuple[int, float, float]:
        def of(pattern: str, default: str) -> Any:
            given = config.get(pattern) or {}
            return given.get(get_pattern_key(list(given), spelled), config[default])

        rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), config.get("lora_dropout") or 0.0


class Bases:
    """A base checkpoint in one file or in shards, the latter with the head that is tied and the one that is unused.

    network: another than the published one.
    """

    def __init__(self, directory: Path, listed: bool = False, sharded: bool = False, network: bool = False) -> None:
        self.directory = directory
        model = tiny_model(directory.parent)
        if network:
            convert(model, changed(model.config, *NETWORK))
        write_whole(directory, model.save_pretrained)
        self.spelled = {layout(name): name for name in model.state_dict() for layout in LAYOUTS.values()}
        if sharded:
            tensors = load_file(directory / "model.safetensors")
            tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
            tensors["vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 24)
            self.shard(tensors)
        if not listed:
            (directory / MANIFEST).unlink()

    def shard(self, tensors: dict[str, Tensor]) -> None:
        names = sorted(tensors)
        parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, self.directory / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.directory / "model.safetensors").unlink()

    def load(self) -> Snapshot:
        model = open_base(self.directory, torch.float32, "cpu")
        return {"tensors": frozen(dict(model.named_parameters())), "declared": dataclasses.asdict(model.config)}

    def meanings(self) -> list[Snapshot]:
        hf = json.loads((self.directory / "config.json").read_text())
        vision, text = hf.get("vision_config") or {}, hf.get("text_config") or {}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        text = {"rope_theta": 10000.0} | text | rope
        sections = {"vision": (vision, VisionConfig()), "text": (text, TextConfig())}
        declared: dict[str, Any] = {
            name: {key: default if given.get(key) is None else given[key] for key, default in vars(defaults).items()}
            for name, (given, defaults) in sections.items()
        }
        declared["connector"] = connector_of(hf.get("connector") or {})
        declared["tiles"] = 1 if hf.get("tiles") is None else hf["tiles"]
        declared["aspect"] = "squash" if hf.get("aspect") is None else hf["aspect"]
        declared["image_token_id"] = hf.get("image_token_index", hf.get("image_token_id", 257152))
        for number, name in enumerate(("pad_token_id", "eos_token_id", "bos_token_id")):
            declared[name] = next((s[name] for s in (hf, text) if s.get(name) is not None), number)
        tensors: dict[str, Any] = {}
        for path in self.directory.glob("*.safetensors"):
            tensors |= renamed(values_of(path), self.spelled)
        tensors.pop("lm_head.weight", None)
        tensors.pop("vision_tower.vision_model.head.probe", None)
        return [{"tensors": tensors, "declared": declared}]


class Checkpoints:
    """The newest of two training checkpoints."""

    def __init__(self, directory: Path) -> None:
        model = tiny_model(directory.parent)
        inject_lora(model, LoRAConfig(rank=2, targets=("language.q_proj",)))
        self.trained = trained_parameters(model)
        self.optimizer = torch.optim.AdamW(self.trained.values())
        for step in (2, 4):
            for parameter in self.trained.values():
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step()
            documents = {"trainer_state.json": {"global_step": step, "log": [1.5, None]}, "best.json": {"a": 1}}
            self.directory = write_checkpoint(directory, step, gather_state(self.trained, self.optimizer), documents)

    def load(self) -> Snapshot:
        newest, skipped = newest_whole(self.directory.parent)
        assert newest is not None, "no checkpoint is left, though one was not touched"
        if newest != self.directory:
            raise ValueError("; ".join(skipped))
        read_parameters(newest, self.trained)
        read_optimizer_state(newest, self.trained, self.optimizer)
        stored = {
            f"{name}/{key}": value for name, p in self.trained.items() for key, value in self.optimizer.state[p].items()
        }
        documents = {name: (newest / name).read_text() for name in ("trainer_state.json", "best.json")}
        return {"tensors": frozen({**self.trained, **stored}), "declared": documents}

    def meanings(self) -> list[Snapshot]:
        return []


def network_of(config: PaliGemmaConfig) -> dict[str, Any]:
    """What of a network may be another than its checkpoint's."""
    image = {"image_size": config.vision.image_size, "tiles": config.tiles, "aspect": config.aspect}
    return dataclasses.asdict(config.connector) | image


def connector_of(said: dict[str, Any]) -> dict[str, Any]:
    """What is said of a connector, with the defaults beside it. A seed of nothing that is drawn is none."""
    found = dataclasses.asdict(ConnectorConfig()) | said
    is_drawn = found["start"] != "pretrained" or found["kind"] == "resampler"
    return found | ({} if is_drawn else {"seed": 0})


def settings_of(adapter: AdapterModule) -> tuple[int, float, float] | None:
    """Rank, scale and dropout; None of a module trained in full."""
    if (settings := adapter.settings) is None:
        return None
    return settings.rank, settings.alpha / settings.rank ** (0.5 if settings.rslora else 1), settings.dropout


def tiny_model(directory: Path) -> PaliGemma:
    (directory / "config.json").write_text(json.dumps(tiny.CONFIG))
    model = from_random(directory, seed=0)
    model.source = None
    tiny.randomize(model)
    return model


# How files are corrupted: the name of a corruption is the kind of damage in the table; it changes a file's content.

Corruption = Callable[[Random, bytes], bytes]


def cut_short(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def emptied(rng: Random, content: bytes) -> bytes:
    return b""


def bytes_appended(rng: Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.choice([1, 8, 4096]))


def bits_flipped(rng: Random, content: bytes, start: int, stop: int) -> bytes:
    corrupted = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        corrupted[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(corrupted)


def tensors_header_bits_flipped(rng: Random, content: bytes) -> bytes:
    return bits_flipped(rng, content, 0, len(content) - len(unpack(content)[1]))


def tensors_value_bits_flipped(rng: Random, content: bytes) -> bytes:
    return bits_flipped(rng, content, len(content) - len(unpack(content)[1]), len(content))


def tensors_value_block_zeroed(rng: Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) - len(unpack(content)[1]), len(content))
    return content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]


def tensors_length_of_header_changed(rng: Random, content: bytes) -> bytes:
    length = rng.choice([0, 1, 2**63, 2**64 - 1, 2**27, len(content), len(content) - 8, rng.randrange(len(content))])
    return struct.pack("<Q", length) + content[8:]


def tensors_header_garbled(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    text = json.dumps(header).encode()
    shapes = [
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        text.decode().encode("utf-16"),
        b"\xff" * 9,
    ]
    return pack(rng.choice([*shapes, text[:-1] + b',"a":{}}', text[:-1] + b',"a":[1]}', text + b"x"]), values)


def named(header: dict[str, Entry]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def repacked(header: dict[str, Entry], values: bytes) -> bytes:
    """A well-formed file of the tensors in a header, whose offsets may point to the same values twice."""
    offset, parts, fresh = 0, [], {}
    for name in named(header):
        start, stop = header[name]["data_offsets"]
        fresh[name] = header[name] | {"data_offsets": [offset, offset + stop - start]}
        parts.append(values[start:stop])
        offset += stop - start
    return pack(fresh, b"".join(parts))


def tensor_removed(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    del header[rng.choice(named(header))]
    return repacked(header, values)


def tensor_renamed(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    old = rng.choice(named(header))
    header[other_name(rng, old, named(header))] = header.pop(old)
    return repacked(header, values)


def tensor_duplicated(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    old = rng.choice(named(header))
    fresh = other_name(rng, old, named(header))
    return repacked({fresh: header[old]} | header, values)


def other_name(rng: Random, name: str, names: list[str]) -> str:
    """A misspelling, a name beside the network's, another layout's spelling, or that of another tensor."""
    place = rng.randrange(len(name))
    bare = name.removeprefix(PREFIX).removeprefix("model.")
    choices = [name[:place] + name[place + 1 :], name[:place] + "x" + name[place:], name.upper(), "", "model." + name]
    choices += [name.replace("layers.0", "layers.7"), bare, PREFIX + bare, "lm_head.weight", name + ".weight"]
    choices += [bare.replace("language_model.model.", "language_model."), "vision_tower.vision_model.head." + bare]
    return rng.choice([*choices, rng.choice(names)])


def tensors_exchanged(rng: Random, content: bytes) -> bytes:
    """Two of the same number of bytes, where there are any, each with the other's values."""
    header, values = unpack(content)
    size = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in named(header)}
    first = rng.choice(named(header))
    second = rng.choice([name for name in size if size[name] == size[first]])
    one, other = header[first], header[second]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    return pack(header, values)


def tensor_shape_edited(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    entry = header[rng.choice(named(header))]
    shape = entry["shape"]
    others = [
        shape[::-1],
        [math.prod(shape)],
        [1, *shape],
        [],
        [0],
        [-d for d in shape],
        [2**62, 4],
        [2**64],
        [10**30, 0],
    ]
    others += [
        [float(d) for d in shape],
        [str(d) for d in shape],
        [None],
        None,
        "x",
        5,
        {},
        [[]],
        [99, *shape[1:]],
    ]
    entry["shape"] = rng.choice(others)
    return pack(header, values)


def tensor_dtype_edited(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    entry = header[rng.choice(named(header))]
    entry["dtype"] = rng.choice(
        [
            "F64",
            "F16",
            "BF16",
            "I32",
            "U32",
            "I8",
            "BOOL",
            "C64",
            "F8_E4M3",
            "F8_E8M0",
            "F4",
            "f32",
            "",
            None,
            32,
            [],
            {},
        ]
    )
    return pack(header, values)


def tensor_offsets_edited(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    entry, other = (header[rng.choice(named(header))] for _ in range(2))
    start, stop = entry["data_offsets"]
    others: list[Any] = [
        other["data_offsets"],
        [stop, start],
        [start + 4, stop + 4],
        [start - 4, stop - 4],
        [start, stop + 4],
    ]
    others += [
        [-4, stop],
        [start, 2**63],
        [float(start), float(stop)],
        [str(start), str(stop)],
        [start],
        [start, stop, 0],
    ]
    others += [
        [None, None],
        None,
        "x",
        {},
        [start + len(values), stop + len(values)],
        [math.nan, stop],
        [math.inf, math.inf],
    ]
    entry["data_offsets"] = rng.choice(others)
    return pack(header, values)


def tensor_named_twice_in_header(rng: Random, content: bytes) -> bytes:
    header, values = unpack(content)
    name = rng.choice(named(header))
    entry = header[rng.choice(named(header))]
    return pack(json.dumps(header).encode()[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode(), values)


def json_bits_flipped(rng: Random, content: bytes) -> bytes:
    return bits_flipped(rng, content, 0, len(content))


def json_garbled(rng: Random, content: bytes) -> bytes:
    return rng.choice(
        [b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"{}", b'"x"', b"9" * 5000, b"\xff\xfe\x00", b"\x00"]
    )


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every value of a JSON document: what holds it, and its key there."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else []
    return [(document, key) for key in keys] + [place for key in keys for place in places(document[key])]


def json_value_changed(rng: Random, content: bytes) -> bytes:
    document = json.loads(content)
    holder, key = rng.choice(places(document))
    holder[key] = rng.choice(JUNK)
    return json.dumps(document).encode()


def json_number_changed(rng: Random, content: bytes) -> bytes:
    document = json.loads(content)
    numbers = [(holder, key) for holder, key in places(document) if type(holder[key]) in (int, float)]
    for holder, key in rng.sample(numbers, min(1, len(numbers))):
        holder[key] = rng.choice([holder[key] * 2, holder[key] + 1, holder[key] / 2, -holder[key], str(holder[key])])
    return json.dumps(document).encode()


def json_value_removed(rng: Random, content: bytes) -> bytes:
    document = json.loads(content)
    holder, key = rng.choice(places(document))
    del holder[key]
    return json.dumps(document).encode()


def json_key_renamed(rng: Random, content: bytes) -> bytes:
    document = json.loads(content)
    holder, key = rng.choice([place for place in places(document) if isinstance(place[0], dict)])
    at = rng.randrange(len(key))
    holder[key[:at] + rng.choice(["", "x", "\0", "."]) + key[at + 1 :]] = holder.pop(key)
    return json.dumps(document).encode()


def json_key_added(rng: Random, content: bytes) -> bytes:
    document = json.loads(content)
    holder, _ = rng.choice([place for place in places(document) if isinstance(place[0], dict)])
    holder[rng.choice(["", "x", "use_dora", "layers_to_transform", "lm_head.weight", "\ud800", "x" * 300])] = (
        rng.choice(JUNK)
    )
    return json.dumps(document).encode()


def json_key_twice(rng: Random, content: bytes) -> bytes:
    """The last one counts, to every reader of JSON that we know."""
    key = rng.choice(list(json.loads(content)))
    return content.rstrip()[:-1] + f",{json.dumps(key)}:{json.dumps(rng.choice(JUNK))}}}".encode()


ANY: list[Corruption] = [cut_short, emptied, bytes_appended]
OF_TENSORS: list[Corruption] = [
    tensors_header_bits_flipped,
    tensors_value_bits_flipped,
    tensors_value_block_zeroed,
    tensors_length_of_header_changed,
    tensors_header_garbled,
    tensor_removed,
    tensor_renamed,
    tensor_duplicated,
    tensors_exchanged,
    tensor_shape_edited,
    tensor_dtype_edited,
    tensor_offsets_edited,
    tensor_named_twice_in_header,
]
OF_JSON: list[Corruption] = [
    json_bits_flipped,
    json_garbled,
    json_value_changed,
    json_number_changed,
    json_value_removed,
    json_key_renamed,
    json_key_added,
    json_key_twice,
]
OTHER_VALUES = (tensors_value_bits_flipped, tensors_value_block_zeroed, tensors_exchanged)  # a whole file, with others

# What stands in a file's place.
IN_PLACE: dict[str, Callable[[Path, bytes], object]] = {
    "file removed": lambda path, content: None,
    "file a directory": lambda path, content: path.mkdir(),
    "file a link to nothing": lambda path, content: path.symlink_to("nothing"),
    "file a link to itself": lambda path, content: path.symlink_to(path.name),
    "file a link to another": lambda path, content: path.symlink_to(
        next(p for p in path.parent.iterdir() if p != path)
    ),
    "file a link to its copy": lambda path, content: link_to_copy(path, content),
}


def link_to_copy(path: Path, content: bytes) -> None:
    (path.parent.parent / "copy").write_bytes(content)
    path.symlink_to(path.parent.parent / "copy")


# The run.


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=10_000, help="how many files to corrupt")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next one")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        counts, violations = fuzz(Path(directory), arguments.files, arguments.seed)
    Console(width=120).print(table(counts))
    if violations:
        sys.exit("not as promised:\n  " + "\n  ".join(violations))
    print(f"{counts.total():,} corrupted files: none was loaded silently wrong, and none ended in another error")


def fuzz(directory: Path, files: int, seed: int) -> tuple[Counter[tuple[bool, str, str]], list[str]]:
    """Cases by manifest, kind and outcome; and the violations, each with its seed."""
    torch.manual_seed(0)
    families = open_families(directory)
    originals = [family.load() for family in families]
    counts: Counter[tuple[bool, str, str]] = Counter()
    violations = []
    with bounded(MEMORY), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regular expressions
        for number in range(seed, seed + files):
            rng = random.Random(number)
            place = number % len(families)
            listed, kind, outcome, detail = one(families[place], originals[place], rng)
            counts[listed, kind, outcome] += 1
            if outcome == "violation":
                violations.append(f"--seed {number}: {families[place].directory.name}: {kind}: {detail}")
    return counts, violations


def open_families(directory: Path) -> list[Family]:
    made: list[tuple[Any, str, dict[str, bool]]] = [
        (Adapters, "adapter", {"listed": False}),
        (Adapters, "adapter-with-manifest", {"listed": True}),
        (Adapters, "adapter-of-another-network", {"listed": False, "network": True}),
        (Bases, "base", {}),
        (Bases, "base-in-shards", {"sharded": True}),
        (Bases, "base-with-manifest", {"listed": True}),
        (Bases, "base-of-another-network", {"network": True}),
        (Checkpoints, "checkpoints", {}),
    ]
    families: list[Family] = []
    for kind, name, keywords in made:
        (directory / name).mkdir()
        families.append(kind(directory / name / name, **keywords))
    return families


def one(family: Family, original: Snapshot, rng: Random) -> tuple[bool, str, str, str]:
    """Corrupt a file, open its directory, put the file back: whether a manifest was there, kind, outcome and detail."""
    path = rng.choice(sorted(family.directory.iterdir()))
    content = path.read_bytes()
    listed = (family.directory / MANIFEST).exists() and path.name != MANIFEST
    kind, may_mean_another = corrupt(path, content, rng)
    is_changed = not path.is_file() or path.read_bytes() != content
    try:
        with limited(SECONDS):
            loaded = family.load()
    except ValueError as error:
        is_named = path.name in str(error) or str(family.directory) in str(error)
        outcome, detail = ("refused", "") if is_named else ("violation", f"does not say where: {error}")
    except (Exception, StuckError) as error:
        outcome, detail = "violation", f"{type(error).__name__}: {error}"
    else:
        outcome, detail = judge(family, original, loaded, is_changed and listed, may_mean_another)
    finally:
        clear(path)
        path.write_bytes(content)
    return listed, kind, outcome, detail.replace("\n", " ")[:300]


def judge(
    family: Family, original: Snapshot, loaded: Snapshot, must_refuse: bool, may_mean_another: bool
) -> tuple[str, str]:
    if must_refuse:
        return "violation", "the manifest does not list it like this, and it was loaded"
    if loaded == original:
        return "the same", ""
    if may_mean_another and loaded in family.meanings():
        return "as it says", ""
    return "violation", "loaded silently wrong"


def corrupt(path: Path, content: bytes, rng: Random) -> tuple[str, bool]:
    """Corrupt a file that nothing is known of but its name: the kind, and whether a whole file may have come of it."""
    of_tensors = path.suffix == ".safetensors"
    choices: list[Any] = [*ANY, *(OF_TENSORS if of_tensors else OF_JSON), *IN_PLACE]
    choice = rng.choice(choices)
    clear(path)
    if isinstance(choice, str):
        IN_PLACE[choice](path, content)
        return choice, False
    path.write_bytes(choice(rng, content))
    settings = path.name in ("adapter_config.json", "config.json") and choice in (*OF_JSON, *ANY)
    return choice.__name__.replace("_", " "), settings or choice in OTHER_VALUES


def clear(path: Path) -> None:
    """Take away whatever stands at a path, so that what is mapped of it stays as it was."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stuck(number: int, frame: FrameType | None) -> None:
        raise StuckError(f"no answer in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded(more: int) -> Iterator[None]:
    """Of address space, no more than so many bytes above what is taken now."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def table(counts: Counter[tuple[bool, str, str]]) -> Table:
    made = Table("listed in a manifest", "damage", *OUTCOMES)
    for listed, kind in sorted({key[:2] for key in counts}):
        made.add_row("yes" if listed else "no", kind, *(str(counts[listed, kind, outcome]) for outcome in OUTCOMES))
    totals = [str(sum(n for key, n in counts.items() if key[2] == outcome)) for outcome in OUTCOMES]
    made.add_row("", "all", *totals, style="bold")
    return made


if __name__ == "__main__":
    main()
