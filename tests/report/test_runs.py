"""The table of runs: what it says of each, what differs among them, and that one which cannot be read stops nothing."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from finetune import __main__ as console
from finetune.config.load import dump_config, load_config
from finetune.report import runs as command
from finetune.training.result import Result

ROOT = Path(__file__).parents[2]


def write_run(directory: Path, *overrides: str, steps: int = 20, finished: bool = True) -> None:
    """What a run leaves, of `steps` steps, half an hour each ten."""
    directory.mkdir(parents=True)
    config = load_config(ROOT / "configs/quickstart.yaml", [*overrides, f"output={directory}"])
    (directory / "config.yaml").write_text(dump_config(config))
    lines = [
        {"step": step, "seconds": 180.0 * step, "memory_gib": 7.5 - step / 100} for step in range(10, steps + 1, 10)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Result(10, "best accuracy", "accuracy", 61.5, 0.5, finished).written(directory):
        pass


def evaluated(directory: Path, accuracy: float) -> None:
    (directory / "eval/adapter").mkdir(parents=True)
    (directory / "eval/adapter/metrics.json").write_text(json.dumps({"overall": accuracy, "interval": [0, 100]}))


def shown(capsys: pytest.CaptureFixture[str], *words: str, width: int = 80) -> str:
    os.environ["COLUMNS"] = str(width)
    try:
        console.dispatch(["runs", *words])
    finally:
        del os.environ["COLUMNS"]
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    """The cells of the first row of a run."""
    line = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_what_the_table_says_of_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one", "lora.rank=8")
    evaluated(tmp_path / "one", 70.25)
    write_run(tmp_path / "two", "lora.rank=16", "train.seed=3", steps=10, finished=False)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").write_text("")
    text = shown(capsys, str(tmp_path))
    assert row(text, "one") == ["one", "61.50", "10", "70.25", "1.0 h", "7.40", "finished"]
    assert row(text, "two")[:-1] == ["two", "61.50", "10", "", "30.0 min", "7.40"]
    assert "stopped at" in row(text, "two")[-1]
    assert "no-run" not in text


def test_only_keys_that_differ_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one", "lora.rank=8")
    write_run(tmp_path / "two", "lora.rank=16", "train.seed=3")
    write_run(tmp_path / "three", "lora.rank=16")
    lines = [line for line in shown(capsys, str(tmp_path)).splitlines() if ": " in line and line.startswith("│")]
    assert [line.strip("│").split("│")[1].strip() for line in lines] == [
        *("lora.rank: 8", "train.seed: 0"),
        *("lora.rank: 16", "train.seed: 0"),  # three, by its name before two
        *("lora.rank: 16", "train.seed: 3"),
    ]
    assert "what differs" not in shown(capsys, str(tmp_path / "one"))


def test_what_a_source_is_not_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one", "data.train={jsonl: a.jsonl}")
    write_run(tmp_path / "two", "data.train=[{jsonl: a.jsonl}, {csv: b.csv, count: 3}]")
    text = shown(capsys, str(tmp_path))
    assert "data.train.jsonl: a.jsonl" in text
    assert "data.train.1.count: 3" in text
    assert "data.train.1.csv: b.csv" in text
    assert "None" not in text


def test_it_is_readable_at_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With names and values that are long, none of which is cut."""
    name = "a-run-with-a-name-of-very-many-letters-that-says-what-was-tried-in-it-0123456789"
    write_run(tmp_path / name, "data.prompt=answer en {question} " + "and so on " * 20, steps=20_000)
    write_run(tmp_path / "two", steps=123_450, finished=False)
    text = shown(capsys, str(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    joined = "".join("".join(line.strip("│┃").split("│")[:1]).strip() for line in text.splitlines())
    assert name in joined
    assert text.count("and so on") >= 15
    assert "123,450" in text


def test_a_run_that_cannot_be_read_is_named_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "one")
    for name, file, content in (
        ("yaml", "config.yaml", "model: ["),
        ("keys", "config.yaml", "modle: {}"),
        ("lines", "metrics.jsonl", '{"step": 1\n'),
        ("steps", "metrics.jsonl", '{"a": 1}\n{"b": 2}\n'),
        ("eval", "eval/adapter/metrics.json", "{"),
    ):
        write_run(tmp_path / name)
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(content)
    text = " ".join(shown(capsys, str(tmp_path), width=200).split())
    assert "│ one │" in text
    for name in ("yaml", "keys", "lines", "steps", "eval"):
        assert f"{tmp_path / name} cannot be read: " in text
        assert f"│ {name} │" not in text


def test_a_run_that_is_being_trained_is_told_from_one_that_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "one", finished=False)
    holder = tmp_path / "one/run.lock.json"
    for pid, host, state in (
        (os.getpid(), platform.node(), "training"),
        (2**22 + 1, platform.node(), "stopped"),  # beyond what Linux gives a process
        (2**22 + 1, "elsewhere", "training"),
    ):
        holder.write_text(json.dumps({"pid": pid, "host": host, "since": "now", "doing": "training"}))
        assert row(shown(capsys, str(tmp_path), width=120), "one")[-1].startswith(state)
    holder.unlink()
    (tmp_path / "one/metrics.jsonl").unlink()
    assert row(shown(capsys, str(tmp_path), width=120), "one")[-1] == "stopped before its first log"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a/one")
    write_run(tmp_path / "b/one", "lora.rank=8")
    names = command.read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "b/one"])[0]
    assert list(names) == [str(tmp_path / "a/one"), str(tmp_path / "b/one")]


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run in .*: expected directories with a config\.yaml"):
        command.main([str(tmp_path)])
    with pytest.raises(ValueError, match="nowhere does not exist; expected a directory of runs, or a run"):
        command.main([str(tmp_path / "nowhere")])
