"""The keys of a configuration in words: help, the JSON schema for editors, and what is wrong with a value.

All of it is read from the JSON schema that pydantic makes of the models: `python -m finetune.config [--schema]`.
"""

import difflib
import json
from collections.abc import Iterator
from functools import cache
from textwrap import fill, indent
from typing import Any

from pydantic_core import ErrorDetails

from finetune.config.schema import RunConfig

Keys = tuple[str | int, ...]  # of a place in a configuration: names, and positions in lists
JsonSchema = dict[str, Any]  # https://json-schema.org, as pydantic types it

FORMER_NAMES = {"lora.train_in_full": ["lora.modules_to_save"]}  # of keys, in configurations of finished runs


def json_schema() -> JsonSchema:
    """JSON schema of the file, for editors that complete and check."""
    return RunConfig.model_json_schema()


def describe() -> str:
    """Help: every key with its type, default and meaning; `stages.N.name` is that of each item of the list `stages`."""
    lines = []
    for name, field in _fields().items():
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
            refs = [one["$ref"] for one in (field, *field.get("anyOf", ())) if "$ref" in one]
            inner = schema["$defs"][refs[0].rpartition("/")[2]] if refs else {}
            yield prefix + name, inner | field | {"required": name in section.get("required", ())}
            if refs:
                yield from below(inner, f"{prefix}{name}.")
            elif "$ref" in (items := field.get("items", {})):
                yield from below(schema["$defs"][items["$ref"].rpartition("/")[2]], f"{prefix}{name}.N.")

    return dict(below(schema, ""))


def _kind(field: JsonSchema) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"])
    if "$ref" in field:
        return "section"
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
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


def explain(keys: Keys, details: ErrorDetails) -> str:
    """One of pydantic's errors in words: what was given, what was expected, what may have been meant."""
    fields, name, given = _fields(), _name(keys), details.get("input")
    if details["type"] == "missing":
        return f"required, but not given: {fields[name]['description']}"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        siblings = [key.rpartition(".")[2] for key in fields if key.rpartition(".")[0] == name.rpartition(".")[0]]
        elsewhere = [key for key in fields if key.rpartition(".")[2] == keys[-1]]
        meant = FORMER_NAMES.get(name) or elsewhere or difflib.get_close_matches(str(keys[-1]), siblings, 1)
        return "unknown key; " + (f"did you mean {' or '.join(meant)}?" if meant else f"expected {', '.join(siblings)}")
    if details["type"] in ("error_at", "value_error"):
        return details["msg"].removeprefix("Value error, ")
    expected = details["msg"].removeprefix("Input should be ")
    if name in fields:
        expected = _kind(fields[name])
        one_of = [value for one in (fields[name], *fields[name].get("anyOf", ())) for value in one.get("enum", ())]
        meant = difflib.get_close_matches(str(given), map(str, one_of), 1)
        expected += f"; did you mean {meant[0]}?" if meant else ""
        expected += ", in quotes" if "text" in expected and isinstance(given, bool | int | float | dict) else ""
    return f"got {json.dumps(given, ensure_ascii=False)[:200]}; expected {expected}"
