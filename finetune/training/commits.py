"""At which commit a data set on the Hub is read: that with which the run began, whatever its branch is at by now.

config.yaml in the run's directory has the commit as the revision of data.train or data.validation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data.sources.hub import commit_of
from finetune.config.load import load_config
from finetune.config.schema import SPLITS, RunConfig
from finetune.config.source import Source
from finetune.system import distributed


def commits(config: RunConfig) -> dict[str, str]:
    """The commits of sources on the Hub, by their keys such as data.train or data.validation.0: those that the run in
    OUTPUT began with, where no revision is given, else those that the revisions are at now.

    Raises:
        ValueError: a data set cannot be reached, or is not what it should be.
    """
    began = Path(config.output) / "config.yaml"
    before = load_config(began).data if began.is_file() else None
    found = {}
    for split in SPLITS:
        known = before.places(split) if before else {}
        for place, source in config.data.places(split).items():
            if source.hub:
                revision, was = source.revision, known.get(place)
                if revision is None and was and (was.hub, was.subset) == (source.hub, source.subset):
                    revision = was.revision
                found[place] = commit_of(source.hub, source.subset, revision)
    return found


def at_commits(config: RunConfig) -> RunConfig:
    """The configuration with the commits of its data sets on the Hub as their revisions, so that the run stays with
    them. ValueError as `commits`.
    """
    if not any(source.hub for split in SPLITS for source in config.data.sources(split)):
        return config
    found: dict[str, str] = distributed.on_main(partial(commits, config))

    def pinned(split: str) -> object:
        given = getattr(config.data, split)
        if not isinstance(given, Source | tuple):
            return given  # none, or held out of data.train
        sources = tuple(
            source.model_copy(update={"revision": found[place]}) if place in found else source
            for place, source in config.data.places(split).items()
        )
        return sources if isinstance(given, tuple) else sources[0]

    return config.model_copy(update={"data": config.data.model_copy(update={split: pinned(split) for split in SPLITS})})
