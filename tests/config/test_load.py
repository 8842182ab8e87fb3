"""A configuration is read as it stands, or refused with all that is wrong, where, and what was expected."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.load import ConfigError, dump_config, load_config, parse_override
from finetune.config.schema import RunConfig
from finetune.lora.linear import LoRAConfig
from finetune.system.paths import written
from tests.config.minimal import MINIMAL


def problems(path: Path, *overrides: str, text: str | None = None) -> list[str]:
    """The lines of the ConfigError, the file under its bare name."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), path.name).splitlines()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=2e-5", 2e-5),
        ("train.learning_rate=1", 1.0),
        ("train.max_steps=1e5", 100_000),
        ("data.train.count=100", 100),
        ("data.train.fraction=0.1", 0.1),
        ("data.prompt=caption en {question}", "caption en {question}"),
        ("data.prompt='{question}'", "{question}"),
        ("tracking.wandb=off", "off"),
        ("tracking.wandb=offline", "offline"),
        ("tracking.name=yes", "yes"),
        ("tracking.name=2020-01-01", "2020-01-01"),
        ("output=runs/a=b", "runs/a=b"),
        ("model.device=cuda:1", "cuda:1"),
        ("lora=null", None),
        ("lora={rank: 4}", LoRAConfig(rank=4)),
        ("lora.targets=[language.q_proj, vision.*]", ("language.q_proj", "vision.*")),
        ("lora.rank_pattern={language.q_proj: 4}", {"language.q_proj": 4}),
        ("lora.alpha=8", 8.0),
        ("evaluation.count=null", None),
        ("train.recompute=18", 18),
    ],
)
def test_overrides_are_applied_to_the_file(path: Path, override: str, expected: Any) -> None:
    value: Any = load_config(path, [override])
    for key in override.partition("=")[0].split("."):
        value = getattr(value, key)
    assert value == expected
    assert type(value) is type(expected)


def test_a_later_override_wins_and_sections_are_made_on_the_way(path: Path) -> None:
    overrides = ["lora=null", "lora.rank=2", "lora.alpha=4", "data.validation.jsonl=v.jsonl", "lora.rank=3"]
    config = load_config(path, overrides)
    assert config.lora == LoRAConfig(rank=3, alpha=4)
    assert config.data.validation is not None
    assert config.data.only("validation").jsonl == "v.jsonl"


def test_an_override_replaces_what_the_file_has_wrong(path: Path) -> None:
    path.write_text(MINIMAL.replace("max_steps: 100", "max_steps: many"))
    assert load_config(path, ["train.max_steps=5"]).train.max_steps == 5


def test_parsed_overrides_are_paths_and_values() -> None:
    assert parse_override("data.train.count=100") == (("data", "train", "count"), 100)
    assert parse_override("lora=null") == (("lora",), None)
    assert parse_override("a=[1, b]") == (("a",), [1, "b"])


@pytest.mark.parametrize(
    "override", ["", "=", "train", "=1", "train.=1", ".seed=1", "a b=1", "a..b=1", "a" + ".a" * 500 + "=1"]
)
def test_a_malformed_override_says_how_one_looks(override: str) -> None:
    with pytest.raises(ConfigError, match=r"override .*: expected section\.key=value, such as train\.max_steps=100"):
        parse_override(override)


