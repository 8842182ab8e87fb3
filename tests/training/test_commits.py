"""A run over a data set on the Hub stays with the commit that it began with."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.training.commits import at_commits
from finetune.training.resume import contents, differences, start_run

FIRST, LATER = "1" * 40, "2" * 40


def config_of(output: Path, *words: str) -> RunConfig:
    hub = "data={train: {hub: mine/scenes, split: train}, validation: {hub: mine/scenes, split: test}}"
    return load_config("configs/quickstart.yaml", [hub, f"output={output}", *words])


def test_a_run_stays_with_the_commit_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {None: FIRST, "v1": FIRST, "v2": LATER}
    commit_of = lambda id, subset, revision: at.get(revision, revision)  # noqa: E731
    monkeypatch.setattr("finetune.training.commits.commit_of", commit_of)
    config = config_of(tmp_path)
    begun = at_commits(config)
    assert (begun.data.only("train").revision, begun.data.only("validation").revision) == (FIRST, FIRST)
    assert begun.data.only("train").split == "train"
    assert contents(begun) == {}
    start_run(begun)
    at[None] = LATER
    assert at_commits(config) == begun  # the data set went on, the run does not
    assert not differences(begun, at_commits(config_of(tmp_path, "data.train.revision=v1")))
    assert at_commits(config_of(tmp_path / "other")).data.only("train").revision == LATER
    for changed in ("revision=v2", "hub=mine/others", "subset=en"):
        changes = differences(begun, at_commits(config_of(tmp_path, f"data.train.{changed}")))["result"]
        assert f"data.train.revision: was {FIRST}, is {LATER}" in changes


def test_other_sources_have_no_commit(tmp_path: Path) -> None:
    config = load_config("configs/quickstart.yaml", [f"output={tmp_path}"])
    assert at_commits(config) is config
