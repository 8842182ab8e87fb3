"""Preference pairs in TRL's columns, in any table -> rows with image, prefix, suffix and rejected (rows.py).

    {"prompt": "what is this?", "chosen": "a cat", "rejected": "a dog", "images": ["a.jpg"]}
    {"prompt": [{"role": "user", "content": "what is this?"}], "chosen": [{"role": "assistant", "content": "a cat"}],
     "rejected": [{"role": "assistant", "content": "a dog"}], "image": "a.jpg"}

`prompt` is the whole prefix. Without it `chosen` and `rejected` are whole chats, and the messages that both begin with
are the prompt; where they are texts, nobody can tell where the prompt ends, and it has to be given. messages.py says
what a message may be. Not here: what makes a pair invalid (rows.py), in these columns and in those of rows.py.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from data.sources.messages import IMAGES, Message, image_of, is_pair, listed, message_of, turn_of
from data.sources.rows import ROLES, Table

PAIR = ("chosen", "rejected")


def with_pairs(table: Table, columns: Mapping[str, str]) -> Table:
    """A table whose rows in TRL's columns have those of rows.py, and whose other rows stay as they are.

    An empty cell of `rejected` is none where each row has the same columns, as in CSV, and cannot leave one out.

    Args:
        columns: a column's role -> its name in the table, where that is another one.
    """
    names = {role: columns.get(role, role) for role in ROLES}

    def in_trls_columns(found: Collection[str]) -> bool:
        return is_pair(found) and names["suffix"] not in found and "chosen" not in columns.values()

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        for number, values in table.rows():
            try:
                if isinstance(values, dict) and in_trls_columns(values):
                    values = row_of_pair(values, names)
                elif table.columns is not None and isinstance(values, dict) and values.get(names["rejected"]) == "":
                    values = {name: value for name, value in values.items() if name != names["rejected"]}
                yield number, values
            except ValueError as error:
                yield number, error

    found = table.columns
    if found is not None and in_trls_columns(found):
        made = {"prompt": "prefix", "images": "image", "chosen": "suffix", "rejected": "rejected"}
        found = [names[made[name]] if name in made else name for name in found]
    return dataclasses.replace(table, rows=rows, columns=found)


def row_of_pair(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A pair in TRL's columns as a row with the columns that `names` gives to the roles.

    Raises:
        ValueError: it has no prompt, no chosen or no rejected answer, or more than one question and one answer about
            one image.
    """
    if missing := [name for name in PAIR if values.get(name) is None]:
        raise ValueError(f"it has no {' and no '.join(missing)}; expected a pair: prompt, chosen, rejected and image")
    prompt, chosen, rejected = (_messages(values, name) for name in ("prompt", *PAIR))
    if not prompt:
        prompt, chosen, rejected = _without_common(values, chosen, rejected)
    (user, good), (_, bad) = turn_of([*prompt, *chosen]), turn_of([*prompt, *rejected])
    image_columns = tuple(dict.fromkeys((*IMAGES, names["image"])))
    image = image_of(values, user, image_columns)
    answers = {"suffix": good.text, "rejected": bad.text}
    made = {names[role]: value for role, value in {"image": image, "prefix": user.text.strip(), **answers}.items()}
    used = {"prompt", *PAIR, *image_columns}
    return made | {name: value for name, value in values.items() if name not in used}


def _messages(values: Mapping[str, Any], name: str) -> list[Message]:
    """The messages of a column; none where there is no prompt."""
    given = values.get(name)
    if name == "prompt" and given is None:
        return []
    return [message_of(one) for one in listed(given, name, "user" if name == "prompt" else "assistant")]


def _without_common(
    values: Mapping[str, Any], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages that two chats both begin with, and what is left of each. ValueError where they are texts."""
    if not all(isinstance(values[name], list) for name in PAIR):
        raise ValueError(
            "it has no prompt, and where the prompt ends within chosen and rejected cannot be told of texts; put what "
            "both begin with into a column prompt"
        )
    most = min(len(chosen), len(rejected)) - 1  # the answers are no prompt, even if they are the same
    common = next((k for k in range(most) if chosen[k] != rejected[k]), most)
    if not common:
        raise ValueError("it has no prompt, and chosen and rejected do not begin with the same message of the user")
    return chosen[:common], chosen[common:], rejected[common:]