@pytest.mark.parametrize(
    "override", ["lora=", "train.seed=[1", "train.seed={a: 1, a: 2}", "train.seed=!!python/name:os.x"]
)
def test_a_value_that_is_no_yaml_is_quoted_with_its_override(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override {override!r}: ")):
        parse_override(override)


ALL_WRONG = """\
model: {path: x, dtype: bf16, devise: cpu}
data:
  train: {questions: q.json, images: coco}
  promt: hello
train:
  epochs: 1
  max_steps: 1e5
  batch_size: 4
  learning_rate: "1e-4"
  lr: 3
  zzz: 3
  seed: -1
  warmup:
rank: 8
lora:
  rnk: 3
  targets: language.q_proj
  rank_pattern: {language.q_proj: 1.5}
output: 2024
output: 3
tracking: {wandb: yes, name: yes}
"""


def test_all_problems_are_listed_at_once_with_line_value_and_expectation(path: Path) -> None:
    assert problems(path, "train.batch=3", "x", text=ALL_WRONG) == [
        "run.yaml:13: train.warmup: nothing given (null would say: none)",
        "run.yaml:20: output: the key occurs a second time",
        "override 'x': expected section.key=value, such as train.max_steps=100",
        'run.yaml:1: model.dtype: got "bf16"; expected bfloat16 | float32; did you mean bfloat16?',
        "run.yaml:1: model.devise: unknown key; did you mean device?",
        "run.yaml:3: data.train.annotations: training needs the answers: give the annotations of questions",
        "run.yaml:4: data.promt: unknown key; did you mean prompt?",
        'run.yaml:17: lora.targets: got "language.q_proj"; expected list of text',
        "run.yaml:18: lora.rank_pattern.language.q_proj: got 1.5; expected a valid integer",
        "run.yaml:16: lora.rnk: unknown key; did you mean rank?",
        "run.yaml:7: train.max_steps: got 100000 with epochs 1.0; expected one of the two, null the other",
        'run.yaml:9: train.learning_rate: got "1e-4"; expected number > 0',
        "run.yaml:12: train.seed: got -1; expected whole number >= 0, < 4294967296",
        "run.yaml:10: train.lr: unknown key; did you mean train.learning_rate?",
        "run.yaml:11: train.zzz: unknown key; expected objective, reference, epochs, max_steps, batch_size, "
        "micro_batch, recompute, learning_rate, schedule, warmup, weight_decay, beta1, beta2, max_grad_norm, seed, "
        "log_every, save_every, eval_every, patience, keep_checkpoints, on_full_disk",
        "override 'train.batch=3': train.batch: unknown key; did you mean batch_size?",
        "run.yaml:20: output: got 3; expected text, in quotes",
        'run.yaml:21: tracking.wandb: got "yes"; expected off | offline | online',
        "run.yaml:14: rank: unknown key; did you mean lora.rank?",
    ]


@pytest.mark.parametrize("name", ["float16", "fp16", "half"])
def test_float16_is_refused_with_the_reason(path: Path, name: str) -> None:
    assert problems(path, f"model.dtype={name}") == [
        f"override 'model.dtype={name}': model.dtype: {name} is refused: Gemma's activations overflow in fp16; "
        "use bfloat16, or float32 on a card without bfloat16"
    ]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.max_steps=true", "train.max_steps: got true; expected whole number >= 1 or null"),
        ("train.max_steps=1.0", "train.max_steps: got 1.0; expected whole number >= 1 or null"),
        ("train.max_steps='1'", 'train.max_steps: got "1"; expected whole number >= 1 or null'),
        ("train.max_steps=1.5e0", "train.max_steps: got 1.5; expected whole number"),
        ("train.max_steps=0", "train.max_steps: got 0; expected whole number >= 1 or null"),
        ("train.learning_rate=true", "train.learning_rate: got true; expected number > 0"),
        ("train.learning_rate=0", "train.learning_rate: got 0; expected number > 0"),
        ("train.learning_rate=1e999", 'train.learning_rate: got "1e999"; expected number > 0'),
        ("train.learning_rate=.inf", 'train.learning_rate: got ".inf"; expected number > 0'),
        ("train.learning_rate=null", "train.learning_rate: got null; expected number > 0"),
        ("train.warmup=1", "train.warmup: got 1; expected number >= 0, < 1"),
        ("train.recompute=gate_up", 'train.recompute: got "gate_up"; expected whole number >= 0 or auto'),
        ("train.recompute=true", "train.recompute: got true; expected whole number >= 0 or auto"),
        ("train.recompute=false", "train.recompute: got false; expected whole number >= 0 or auto"),
        ("train.recompute=all", 'train.recompute: got "all"; expected whole number >= 0 or auto'),
        ("train.micro_batch=0", "train.micro_batch: got 0; expected whole number >= 1 or auto"),
        ("train.schedule=cosin", "expected cosine | linear | constant; did you mean cosine?"),
        ("train.seed=4294967296", "train.seed: got 4294967296; expected whole number >= 0, < 4294967296"),
        ("train.eval_every=10", "train.eval_every: evaluating needs data.validation"),
        ("train.epochs=1", "train.max_steps: got 100 with epochs 1.0; expected one of the two"),
        ("train.max_steps=null", "train.max_steps: neither epochs nor max_steps is given: how long is the run"),
        ("train.micro_batch=65", "train.micro_batch: micro_batch (65) must not exceed batch_size (64)"),
        ("train=3", "train: got 3; expected section"),
        ("data.train.fraction=0", "data.train.fraction: got 0; expected number > 0, <= 1 or null"),
        (
            "data.train.jsonl=x.jsonl",
            "data.train.jsonl: expected either questions, images and perhaps annotations, or one of jsonl, csv",
        ),
        ("data.train.images=null", "data.train.images: the official files are questions, images"),
        ("data.train={}", "data.train.questions: expected either questions, images"),
        ("data.train.annotations=null", "data.train.annotations: training needs the answers"),
        ("data.train.sample_by=images", "expected image | question; did you mean image?"),
        ("data.prompt=answer en", "data.prompt: expected one line that contains {question}, got 'answer en'"),
        ('data.prompt="{question}\\n"', "data.prompt: expected one line that contains {question}"),
        ("data.prompt={question}", "question: nothing given"),  # braces without quotes are a mapping
        ("data.workers=-1", "data.workers: got -1; expected whole number >= 0"),
        ("model.device=gpu", 'model.device: got "gpu"; expected text matching ^(auto|cpu|mps|cuda(:[0-9]+)?)$'),
        ("model.device=cuda:one", 'model.device: got "cuda:one"'),
        ("model.path=''", 'model.path: got ""; expected text'),
        ("model=null", "model: got null; expected section"),
        ("lora.rank=true", "lora.rank: got true; expected whole number"),
        ("lora.rank=0", "lora.rank: got 0; expected whole number >= 1"),
        ("lora.alpha=0", "lora.alpha: got 0; expected number > 0"),
        ("lora.dropout=1", "lora.dropout: got 1; expected number >= 0, < 1"),
        (
            "lora.rank_pattern={language.q_proj: 0}",
            "lora.rank_pattern.language.q_proj: got 0; expected whole number >= 1",
        ),
        ("lora.alpha_pattern={language.q_proj: -1}", "lora.alpha_pattern.language.q_proj: got -1; expected number > 0"),
        (
            "lora.targets=[q_proj, v_proj]",
            "lora.targets.0: got 'q_proj'; expected SCOPE.COMPONENT with scope language, vision, connector; "
            "did you mean language.q_proj?",
        ),
        ("lora.targets=[all-linear]", "lora.targets.0: got 'all-linear'; expected SCOPE.COMPONENT with scope"),
        ("lora.method=dora", "lora.method: got 'dora'; expected lora"),
        ("lora.alpha=text", 'lora.alpha: got "text"; expected number'),
        ("lora.targets=[1]", "lora.targets.0: got 1; expected a valid string"),
        ("lora=16", "lora: got 16; expected section or null"),
        ("batch_size=8", "batch_size: unknown key; did you mean train.batch_size or evaluation.batch_size?"),
        ("lora.train_in_full=[]", "lora.train_in_full: unknown key; did you mean lora.modules_to_save?"),
        ("tracking.wandb=true", "tracking.wandb: got true; expected off | offline | online"),
        ("output=null", "output: got null; expected text"),
    ],
)
def test_nothing_is_converted_or_guessed(path: Path, override: str, complaint: str) -> None:
    found = problems(path, override)
    assert len(found) == 1
    assert found[0].startswith(f"override {override!r}: ")
    assert complaint in found[0]


