"""A source of examples by words of the command line: the keys of `data.validation`, `KEY=VALUE` each."""

import json
from collections.abc import Sequence

from pydantic import ValidationError

from finetune.config import strict_yaml
from finetune.config.load import ConfigError, add_problems, parse_override
from finetune.config.schema import RunConfig
from finetune.config.source import Source

RUN = "model: {path: none}\ndata: {train: {hub: none}}\ntrain: {max_steps: 1}\noutput: none\n"  # around a validation


def source_of(words: Sequence[str], option: str) -> Source:
    """The source that `csv=mine.csv columns.question=query` stands for; a value is YAML, as in overrides.

    option: what the words were given to, for messages.

    Raises:
        ConfigError: a word is no `KEY=VALUE`, or they are no source; lists all problems.
    """
    document = strict_yaml.Document(RUN, option)
    for word in words:
        try:
            keys, value = parse_override(word)
            document.override(("data", "validation", *keys), value, f"{option} {word}")
        except ValueError as error:
            document.problems.append(f"{option}: {error}")
    run = None
    try:
        run = RunConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        add_problems(document, error.errors(include_url=False))
    if run is None or document.problems:
        raise ConfigError("\n".join(document.problems))
    return run.data.only("validation")
