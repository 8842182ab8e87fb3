"""Which room may know of which: model <- finetune <- scripts and recipes; data stands alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"model", "data", "finetune", "recipes"}
# finetune meets data where it evaluates, where it opens a run's examples, and in what the scripts share.
MAY_IMPORT = {"model": set(), "data": set(), "finetune": {"model"}, "recipes": {"model", "data", "finetune"}}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", [p for room in sorted(ROOMS) for p in sorted((ROOT / room).glob("*.py"))], ids=str)
def test_rooms_import_in_one_direction(path: Path) -> None:
    room = path.parent.name
    allowed = MAY_IMPORT[room] | {room} | ({"data"} if path.name in ("evaluate.py", "cli.py", "examples.py") else set())
    assert imported(path) & ROOMS <= allowed


def test_the_network_needs_torch_and_safetensors_only() -> None:
    outside = set().union(*(imported(path) for path in (ROOT / "model").glob("*.py")))
    assert outside - set(sys.stdlib_module_names) == {"torch", "safetensors", "huggingface_hub", "model"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        # The network, LoRA, adapters and merging: where only torch, safetensors and transformers are installed.
        (
            "model, finetune.lora, finetune.adapter, finetune.merge",
            "datasets, peft, accelerate, PIL, wandb, pydantic, yaml, rich, bitsandbytes",
        ),
        ("data, finetune.evaluate, finetune.vqa_accuracy", "datasets, peft, wandb, bitsandbytes, pydantic"),
        ("finetune.trainer, finetune.tracking", "peft, wandb, bitsandbytes, datasets"),
    ],
)
def test_what_imports_without_which_packages(modules: str, absent: str) -> None:
    block = f"import sys\nfor name in '{absent}'.split(', '): sys.modules[name] = None\n"
    # transformers looks for optional packages with importlib.util.find_spec, which stumbles over a blocked one.
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