OFFICIAL = "data: {train: {questions: q.json, annotations: a.json, images: coco}}"
JSONL = "data: {train: {jsonl: t.jsonl}, validation: {jsonl: v.jsonl}}"


@pytest.mark.parametrize(
    ("lines", "override", "key", "complaint"),
    [
        ([JSONL, "train: {max_steps: 9}"], "train.epochs=1", "train.max_steps", "got 9 with epochs 1.0"),
        (
            [JSONL, "train: {epochs: 1}"],
            "train.epochs=null",
            "train.max_steps",
            "neither epochs nor max_steps is given",
        ),
        (
            [JSONL, "train: {epochs: 1, batch_size: 64, micro_batch: 64}"],
            "train.batch_size=32",
            "train.micro_batch",
            "micro_batch (64) must not exceed batch_size (32)",
        ),
        (
            [JSONL, "train: {epochs: 1, eval_every: 5}"],
            "data.validation=null",
            "train.eval_every",
            "evaluating needs data.validation",
        ),
        (
            ["data: {train: {jsonl: t.jsonl, count: 5}}", "train: {epochs: 1}"],
            "data.train.fraction=0.5",
            "data.train.count",
            "count (5) excludes fraction (0.5)",
        ),
        (
            [OFFICIAL, "train: {epochs: 1}"],
            "data.train.images=null",
            "data.train.images",
            "the official files are",
        ),
        ([JSONL, "train: {epochs: 1}"], "data.train.questions=q.json", "data.train.jsonl", "expected either questions"),
        (
            [OFFICIAL, "train: {epochs: 1}"],
            "data.train.annotations=null",
            "data.train.annotations",
            "needs the answers",
        ),
        (
            ["data: {train: {jsonl: t.jsonl}, truncate_answers: true, max_text_tokens: 9}", "train: {epochs: 1}"],
            "data.max_text_tokens=auto",
            "data.truncate_answers",
            "cut at max_text_tokens, which is auto",
        ),
        (
            [JSONL, "train: {epochs: 1}", "connector: {latents: 3}"],
            "model.connector=null",
            "connector.latents",
            "got 3, which is how a connector is made",
        ),
        (
            [JSONL, "train: {epochs: 1}", "connector: {learning_rate: 1e-3}", "lora: {targets: [connector.*]}"],
            "lora.targets=[language.*]",
            "connector.learning_rate",
            "got 0.001, and nothing of the connector is trained",
        ),
        (
            [JSONL, "train: {epochs: 1}", "lora: null"],
            "model.quantize=nf4",
            "lora",
            "null trains the base weights themselves",
        ),
        (
            [JSONL, "train: {epochs: 1}", "stages: [{name: a, epochs: 1}]"],
            "model.connector=null",
            "stages",
            "model.connector names none",
        ),
        (
            [JSONL, "train: {epochs: 1}", "model: {path: x, connector: mlp}", "stages: [{name: a, epochs: 1}]"],
            "lora=null",
            "stages",
            "lora: null trains all of it",
        ),
        (
            [JSONL, "train: {epochs: 1}", "stages: [{name: a, epochs: 1}]"],
            "stages.0.epochs=null",
            "stages.0.max_steps",
            "expected either max_steps or epochs",
        ),
        (
            [
                *(JSONL, "train: {epochs: 1}", "model: {path: x, connector: mlp}"),
                "stages: [{name: a, epochs: 1}, {name: b, epochs: 1}]",
            ],
            "stages.0.name=b",
            "stages.1.name",
            "got b, which stages.0 is called; expected a name of its own",
        ),
    ],
)
def test_what_an_override_makes_wrong_elsewhere_is_blamed_on_the_override(
    path: Path, lines: list[str], override: str, key: str, complaint: str
) -> None:
    """The key at fault stands in the file, as it did when the file was right."""
    model = [] if any(line.startswith("model:") for line in lines) else ["model: {path: x}"]
    found = problems(path, override, text="\n".join([*model, *lines, "output: o", ""]))
    assert len(found) == 1
    assert found[0].startswith(f"override {override!r}: {key}: ")
    assert complaint in found[0]


