"""A source of examples by words of the command line: the keys of `data.validation`, `KEY=VALUE` each."""

from collections.abc import Sequence

from finetune.config import strict_yaml
from finetune.config.load import parse_override, validated
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
    return validated(document).data.only("validation")
