"""Several sources of examples in one configuration: what a list of them means, and which lists are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import ConfigError, dump_config, load_config
from finetune.config.schema import RunConfig
from finetune.config.source import Source
from finetune.training.resume import differences
from tests.config.minimal import MINIMAL

QUESTIONS, CAPTIONS = "jsonl: q/train.jsonl", "jsonl: c/captions.jsonl"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    return tmp_path / "run.yaml"


def test_a_list_takes_turns_by_weight_and_is_named_by_its_files(path: Path) -> None:
    config = load_config(path, [f"data.train=[{{{QUESTIONS}, weight: 3}}, {{{CAPTIONS}, name: about, weight: 1}}]"])
    sources = config.data.sources("train")
    assert [(source.called, source.weight) for source in sources] == [("train", 3), ("about", 1)]
    assert list(config.data.places("train")) == ["data.train.0", "data.train.1"]
    assert config.data.title("train") == "train.jsonl and captions.jsonl"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_a_single_source_is_no_list(path: Path) -> None:
    data = load_config(path).data
    assert data.sources("train") == (data.train,)
    assert list(data.places("train")) == ["data.train"]
    assert data.only("train") is data.train
    assert data.sources("validation") == ()


def test_auto_validates_on_the_sources_of_training(path: Path) -> None:
    data = load_config(path, ["data.validation=auto"]).data
    assert data.sources("validation") == data.sources("train")
    assert data.title("validation") == "a tenth of q.json"
    with pytest.raises(ValueError, match=r"data\.validation is 'auto'; expected a single source"):
        data.only("validation")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            f"data.train=[{{{QUESTIONS}, weight: 3}}, {{{CAPTIONS}}}]",
            "data.train.1.weight: another source has a weight",
        ),
        (
            f"data.train=[{{{QUESTIONS}}}, {{jsonl: other/train.csv}}]",
            "data.train.1.name: data.train.1 and data.train.0 are both",
        ),
        (f"data.train=[{{{QUESTIONS}, weight: 0}}]", "data.train.0.weight: got 0; expected number > 0"),
        (f"data.train=[{{{QUESTIONS}, fracton: 0.5}}]", "data.train.0.fracton: unknown key; did you mean"),
        (f"data.train=[{{{QUESTIONS}, weight: 1e308}}]", "data.train.0.weight: got 1e+308; expected number"),
        ("data.train=[]", "data.train: got []; expected section or list of sections, not an empty one"),
        ("data.train=[{questions: q.json, images: i}]", "data.train.0.annotations: training needs the answers"),
        (f"data.train={{{QUESTIONS}, weight: 2}}", "data.train.weight: it is for a list of sources"),
        (f"data.validation=[{{{QUESTIONS}, weight: 2}}]", "data.validation.0.weight: every validation source is"),
        ("data.validation=some", 'data.validation: got "some"; expected section or list of sections, not an empty one'),
        ("train.patience=2", "train.patience: evaluating needs data.validation"),
    ],
)
def test_what_a_list_cannot_be_is_named_at_its_key(path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(path, [override])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("path", "called"),
    [("a/b c &.jsonl", "b-c"), ("a/*.parquet", "source"), ("/", "source"), (".", None), ("a/..", None)],
)
def test_every_source_is_called_something(path: str, called: str | None) -> None:
    """Its ids begin with that, and its figures are under it."""
    here = Path.cwd().name
    assert Source(folder=path).called == (called or here)


def test_a_single_source_instead_of_a_list_differs_where_something_is_said(path: Path) -> None:
    """Not in the two dozen kinds of sources that neither is."""
    before = load_config(path, [f"data.train=[{{{QUESTIONS}}}, {{{CAPTIONS}, count: 3}}]"])
    found = differences(before, load_config(path, [f"data.train={{{QUESTIONS}}}"]))["result"]
    assert "data.train.1.jsonl: was c/captions.jsonl, is (absent)" in found
    assert "data.train.1.count: was 3, is (absent)" in found
    assert not [line for line in found if "None" in line]


def test_another_weight_leads_to_another_result() -> None:
    for key in ("data.train.0.weight", "data.train.jsonl", "data.validation", "train.patience"):
        assert RunConfig.effect_of(key) == "result"


def test_a_run_evaluates_where_there_is_something_to_evaluate_on(path: Path) -> None:
    assert not load_config(path).evaluates
    assert load_config(path, ["data.validation=auto"]).evaluates
    assert not load_config(path, ["data.validation=auto", "train.eval_every=null"]).evaluates
    assert not load_config(path, ["data.validation={questions: v.json, images: coco}"]).evaluates  # no answers
