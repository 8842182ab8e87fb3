"""Every example of docs/data.md does what the page says: its files are written, its commands run, its output compared.
So does that of pairs in docs/alignment.md.

A block after a line with a path in backticks is that file; one of texts without a path lists further images.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from finetune.evaluation.evaluate import Answer
from tests.images import encoded

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/data.md"
BLOCK = re.compile(r"^(?:`([^`\n]+)`:\n\n)?```(\w+)\n(.*?)^```$", re.M | re.S)
ANSWERING = re.compile(r"^A network that answers `(.*)` and `(.*)`:$", re.M)


@dataclasses.dataclass(frozen=True)
class Example:
    """Blocks from one command line to the next: kind, path if it is a file, content."""

    name: str
    blocks: list[tuple[str, str, str]]
    answers: tuple[str, ...]


def examples_of(page: str) -> list[Example]:
    """An example ends with its commands, and goes with the files of the section before it."""
    found: list[Example] = []
    for section in re.split(r"^##+ ", page, flags=re.M)[1:]:
        title, blocks = section.splitlines()[0], list[tuple[str, str, str]]()
        for path, kind, content in BLOCK.findall(section):
            blocks.append((kind, path, content))
            if kind == "console":
                answers = ANSWERING.findall(section)
                found.append(Example(f"{title} {len(found)}", list(blocks), answers[0] if answers else ()))
    return found


TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = examples_of(TEXT)
PAIRS = examples_of((ROOT / "docs/alignment.md").read_text(encoding="utf-8"))
EXAMPLES += [example for example in PAIRS if example.name.startswith("Making pairs")]
(STANDARD, *_) = (content for _, kind, content in BLOCK.findall(TEXT) if kind == "yaml")


def main_of(words: list[str]) -> Callable[[list[str]], object]:
    """What `.venv/bin/python train.py` or `-m data.convert` calls; in `words` the arguments are left."""
    assert words.pop(0) == ".venv/bin/python"
    name = words.pop(0)
    module = words.pop(0) if name == "-m" else name.removesuffix(".py")
    main: Callable[[list[str]], object] = importlib.import_module(module).main
    return main


def lines_of(text: str) -> list[str]:
    """Without what only makes a table, and without the spaces that align it."""
    lines = (" ".join(re.sub("[┃│]", " ", line).split()) for line in text.splitlines())
    return [line for line in lines if line and not re.fullmatch("[┏┓┗┛┡┩└┘━─┳┻╇┴ ]+", line)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`mine/animals` is what the page saves, with its images as bytes."""
    loading = datasets.load_dataset_builder

    def load(id: str, **_: Any) -> datasets.DatasetBuilder:
        assert id == "mine/animals"
        file = str(tmp_path / "hub.parquet")
        datasets.load_from_disk(str(tmp_path / "mine/saved"))["train"].to_parquet(file)
        return loading("parquet", data_files={"train": file}, cache_dir=str(tmp_path / "datasets"))

    monkeypatch.setattr("datasets.load_dataset_builder", load)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.replace(":", ""))
def test_an_example_does_what_the_page_says(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in {"detect": ["pycocotools"], "caption": ["pycocoevalcap"]}.get(example.name.partition(":")[0], []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("assets").symlink_to(ROOT / "assets")
    if example.answers:
        answer_with(monkeypatch, *example.answers)
    for name, color in (("mine/cat.jpg", "orange"), ("mine/dog.jpg", "brown")):
        add_image(Path(name), color)
    if example.name.startswith("hub"):
        exec(next(content for _, kind, content in BLOCK.findall(TEXT) if kind == "python"), {})
    *blocks, (_, _, commands) = example.blocks
    for kind, path, content in blocks:
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(content, encoding="utf-8")
        elif kind == "text":
            for number, name in enumerate(content.split()):
                add_image(Path(name), f"rgb({number}, 100, 0)")
        elif kind == "python":
            exec(content, {})
        elif kind == "yaml":
            Path("mine.yaml").write_text(STANDARD + content)
            assert yaml.safe_load(content)["data"].keys() <= {"train", "validation"}
    capsys.readouterr()
    expected = [line for line in lines_of(commands) if not line.startswith("$ ")]
    for line in (line for line in commands.splitlines() if line.startswith("$ ")):
        words = shlex.split(line.removeprefix("$ "))
        if words[0] == "cat":
            print(Path(words[1]).read_text(encoding="utf-8"))
        else:
            main_of(words)(words)
    assert lines_of(capsys.readouterr().out) == expected


def add_image(path: Path, color: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.new("RGB", (64, 48), color), "JPEG"))


def answer_with(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """The network answers these, one record each."""

    def answers(model: object, processor: object, records: Any, *_: object, **__: object) -> dict[str, Answer]:
        given = (Answer(text, True, -0.5, ((text, -0.5),)) for text in texts)
        return {record["id"]: answer for record, answer in zip(records, given, strict=True)}

    monkeypatch.setattr("finetune.evaluation.evaluate.generate_answers", answers)
    monkeypatch.setattr("finetune.evaluation.evaluate.choose_answers", answers)  # of the labels


def test_every_source_and_every_task_has_an_example() -> None:
    from finetune.config.source import HUB, OFFICIAL, TABLES
    from finetune.evaluation.tasks import TASKS

    shown = [yaml.safe_load(content)["data"] for _, kind, content in BLOCK.findall(TEXT)[1:] if kind == "yaml"]
    given = [source for data in shown for source in data.values() if isinstance(source, dict)]
    keys = {key for source in given for key in source}
    assert keys >= {*TABLES, HUB, *OFFICIAL}
    assert re.findall(r"^### (\w+):", TEXT, re.M) == list(TASKS)
