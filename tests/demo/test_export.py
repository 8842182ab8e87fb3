"""A folder to host: it answers by itself, as the networks that it was made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from finetune.demo import __main__ as command
from finetune.demo import export as exported
from finetune.demo.answer import ask
from finetune.demo.examples import Example
from finetune.demo.export import export
from finetune.demo.networks import Opened, Sources, find_sources
from finetune.report.model_card import NOTICE
from tests.demo.conftest import ROOT

HUB = "google/paligemma-3b-pt-224"


def header(directory: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])
    return found


def test_the_folder_answers_by_itself(opened: Opened, adapters: list[Path], scene: Path, tmp_path: Path) -> None:
    """Its code, base and adapters alone, in another process."""
    told = export(find_sources(adapters), [Example(scene, "what is it?", "answer en {question}")], tmp_path / "space")
    code = """
from pathlib import Path
from finetune.demo.answer import ask
from finetune.demo.examples import read_examples
from finetune.demo.networks import find_sources, open_networks
sources = find_sources(sorted(Path("adapters").iterdir()))
assert Path(sources.base).resolve() == Path("base").resolve()
(example,) = read_examples(Path("examples"))
for network in open_networks(sources, "float32", "cpu").networks:
    print(network.name, ask(network, example.image, "answer en what is it?", 5).ids)
for name in ("model", "data", "finetune"):
    assert Path(sys.modules[name].__file__).parent == Path(name).resolve(), name
"""
    ran = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.')\n{code}"],
        cwd=tmp_path / "space",
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    expected = [f"{one.name} {ask(one, scene, 'answer en what is it?', 5).ids}" for one in opened.networks]
    assert ran.stdout.splitlines() == expected
    assert told[-1] == "the base, assets/tiny-base, was copied along"
    assert not (tmp_path / "space/NOTICE").exists()  # the tiny base is none of Google's
    assert str(ROOT) not in "".join(path.read_text() for path in (tmp_path / "space").rglob("*.json"))


def test_what_a_space_reads(adapters: list[Path], tmp_path: Path) -> None:
    """A base of the Hub is named, not copied, and a token is asked for."""
    told = export(Sources({"one": adapters[0]}, HUB, "bfloat16"), [], tmp_path / "space", "float32")
    said = header(tmp_path / "space")
    assert said["sdk"] == "gradio"
    assert f"gradio=={said['sdk_version']}" in (ROOT / "constraints.txt").read_text()
    assert said["python_version"] == "3.11"
    assert said["models"] == [HUB]
    assert (tmp_path / "space" / str(said["app_file"])).is_file()
    config = json.loads((tmp_path / "space/adapters/one/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (HUB, "bfloat16")
    assert (tmp_path / "space/NOTICE").read_text() == f"{NOTICE}\n"
    assert "HF_TOKEN" in told[-1]
    assert "HF_TOKEN" in (tmp_path / "space/README.md").read_text()
    assert not (tmp_path / "space/base").exists()
    assert any(line.startswith("torch>=") for line in (tmp_path / "space/requirements.txt").read_text().splitlines())
    compile((tmp_path / "space/app.py").read_text(), "app.py", "exec")
    assert "dtype='float32'" in (tmp_path / "space/app.py").read_text()


@pytest.mark.parametrize("base", ["/somewhere/of/mine", "../mine", "mine", "me/mine\nsdk: static"])
def test_a_base_that_the_host_could_not_have_is_refused(adapters: list[Path], tmp_path: Path, base: str) -> None:
    with pytest.raises(ValueError, match="is neither a directory here nor a name on the Hub: name the same checkpoint"):
        export(Sources({"one": adapters[0]}, base, None), [], tmp_path / "space")
    assert not list(tmp_path.iterdir())


def test_names_of_runs_stay_texts_in_the_readme(adapters: list[Path], tmp_path: Path) -> None:
    names = ["a: b #c", 'yes "x"', "{d} <b>[e](f)</b>", "g\n---\nsdk: static"]
    export(Sources(dict.fromkeys(names, adapters[0]), HUB, None), [], tmp_path / "space")
    said = header(tmp_path / "space")
    assert said["title"] == " and ".join(names).replace("\n", "\\n")
    assert said["sdk"] == "gradio"
    tokens = MarkdownIt("commonmark").parse((tmp_path / "space/README.md").read_text().split("---\n", 2)[2])
    inside = [child for token in tokens for child in token.children or []]
    assert not [token for token in [*tokens, *inside] if token.type.startswith("html") or token.type == "link_open"]


def test_nothing_else_that_is_in_the_copied_folders_is_told(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a person keeps beside the base's files, and beside this package's code."""
    base, checkout = tmp_path / "base", tmp_path / "checkout"
    shutil.copytree(ROOT / "assets/tiny-base", base)
    for package in exported.PACKAGES:
        shutil.copytree(ROOT / package, checkout / package)
    for name in ("LICENSE", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, checkout / name)
    (checkout / "data/mine").mkdir()
    for place in (base / "notes.txt", base / "optimizer.pt", checkout / "data/mine/0.jpg", checkout / "model/.token"):
        place.write_text("mine")
    monkeypatch.setattr(exported, "CHECKOUT", checkout)
    export(Sources({"one": adapters[0]}, str(base), None), [], tmp_path / "space")
    written = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    assert {"base/config.json", "base/model.safetensors", "base/tokenizer.json", "model/hub.py"} <= written
    assert "finetune/report/templates/run.html" in written
    others = {name for name in written if name.endswith((".txt", ".pt", ".jpg", ".token", "mine", "__pycache__"))}
    assert others == {"requirements.txt"}


def test_several_adapters_are_all_named(adapters: list[Path], tmp_path: Path) -> None:
    export(find_sources(adapters[:2]), [], tmp_path / "space")
    assert header(tmp_path / "space")["title"] == "one and two"
    assert sorted(path.name for path in (tmp_path / "space/adapters").iterdir()) == ["one", "two"]


def test_a_folder_with_files_is_left_alone(adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "space").mkdir()
    (tmp_path / "space/mine").write_text("x")
    with pytest.raises(ValueError, match="exists already, and is not empty"):
        export(find_sources(adapters), [], tmp_path / "space")
    assert [path.name for path in (tmp_path / "space").iterdir()] == ["mine"]


def test_a_large_base_is_not_copied(adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "SMALL_BASE", 1_000_000)
    with pytest.raises(ValueError, match="which the host would not have: name the same checkpoint on the Hub"):
        export(find_sources(adapters), [], tmp_path / "space")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        export(find_sources(adapters), [Example(Path("/gone.png"), "", "")], tmp_path / "space")
    assert not list(tmp_path.iterdir())


def test_the_command(adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(adapters[0]), "--export", str(tmp_path / "space")])
    assert str(tmp_path / "space") in capsys.readouterr().out
    assert (tmp_path / "space/app.py").is_file()
    with pytest.raises(ValueError, match="--revision is of the Hub id that --model gives"):
        command.main([str(adapters[0]), "--revision", "main"])
