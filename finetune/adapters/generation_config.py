"""How long answers may get, where nobody says: as long as the longest answer that was trained, which an adapter stores
(`TrainingFacts`) and a whole checkpoint has in its generation_config.json, where transformers reads it too.
"""

from __future__ import annotations

import json
from pathlib import Path

from finetune.adapters.metadata import training_facts

FILE, KEY = "generation_config.json", "max_new_tokens"
DEFAULT_NEW_TOKENS = 64  # where nothing is stored


def store_max_new_tokens(directory: Path, count: int | None) -> None:
    """Write the number into the generation_config.json of a checkpoint; of None, nothing is known."""
    if count is None:
        return
    content = json.loads((directory / FILE).read_text(encoding="utf-8")) if (directory / FILE).exists() else {}
    (directory / FILE).write_text(json.dumps(content | {KEY: count}, indent=2) + "\n", encoding="utf-8")


def stored_max_new_tokens(directory: Path, adapter: str | Path | None = None) -> int | None:
    """What an adapter says, or else the checkpoint in `directory`; None where neither does.

    Raises:
        ValueError: what is stored is not a number of tokens.
    """
    if adapter is not None and (stored := training_facts(adapter).max_new_tokens) is not None:
        return stored
    file = directory / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get(KEY)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; copy it from the base checkpoint") from error
    if found is not None and (type(found) is not int or found < 1):
        raise ValueError(f"{file}: {KEY} is {found!r}; expected a whole number from 1, or none")
    return found


def max_new_tokens_of(
    directory: Path, adapter: str | Path | None, given: int | None, name: str
) -> tuple[int, str | None]:
    """The most tokens of an answer: as given, or else as stored; and a line to show where that is a guess.

    name: by which it is given.
    """
    if (known := given or stored_max_new_tokens(directory, adapter)) is not None:
        return known, None
    return DEFAULT_NEW_TOKENS, (
        "how long trained answers are is stored neither with the adapter nor with the checkpoint: at most "
        f"{DEFAULT_NEW_TOKENS} tokens are generated; {name} says otherwise"
    )
