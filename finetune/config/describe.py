"""The keys of a configuration in words: help, the JSON schema for editors, and what is wrong with a value.

All of it is read from the JSON schema that pydantic makes of the models: `python -m finetune.config [--schema]`. How
other projects name our keys is in `peer_names.py`.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from functools import cache
from textwrap import fill, indent
from typing import Any

from pydantic_core import ErrorDetails

from finetune.config.peer_names import PEER_NAMES, PEER_VALUES, Counterpart
from finetune.config.schema import RunConfig
from finetune.lora.config import SettingError

Keys = tuple[str | int, ...]  # of a place in a configuration: names, and positions in lists
JsonSchema = dict[str, Any]  # https://json-schema.org, as pydantic types it

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's types of the error of an unknown key
FORMER_NAMES = {"lora.train_in_full": ("lora.modules_to_save",)}  # of keys, in configurations of finished runs


def json_schema() -> JsonSchema:
    """JSON schema of the file, for editors that complete and check."""
    return RunConfig.model_json_schema()


def describe() -> str:
    """Help: every key with its type, default and meaning; `stages.N.name` is that of each item of the list `stages`.
    Sources in a list have the keys of a single one.
    """
    lines = []
    for name, field in _fields().items():
        if name.replace(".N.", ".") != name and name.replace(".N.", ".") in _fields():
            continue
        default = f" = {json.dumps(field['default'])}" if "default" in field and "properties" not in field else ""
        lines.append(f"{name}: {_kind(field)}{' (required)' if field['required'] else default}")
        lines.append(indent(fill(field["description"], 110), "    "))
    return "\n".join(lines)


@cache
def _fields() -> dict[str, JsonSchema]:
    """Dotted name of every key -> its JSON schema (of a section: the section's too) and whether it is `required`. A key
    of the sections in a list has N where its position stands.
    """
    schema = json_schema()

    def below(section: JsonSchema, prefix: str) -> Iterator[tuple[str, JsonSchema]]:
        for name, field in section["properties"].items():
            kinds = [field, *_alternatives(field)]
            inner: JsonSchema = next(
                (schema["$defs"][one["$ref"].rpartition("/")[2]] for one in kinds if "$ref" in one), {}
            )
            items = [one["items"]["$ref"] for one in kinds if "$ref" in one.get("items", {})]
            yield prefix + name, inner | field | {"required": name in section.get("required", ())}
            if inner:
                yield from below(inner, f"{prefix}{name}.")
            if items:
                yield from below(schema["$defs"][items[0].rpartition("/")[2]], f"{prefix}{name}.N.")

    return dict(below(schema, ""))


def _alternatives(field: JsonSchema) -> list[JsonSchema]:
    """The JSON schemas of what a key takes, where it takes one of several."""
    found = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    return [inner for one in found for inner in (_alternatives(one) or [one])]


def _kind(field: JsonSchema) -> str:
    """What a key takes, in words, from its JSON schema."""
    if alternatives := _alternatives(field):
        return " or ".join(map(_kind, alternatives))
    if "$ref" in field:
        return "section"
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if field["type"] == "array":
        items = _kind(field["items"]).replace("section", "sections")
        return f"list of {items}" + (", not an empty one" if field.get("minItems") else "")
    if field["type"] == "object":
        return f"mapping of names to {_kind(field['additionalProperties'])}"
    word = {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(field["type"], field["type"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "matching"}
    limits = [f"{sign} {field[limit]}" for limit, sign in signs.items() if limit in field]
    return f"{word} {', '.join(limits)}".strip()


def _name(keys: Keys) -> str:
    """A place as `_fields` names it."""
    return ".".join("N" if isinstance(key, int) else key for key in keys)


def without_alternative(keys: Keys) -> Keys:
    """The key alone, where pydantic adds which of a key's alternatives a value fails to be."""
    field = _fields().get(_name(keys[:-1]), {})
    return keys[:-1] if "anyOf" in field and "properties" not in field and field.get("type") != "array" else keys


def unknown_keys(keys: Keys, value: object) -> list[Keys]:
    """Where an unknown key is explained: at itself; or, if its value is a section of other projects, at each key in it
    that we have an answer to, and at itself only if there are other keys in it, too.
    """
    key = str(keys[-1])
    ours = _elsewhere(key) or (key not in PEER_NAMES and difflib.get_close_matches(key, _siblings(keys), 1))
    if not isinstance(value, dict) or not value or ours:
        return [keys]
    below = {name: unknown_keys((*keys, name), inner) for name, inner in value.items()}
    answered = {name: [place for place in places if _meant(place)] for name, places in below.items()}
    return [*([] if all(answered.values()) else [keys]), *(place for places in answered.values() for place in places)]


def _siblings(keys: Keys) -> list[str]:
    """The names of all keys in the section where a key stands."""
    section = _name(keys).rpartition(".")[0]
    return [key.rpartition(".")[2] for key in _fields() if key.rpartition(".")[0] == section]


def _elsewhere(key: str) -> list[str]:
    """Dotted names of our keys with this name; those of lists, which repeat others, only where there are no others."""
    found = [name for name in _fields() if name.rpartition(".")[2] == key]
    return [name for name in found if ".N." not in name] or found


def _meant(keys: Keys) -> str:
    """What may have been meant by an unknown key, in words; empty where nothing is near."""
    name, key = _name(keys), str(keys[-1])
    siblings = _siblings(keys)
    if former := FORMER_NAMES.get(name):
        return str(Counterpart(former))
    if peer := PEER_NAMES.get(name) or PEER_NAMES.get(key):
        # A section with a key of that name, such as a stage with a learning rate of its own, means its own.
        own = [one.rpartition(".")[2] for one in peer.keys]
        if len(own) == 1 and own[0] in siblings and own[0] != peer.keys[0] and len(keys) > 1:
            peer = dataclasses.replace(peer, keys=(".".join(map(str, (*keys[:-1], *own))),))
        return str(peer)
    meant = _elsewhere(key) or difflib.get_close_matches(key, siblings, 1)
    return str(Counterpart(tuple(meant))) if meant else ""


def explain(keys: Keys, details: ErrorDetails) -> str:
    """One of pydantic's errors in words: what was given, what was expected, what may have been meant."""
    fields, name, given = _fields(), _name(keys), details.get("input")
    if details["type"] == "missing":
        return f"required, but not given: {fields[name]['description']}"
    if details["type"] in UNKNOWN:
        known = ", ".join(_siblings(keys))
        return f"unknown key; {_meant(keys) or f'expected {known}'}"
    if details["type"] == "value_error" and isinstance(error := details["ctx"]["error"], SettingError):
        return error.message
    if details["type"] in ("error_at", "value_error"):
        return details["msg"].removeprefix("Value error, ")
    expected = details["msg"].removeprefix("Input should be ")
    if name in fields:
        expected = _kind(fields[name])
        one_of = [value for one in (fields[name], *fields[name].get("anyOf", ())) for value in one.get("enum", ())]
        meant = difflib.get_close_matches(str(given), map(str, one_of), 1)
        if isinstance(given, str) and given in (peers := PEER_VALUES.get(name, {})):
            meant = [peers[given]]
        expected += f"; did you mean {meant[0]}?" if meant else ""
        expected += ", in quotes" if "text" in expected and isinstance(given, bool | int | float | dict) else ""
    return f"got {json.dumps(given, ensure_ascii=False)[:200]}; expected {expected}"