def test_without_an_override_the_same_is_blamed_on_the_line(path: Path) -> None:
    text = MINIMAL.replace("{max_steps: 100}", "\n  max_steps: 100\n  batch_size: 8\n  micro_batch: 9")
    assert problems(path, "train.seed=1", text=text) == [
        "run.yaml:7: train.micro_batch: micro_batch (9) must not exceed batch_size (8)"
    ]


def test_a_target_without_scope_is_named_with_its_own_line(path: Path) -> None:
    text = MINIMAL + "lora:\n  targets:\n  - language.q_proj\n  - v_proj\n"
    assert problems(path, text=text)[0].startswith("run.yaml:9: lora.targets.1: got 'v_proj'; expected SCOPE.COMPONENT")


def test_count_and_fraction_exclude_each_other(path: Path) -> None:
    found = problems(path, "data.train.count=5", "data.train.fraction=0.5")
    assert found == [
        "override 'data.train.count=5': data.train.count: count (5) excludes fraction (0.5): give one of them"
    ]


def test_evaluation_during_training_needs_answers(path: Path) -> None:
    questions = ["train.eval_every=10", "data.validation={questions: v.json, images: coco}"]
    assert "train.eval_every: evaluating needs data.validation" in problems(path, *questions)[0]
    assert load_config(path, questions[1:]).data.validation is not None
    for answered in ("data.validation.annotations=v_a.json", "data.validation={jsonl: v.jsonl}"):
        assert load_config(path, [*questions, answered]).train.eval_every == 10


