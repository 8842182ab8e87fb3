"""Which folder may import which, and that no two files import each other, not even for their types."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A folder imports from itself and from those before it; `data` and `model` do not import each other.
FOLDERS = ["model", "data", "finetune.system", "finetune.lora", "finetune.adapters", "finetune.cli", "finetune.config"]
FOLDERS += ["finetune.config.__main__", "finetune.training", "finetune.evaluation", "finetune.preflight"]
FOLDERS += ["finetune.report", "finetune.demo", "finetune.run", "finetune.pipeline", "finetune.__main__"]
WITHOUT_DATA = FOLDERS[2:8]  # these need no examples
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("model", "data", "finetune")
    for path in (ROOT / folder).rglob("*.py")
}


def folder_of(name: str) -> str | None:
    """The folder of a module; None for `finetune` itself, which only exports names."""
    within = [folder for folder in FOLDERS if name == folder or name.startswith(f"{folder}.")]
    return max(within, key=len, default=None)


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, including in functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: import by full names"
            nested = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= nested & FILES.keys() or {node.module}
    return names


@pytest.mark.parametrize("name", sorted(FILES))
def test_folders_import_in_one_direction(name: str) -> None:
    if (folder := folder_of(name)) is None:
        assert name == "finetune.__init__"
        return
    before = set(FOLDERS[: FOLDERS.index(folder) + 1])
    without = {"data"} if folder in WITHOUT_DATA else set()
    allowed = {"data": {"data"}, "model": {"model"}}.get(folder, before - without)
    assert {folder_of(other) for other in imports_of(FILES[name])} - {None} <= allowed


def test_there_is_no_import_cycle() -> None:
    graph = {name.removesuffix(".__init__"): imports_of(path) for name, path in FILES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("model.paligemma") < order.index("model")


def test_which_packages_the_model_imports() -> None:
    """torch and safetensors; huggingface_hub in model/hub.py only."""
    for name, path in FILES.items():
        if folder_of(name) == "model":
            outside = {imported.partition(".")[0] for imported in imports_of(path)} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "safetensors", "model"} | (
                {"huggingface_hub"} if name == "model.hub" else set()
            )


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        # The model, LoRA, adapters and merging need only torch, safetensors and transformers.
        (
            "model, finetune.lora.linear, finetune.adapters.storage, finetune.adapters.merge",
            "datasets, peft, accelerate, PIL, wandb, pydantic, yaml, rich, bitsandbytes",
        ),
        (
            "data, finetune.evaluation.evaluate, finetune.evaluation.vqa_accuracy",
            "datasets, peft, wandb, bitsandbytes, pydantic",
        ),
        ("finetune.training.trainer, finetune.training.tracking", "peft, wandb, bitsandbytes, datasets"),
    ],
)
def test_folders_import_without_optional_packages(modules: str, absent: str) -> None:
    block = f"import sys\nfor name in '{absent}'.split(', '): sys.modules[name] = None\n"
    # transformers looks for optional packages with importlib.util.find_spec, which fails on a blocked one.
    look = "import importlib.util as u\nfind = u.find_spec\n"
    look += f"u.find_spec = lambda name, *a: None if name.split('.')[0] in '{absent}'.split(', ') else find(name, *a)\n"
    code = f"{look}{block}import {modules}"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_modules_import_without_side_effects() -> None:
    """Importing a script parses no arguments, prints nothing and writes nothing."""
    code = "import train, evaluate, predict, merge_lora"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == ""
