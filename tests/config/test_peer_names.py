"""An unknown key that PEFT, TRL and the like have is answered with the key that means the same here."""

import re
from collections import Counter
from pathlib import Path

import pytest

from finetune.config.describe import json_schema
from finetune.config.load import load_config
from finetune.config.peer_names import PEER_NAMES, PEER_VALUES, ROWS
from finetune.config.schema import RunConfig
from tests.config.minimal import keys
from tests.config.test_load import problems

PLACES = ["", "model.", "image.", "connector.", "data.", "data.train.", "lora.", "train.", "evaluation.", "tracking."]


@pytest.fixture
def valid(path: Path) -> set[str]:
    """Dotted names of all keys."""
    return set(keys(load_config(path, ["data.validation.jsonl=v.jsonl"]).model_dump(mode="json")))


def test_every_key_that_the_table_names_is_one(valid: set[str]) -> None:
    sections = "|".join(json_schema()["properties"])
    for name, ours in PEER_NAMES.items():
        named = re.findall(rf"\b(?:{sections})\.(?!py\b)\w+(?:\.\w+)*", ours.note)
        assert set(ours.keys) | set(named) <= valid, name
    assert PEER_VALUES.keys() <= valid


def test_no_name_in_the_table_is_a_key_itself_or_stands_there_twice(valid: set[str]) -> None:
    assert not PEER_NAMES.keys() & valid
    assert not [name for name, count in Counter(" ".join(names for names, *_ in ROWS).split()).items() if count > 1]


@pytest.mark.parametrize("place", PLACES)
def test_every_name_is_answered_wherever_it_is_unknown(path: Path, valid: set[str], place: str) -> None:
    asked = {place + name for name in PEER_NAMES if "." not in name} | {name for name in PEER_NAMES if "." in name}
    found = problems(path, *(f"{name}=1" for name in sorted(asked - valid)))
    for name in asked - valid:
        line = next(line for line in found if line.startswith(f"override '{name}=1': {name}: unknown key; "))
        ours = PEER_NAMES.get(name) or PEER_NAMES[name.rpartition(".")[2]]
        assert ours.note in line
        for key in ours.keys:
            own = f"{place}{key.rpartition('.')[2]}"
            assert re.search(rf"did you mean (.* or )?({re.escape(key)}|{re.escape(own)})\b", line)
        assert ours.keys or "did you mean" not in line


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("lora.r=8", "lora.r: unknown key; did you mean lora.rank?"),
        ("r=8", "r: unknown key; did you mean lora.rank?"),
        ("train.lr=1e-4", "train.lr: unknown key; did you mean train.learning_rate?"),
        ("learning_rate=1e-4", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("connector.lr=1e-4", "connector.lr: unknown key; did you mean connector.learning_rate?"),
        ("lora.lora_alpha=32", "lora.lora_alpha: unknown key; did you mean lora.alpha?"),
        ("train.num_train_epochs=3", "train.num_train_epochs: unknown key; did you mean train.epochs?"),
        (
            "train.gradient_accumulation_steps=4",
            "train.gradient_accumulation_steps: unknown key; did you mean train.micro_batch (a step takes "
            "train.batch_size examples, so on one device accumulation steps = train.batch_size / train.micro_batch)?",
        ),
        (
            "per_device_train_batch_size=4",
            "per_device_train_batch_size: unknown key; did you mean train.micro_batch (examples at once on the device; "
            "a step takes train.batch_size examples, over all micro-batches)?",
        ),
        (
            "lora.target_modules=all-linear",
            "lora.target_modules: unknown key; did you mean lora.targets (a list of SCOPE.COMPONENT, such as "
            "language.q_proj; all-linear is [language.*, vision.*, connector.*])?",
        ),
        (
            "lora.targets=all-linear",
            'lora.targets: got "all-linear"; expected list of text; did you mean [language.*, vision.*, connector.*] '
            "(or [language.*], which is the decoder alone)?",
        ),
        (
            "warmup_steps=10",
            "warmup_steps: unknown key; did you mean train.warmup (as a share of all steps, such as 0.05)?",
        ),
        ("model.name=x", "model.name: unknown key; did you mean model.path?"),
        (
            "lora.use_dora=true",
            "lora.use_dora: unknown key; DoRA is not implemented, rank-stabilised scaling (lora.rslora) is: leave it "
            "out",
        ),
        ("peft.lora_config.r=8", "peft.lora_config.r: unknown key; did you mean lora.rank?"),
        ("training.num_train_epochs=1", "training.num_train_epochs: unknown key; did you mean train.epochs?"),
        ("train.lora.rank=8", "train.lora: unknown key; did you mean lora?"),
        ("validation.jsonl=v", "validation: unknown key; did you mean data.validation?"),
        ("training_args=null", "training_args: unknown key; did you mean train?"),
        ("training_args={}", "training_args: unknown key; did you mean train?"),
        ("max_steps=8", "max_steps: unknown key; did you mean train.max_steps?"),
        ("trian.seed=1", "trian: unknown key; did you mean train?"),
    ],
)
def test_what_is_answered(path: Path, override: str, answer: str) -> None:
    assert problems(path, override) == [f"override {override!r}: {answer}"]


def test_keys_in_a_section_of_the_peers_are_answered_line_by_line(path: Path) -> None:
    text = path.read_text() + "training_args:\n  output_dir: runs/two\n  no_such_key: 1\n  lr_scheduler_type: cosine\n"
    assert problems(path, text=text) == [
        "run.yaml:6: training_args: unknown key; did you mean train?",
        "run.yaml:7: training_args.output_dir: unknown key; did you mean output?",
        "run.yaml:9: training_args.lr_scheduler_type: unknown key; did you mean train.schedule (cosine, linear or "
        "constant)?",
    ]


def test_a_section_of_which_nothing_is_known_is_named_alone(path: Path) -> None:
    sections = ", ".join(RunConfig.model_fields)
    assert problems(path, "zzz={a: 1, b: {c: 2}}") == [
        f"override 'zzz={{a: 1, b: {{c: 2}}}}': zzz: unknown key; expected {sections}"
    ]
