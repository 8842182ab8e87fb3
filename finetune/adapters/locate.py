"""Where an adapter is, and the base that it names: as a person gives them, or as they can be found."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.adapters.metadata import CONFIG_FILE

CHECKOUT = Path(__file__).parents[2]


def find_adapter(directory: Path) -> Path:
    """The directory of an adapter: itself, or `adapter` in the directory of a run."""
    within = directory / "adapter"
    return within if (within / CONFIG_FILE).is_file() and not (directory / CONFIG_FILE).is_file() else directory


def find_base(adapter: Path) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision: a directory, or a Hub id.

    A relative path is looked for in the working directory, then in those above the adapter (it was named from one of
    them, when the adapter was trained), then in the checkout of this project.

    Raises:
        ValueError: the adapter cannot be read, or does not name its base.
    """
    file = adapter / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror}): expected the directory of an adapter, or of a run"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not name its base ({error!r}): name it yourself") from error
    if not base or not isinstance(base, str):
        raise ValueError(f"{file} does not name its base: name it yourself")
    for place in (Path(), *adapter.absolute().parents, CHECKOUT):
        if (place / base / "config.json").is_file():
            return str(place / base), None
    return base, revision
