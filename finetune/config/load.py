"""A YAML file and overrides -> `RunConfig`, or one error with all that is wrong, where it stands and what was expected.

`~` and environment variables in paths are expanded (system/paths.py); how scalars are read (2e-5, 1e5, off) is in
`strict_yaml.py`. Of the paths only lora.start_from is opened, for the keys of `lora` that are not given.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue, ValidationError
from pydantic_core import ErrorDetails

from finetune.adapters import start_from
from finetune.adapters.locate import find_adapter
from finetune.config import strict_yaml
from finetune.config.describe import UNKNOWN, Keys, explain, unknown_keys, without_alternative
from finetune.config.schema import RunConfig
from finetune.config.section import ALTERNATIVE
from finetune.lora.config import SettingError
from finetune.system import paths


class ConfigError(ValueError):
    """What is wrong with a configuration: every problem on a line of its own, with file and line or the override."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a YAML file with overrides `section.key=value` applied to it. ConfigError lists all problems."""
    try:
        document = strict_yaml.Document(Path(path).read_bytes(), str(path), count_lines=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{paths.did_you_mean(path)}") from error
    for override in overrides:
        try:
            document.override(*parse_override(override), f"override {override!r}")
        except ConfigError as error:
            document.problems.append(str(error))
        except ValueError as error:
            document.problems.append(f"override {override!r}: {error}")
    lora = document.data.get("lora") if isinstance(document.data, dict) else None
    if isinstance(lora, dict) and isinstance(lora.get("start_from"), str):
        try:
            complete(document, lora)
        except ValueError as error:
            document.add_problem(("lora", "start_from"), str(error))
    return validated(document)


def validated(document: strict_yaml.Document) -> RunConfig:
    """What a document says. ConfigError lists all problems, those that it has already and those with the schema."""
    config = None
    try:
        config = RunConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        add_problems(document, error.errors(include_url=False))
    if config is None or document.problems:
        raise ConfigError("\n".join(document.problems))
    return config


def complete(document: strict_yaml.Document, lora: dict[str, JsonValue]) -> None:
    """Take what a document leaves open of `lora`, and of the network, from the adapter that `lora` starts from. What it
    says otherwise of the network is a problem of it.

    Raises:
        ValueError: there is no adapter, or it cannot be read.
    """
    new = not all(key in lora for key in start_from.SHAPE)
    lora.update(start_from.complete(lora))
    if not new:
        return
    assert isinstance(document.data, dict), "it holds lora"
    adapter = find_adapter(Path(paths.expand(str(lora["start_from"]))))
    for name, values in start_from.network_sections(adapter).items():
        section = document.data.setdefault(name, {}) if values else None
        if not isinstance(section, dict):
            continue  # nothing to take, or a problem that the schema names
        for key, there in values.items():
            if (given := section.get(key)) is None:
                section[key] = there
            elif given != there:
                document.add_problem(
                    (name, key),
                    f"got {given}, and the adapter in {adapter}, which lora.start_from names, was trained with "
                    f"{there}: leave it out, and it is taken from the adapter",
                    [("lora", "start_from")],
                )


def add_problems(document: strict_yaml.Document, errors: Sequence[ErrorDetails]) -> None:
    """Note what pydantic found wrong with a document, in words and one problem a key."""
    errors = [{**details, "loc": keys_of(details["loc"])} for details in errors]
    explained: set[Keys] = set()
    misspelled = {details["loc"][:-1] for details in errors if details["type"] == "extra_forbidden"}
    for details in errors:
        place, others = places_of(details)
        of_a_validator = details["type"] in ("error_at", "value_error")
        if of_a_validator and place[:-1] in misspelled and place not in document.origins:
            continue  # of a key that is not there, in a section with one that is not known: perhaps the same key
        places = unknown_keys(place, details["input"]) if details["type"] in UNKNOWN else [place]
        for one in places:
            if one not in explained:
                document.add_problem(one, explain(one, details), others)
            explained.add(one)


def keys_of(place: Keys) -> Keys:
    """The place of an error without the alternatives of a key that were tried."""
    return tuple(key for key in place if not str(key).startswith(ALTERNATIVE))


def places_of(details: ErrorDetails) -> tuple[Keys, list[Keys]]:
    """The key that one of pydantic's errors is about, and those beside which it is wrong."""
    if details["type"] == "value_error" and isinstance(error := details["ctx"]["error"], SettingError):
        return details["loc"] + error.keys, []
    if details["type"] != "error_at":
        return without_alternative(details["loc"]), []
    section = details["loc"][:-1]  # pydantic's place is the field, whose validator names keys of the section
    place, *others = [
        (*section, *(int(key) if key.isdecimal() else key for key in name.split(".")))
        for name in (details["ctx"]["key"], *details["ctx"]["others"])
    ]
    return place, others


def parse_override(override: str) -> tuple[tuple[str, ...], JsonValue]:
    """`"data.train.count=100"` -> `("data", "train", "count"), 100`. Values are YAML: `lora=null`, `key=[a, b]`. A
    number stands for a place in a list: `stages.0.max_steps=100`.
    """
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+){,9}", name):
        raise ConfigError(f"override {override!r}: expected section.key=value, such as train.max_steps=100")
    document = strict_yaml.Document(text, f"override {override!r}")
    if document.problems:
        raise ConfigError("\n".join(document.problems))
    return tuple(name.split(".")), document.data


def dump_config(config: RunConfig) -> str:
    """YAML with every key, which loads to an equal configuration."""
    return strict_yaml.dump(config.model_dump(mode="json"))
