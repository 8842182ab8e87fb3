"""A configuration of the fewest keys, and the names of all keys."""

from typing import Any

MINIMAL = """\
model: {path: google/paligemma-3b-pt-224}
data:
  train: {questions: q.json, annotations: a.json, images: coco}
train: {max_steps: 100}
output: runs/one
"""


def keys(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all keys of a dumped configuration, with N for the position in a list of one section."""
    below = [keys(value, f"{prefix}{name}.") for name, value in config.items() if isinstance(value, dict)]
    below += [
        keys(value[0], f"{prefix}{name}.N.")
        for name, value in config.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return [prefix + name for name in config] + [name for names in below for name in names]
