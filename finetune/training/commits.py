"""At which commit a data set on the Hub is read: that with which the run began, whatever its branch is at by now.

config.yaml in the run's directory has the commit as the revision of data.train or data.validation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data.sources.hub import commit_of
from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.system import distributed


def commits(config: RunConfig) -> dict[str, str]:
    """The commits of data.train and data.validation where they are on the Hub: those that the run in OUTPUT began with,
    where no revision is given, else those that the revisions are at now.

    Raises:
        ValueError: a data set cannot be reached, or is not what it should be.
    """
    began = Path(config.output) / "config.yaml"
    before = load_config(began).data if began.is_file() else None
    found = {}
    for split in ("train", "validation"):
        source, known = getattr(config.data, split), getattr(before, split, None)
        if not source or not source.hub:
            continue
        if source.revision is None and known and (known.hub, known.subset) == (source.hub, source.subset):
            source = known
        found[split] = commit_of(source.hub, source.subset, source.revision)
    return found


def at_commits(config: RunConfig) -> RunConfig:
    """The configuration with the commits of its data sets on the Hub as their revisions, so that the run stays with
    them. ValueError as `commits`.
    """
    if not any(source and source.hub for source in (config.data.train, config.data.validation)):
        return config
    found: dict[str, str] = distributed.on_main(partial(commits, config))
    sources = {
        split: getattr(config.data, split).model_copy(update={"revision": commit}) for split, commit in found.items()
    }
    return config.model_copy(update={"data": config.data.model_copy(update=sources)})
