"""A folder that can be hosted as it is, such as a Hugging Face Space: the page, the adapters, and this package's code.

The base is named by its Hub id, for the host to download; a small one from a directory is copied along.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from finetune.adapters.locate import CHECKOUT
from finetune.adapters.metadata import CONFIG_FILE, WEIGHTS_FILE
from finetune.config.strict_yaml import dump
from finetune.demo.examples import Example, write_examples
from finetune.demo.networks import Sources
from finetune.report.markdown import plain
from finetune.report.model_card import NOTICE
from finetune.report.subject import HUB_ID, Subject
from finetune.system.atomic import occupied, recover, temporary_paths
from finetune.system.terminal import one_line
from model.hub import CHECKPOINT_FILES

PACKAGES = ("model", "data", "finetune")
CODE = ("*.py", "*.html")  # of them; whatever else a person keeps there stays
SMALL_BASE = 200_000_000  # bytes of a base that is copied along

APP = '''"""The page of this Space."""

from pathlib import Path

from finetune.demo.app import serve
from finetune.demo.examples import read_examples
from finetune.demo.networks import find_sources, open_networks

HERE = Path(__file__).parent

if __name__ == "__main__":
    opened = open_networks(find_sources(sorted((HERE / "adapters").iterdir())), dtype={dtype!r})
    serve(opened, read_examples(HERE / "examples"), host="0.0.0.0")
'''

README = """---
{header}---

# {title}

Ask a question about an image: the base answers, and so {does} {names}, with each token's probability and a map of what
the answer depends on.

{base}

To try it here: `pip install gradio=={gradio} -r requirements.txt`, then `python app.py`.
"""

GATED = """The base, `{base}`, is downloaded when the Space starts. If it is gated, as Google's PaliGemma is, accept its
licence at https://huggingface.co/{base} and give the Space a secret `HF_TOKEN` with a token that may read it
(Settings, Variables and secrets)."""
COPIED = "The base is in the folder `base`; no token is needed."


def export(sources: Sources, examples: Sequence[Example], directory: Path, dtype: str = "bfloat16") -> list[str]:
    """Write the folder, whole or not at all; returns what to tell the person.

    Raises:
        ValueError: there is something at `directory`; or the base is a directory too large to copy along, or neither a
            directory nor a name on the Hub.
    """
    if occupied(directory):
        raise ValueError(f"{directory} exists already, and is not empty: name a new folder, or delete it first")
    base = Path(sources.base)
    if not base.is_dir() and not HUB_ID.fullmatch(sources.base):
        raise ValueError(
            f"the base, {sources.base}, is neither a directory here nor a name on the Hub: name the same checkpoint "
            "with --model, such as google/paligemma-3b-pt-224"
        )
    if base.is_dir() and (size := sum(path.stat().st_size for path in checkpoint_files(base))) > SMALL_BASE:
        raise ValueError(
            f"the base is a directory here, {base}, of {size / 1e9:.1f} GB, which the host would not have: name the "
            "same checkpoint on the Hub, with --model google/paligemma-3b-pt-224 (or what it is)"
        )
    recover(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished, _ = temporary_paths(directory)
    unfinished.mkdir()
    try:
        fill(unfinished, sources, examples, dtype)
        if directory.exists():
            directory.rmdir()  # empty
        unfinished.rename(directory)
    except BaseException:
        recover(directory)
        raise
    return told(directory, sources, examples)


def fill(directory: Path, sources: Sources, examples: Sequence[Example], dtype: str) -> None:
    """Everything that the folder holds."""
    copied = Path(sources.base).is_dir()
    for package in PACKAGES:
        copy_files(CHECKOUT, directory, [path for suffix in CODE for path in (CHECKOUT / package).rglob(suffix)])
    shutil.copyfile(CHECKOUT / "LICENSE", directory / "LICENSE")
    first = next(iter(sources.adapters.values()))  # all are of the same base
    if Subject(first, first, None, named_base=sources.base).has_gemma_weights:
        (directory / "NOTICE").write_text(f"{NOTICE}\n", encoding="utf-8")
    if copied:
        copy_files(Path(sources.base), directory / "base", checkpoint_files(Path(sources.base)))
    for name, adapter in sources.adapters.items():
        copy_adapter(adapter, directory / "adapters" / name, "base" if copied else sources.base, sources.revision)
    write_examples(examples, directory / "examples")
    (directory / "app.py").write_text(APP.format(dtype=dtype), encoding="utf-8")
    (directory / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(readme(sources), encoding="utf-8")


def copy_files(source: Path, directory: Path, files: Sequence[Path]) -> None:
    """Copy files of `source` to the same places in `directory`."""
    for file in files:
        place = directory / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def checkpoint_files(directory: Path) -> list[Path]:
    """The files of a checkpoint, without what else is in its directory."""
    return [path for pattern in CHECKPOINT_FILES for path in directory.glob(pattern)]


def copy_adapter(adapter: Path, directory: Path, base: str, revision: str | None) -> None:
    """An adapter's two files, its base named as the host finds it; no manifest, for that lists the old file."""
    directory.mkdir(parents=True)
    shutil.copyfile(adapter / WEIGHTS_FILE, directory / WEIGHTS_FILE)
    config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def requirements() -> list[str]:
    """What the package needs, as pyproject.toml has it; gradio itself comes with the Space."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [str(line) for line in project["dependencies"]]


def gradio_version() -> str:
    """The version that the page was tested with, by constraints.txt."""
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split()[0].removeprefix("gradio==") for line in lines if line.startswith("gradio=="))


def readme(sources: Sources) -> str:
    """README.md with the header that a Space reads."""
    names = [one_line(name) for name in sources.adapters]
    copied = Path(sources.base).is_dir()
    header: dict[str, JsonValue] = {
        "title": " and ".join(names),
        "sdk": "gradio",
        "sdk_version": gradio_version(),
        "python_version": "3.11",
        "app_file": "app.py",
    }
    if not copied:
        header["models"] = [sources.base]
    return README.format(
        header=dump(header),
        title=plain(header["title"]),
        gradio=gradio_version(),
        names=" and ".join(map(plain, names)),
        does="does" if len(names) == 1 else "do",
        base=COPIED if copied else GATED.format(base=sources.base),
    )


def told(directory: Path, sources: Sources, examples: Sequence[Example]) -> list[str]:
    """What was written, and what the person still has to do."""
    adapters = f"{len(sources.adapters)} adapter{'s' if len(sources.adapters) > 1 else ''}"
    lines = [
        f"{directory}: app.py, requirements.txt, README.md with the header of a Space, {adapters}, {len(examples)} "
        f"example images and the code ({size_of(directory) / 1e6:.1f} MB)",
        f"to host it: hf upload OWNER/NAME {directory} . --repo-type space",
    ]
    if Path(sources.base).is_dir():
        return [*lines, f"the base, {sources.base}, was copied along"]
    return [
        *lines,
        f"the Space downloads the base, {sources.base}; if that is gated, as Google's PaliGemma is, the Space needs a "
        "secret HF_TOKEN with a token that may read it",
    ]


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
