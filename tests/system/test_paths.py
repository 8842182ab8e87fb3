"""A path in a configuration or an argument means what it means in a shell."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.load import ConfigError, dump_config, load_config
from finetune.config.schema import RunConfig
from finetune.system.paths import did_you_mean, expand, written
from finetune.training.resume import find_checkpoint, start_run

CONFIG = "{{model: {{path: {base}}}, data: {{train: {{jsonl: {data}}}}}, train: {{max_steps: 1}}, output: {output}}}"


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("DATA", "/data/my set")
    monkeypatch.setenv("UNDER_HOME", "~/x")
    monkeypatch.setenv("PRICE", "/costs $5")
    monkeypatch.setenv("NOTHING", "")
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs/a", "/home/anna/runs/a"),
        ("~", "/home/anna"),
        ("$DATA/a.jsonl", "/data/my set/a.jsonl"),
        ("${DATA}2/a", "/data/my set2/a"),
        ("$UNDER_HOME/y", "/home/anna/x/y"),
        ("$PRICE/$$DATA", "/costs $5/$DATA"),
        ("runs/a~b", "runs/a~b"),
        ("./~", "./~"),
        ("a/$", "a/$"),
        ("google/paligemma-3b-pt-224", "google/paligemma-3b-pt-224"),
        ("", ""),
    ],
)
def test_a_text_stands_for_a_path(text: str, path: str) -> None:
    assert expand(text) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOT_SET/a", "environment variable 'NOT_SET', which is not set"),
        ("a/${NOT_SET}", "environment variable 'NOT_SET', which is not set"),
        ("${}", "environment variable ''"),
        ("~nobody-of-this-name/a", "begins with ~nobody-of-this-name"),
        ("$NOTHING", "an empty path"),
    ],
)
def test_what_stands_for_no_path_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(text)


@given(st.text(alphabet="a$~{}/ é", min_size=1).filter(lambda path: not path.startswith("~")))
def test_a_path_that_was_written_is_read_as_itself(path: str) -> None:
    assert expand(written(path)) == path


def config(folder: Path, name: str, **paths: str) -> RunConfig:
    values = {"base": "~/base", "data": "$DATA/a.jsonl", "output": "${DATA}/out", **paths}
    (folder / name).write_text(CONFIG.format(**{key: f'"{value}"' for key, value in values.items()}))
    return load_config(folder / name)


def test_every_path_of_a_configuration_is_expanded(tmp_path: Path) -> None:
    read = config(tmp_path, "run.yaml")
    assert (read.model.path, read.data.only("train").jsonl, read.output) == (
        "/home/anna/base",
        "/data/my set/a.jsonl",
        "/data/my set/out",
    )
    official = "{questions: ~/q, annotations: ~/a, images: $DATA}"
    source = load_config(tmp_path / "run.yaml", [f"data.train={official}"]).data.only("train")
    assert (source.questions, source.annotations, source.images) == ("/home/anna/q", "/home/anna/a", "/data/my set")
    with pytest.raises(ConfigError, match=r"output: '~/\$NOT_SET' names the environment variable 'NOT_SET'"):
        load_config(tmp_path / "run.yaml", ["output=~/$NOT_SET"])


def test_a_run_goes_on_whichever_way_its_paths_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a variable holds a dollar sign, and where it is not set any more."""
    monkeypatch.setenv("DATA", str(tmp_path / "my $HOME"))
    read = config(tmp_path, "run.yaml")
    start_run(read)
    (tmp_path / "my $HOME/out/checkpoints/step-000001").mkdir(parents=True)
    monkeypatch.setattr("finetune.training.resume.newest_whole", lambda directory: (directory, []))
    _, notes = find_checkpoint(read, "auto")
    assert notes == []
    monkeypatch.delenv("DATA")
    again = load_config(Path(read.output) / "config.yaml")
    assert again == read
    assert dump_config(again) == (Path(read.output) / "config.yaml").read_text()
    assert find_checkpoint(again, "auto")[1] == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("data/question.json", "; did you mean {}/data/questions.json?"),
        ("dat/questions.json", "; did you mean {}/data?"),  # the first part that is not there
        ("data/elsewhere", ""),
        ("data/questions.json", ""),
    ],
)
def test_a_typo_in_a_path_is_answered_with_what_is_there(tmp_path: Path, path: str, said: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/questions.json").touch()
    assert did_you_mean(tmp_path / path) == said.format(tmp_path)