def test_missing_sections_are_named_with_their_meaning(path: Path) -> None:
    assert problems(path, text="model: {path: x}\ndata: {}\n") == [
        "run.yaml:2: data.train: required, but not given: Examples to train on: a source, or a list of sources that "
        "take turns (a mixture).",
        "run.yaml:1: train: required, but not given: How it is learned. A step is one update of the weights, by "
        "batch_size examples.",
        "run.yaml:1: output: required, but not given: Directory of the run, such as runs/NAME.",
    ]


@pytest.mark.parametrize(("text", "line"), [("", 1), ("[1, 2]", 1), ("text", 1), ("null", 1), ("\n\na: [", 3)])
def test_a_file_that_is_no_mapping_is_refused(path: Path, text: str, line: int) -> None:
    found = problems(path, "train.seed=1", text=text)
    assert len(found) == 1
    assert found[0].startswith(f"run.yaml:{line}: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_misspelled_key_is_named_and_what_it_should_have_set_is_not(tmp_path: Path) -> None:
    minimal = "model: {path: p}\ndata: {train: {jsonl: f}}\ntrain: {epoch: 3}\noutput: o\n"
    (tmp_path / "run.yaml").write_text(minimal)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml")
    assert str(caught.value) == f"{tmp_path}/run.yaml:3: train.epoch: unknown key; did you mean epochs?"
    (tmp_path / "run.yaml").write_text(minimal.replace("{epoch: 3}", "{learning_rate: 1e-4}"))
    with pytest.raises(ConfigError, match=r"neither epochs nor max_steps is given: .* Give one, such as epochs: 3"):
        load_config(tmp_path / "run.yaml")


TEXT = st.text(min_size=1)
PATHS = TEXT.map(written).map(lambda text: f"./{text}" if text.startswith("~") else text)
NAMES = st.text(min_size=1).map(lambda text: f"language.{text}")


@settings(deadline=None)
@given(
    data=st.fixed_dictionaries(
        {
            "model": st.fixed_dictionaries({"path": PATHS}, optional={"revision": st.none() | TEXT}),
            "data": st.fixed_dictionaries({"train": st.fixed_dictionaries({"jsonl": PATHS})}),
            "lora": st.none()
            | st.fixed_dictionaries(
                {"rank": st.integers(1, 64), "alpha": st.floats(1e-300, 1e300)},
                optional={"targets": st.lists(NAMES), "rank_pattern": st.dictionaries(NAMES, st.integers(1, 64))},
            ),
            "train": st.fixed_dictionaries(
                {"epochs": st.floats(0, 1e300, exclude_min=True)},
                optional={"learning_rate": st.floats(0, 1, exclude_min=True), "warmup": st.floats(0, 0.999)},
            ),
            "output": PATHS | st.sampled_from(["off", "1e5", "null", "~", "2020-01-01", "0x10"]),
            "tracking": st.fixed_dictionaries({"project": TEXT, "name": st.none() | TEXT}),
        }
    )
)
def test_a_dumped_configuration_loads_as_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    config = RunConfig.model_validate_json(json.dumps(data))
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@settings(deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    assert_loads_or_refuses(tmp_path_factory.getbasetemp() / "bytes.yaml", content)


@settings(deadline=None)
@given(
    at=st.integers(0, len(MINIMAL + ALL_WRONG)),
    cut=st.integers(0, 8),
    put=st.text(max_size=4) | st.sampled_from("{}[]:,&*!#'\"-\n"),
)
def test_a_mangled_file_is_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: int, put: str
) -> None:
    for text in (MINIMAL, ALL_WRONG):
        mangled = text[:at] + put + text[at + cut :]
        assert_loads_or_refuses(tmp_path_factory.getbasetemp() / "mangled.yaml", mangled.encode())


@settings(deadline=None)
@given(
    override=st.text()
    | st.builds("{}={}".format, st.sampled_from(["lora", "train.seed", "a.b", "data.train"]), st.text())
)
def test_any_override_is_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, override: str
) -> None:
    assert_loads_or_refuses(tmp_path_factory.getbasetemp() / "override.yaml", MINIMAL.encode(), override)


def assert_loads_or_refuses(path: Path, content: bytes, *overrides: str) -> None:
    path.write_bytes(content)
    try:
        assert isinstance(load_config(path, overrides), RunConfig)
    except ConfigError as error:
        complaint = str(error)
        assert complaint.startswith((f"{path}:", "override "))
