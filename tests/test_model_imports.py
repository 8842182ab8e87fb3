"""The network's files import each other in one direction, and little else."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

MODEL = Path(__file__).parent.parent / "model"
FILES = {".".join(path.relative_to(MODEL.parent).with_suffix("").parts): path for path in MODEL.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere: in functions and under TYPE_CHECKING, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: import by full names"
            nested = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= nested & FILES.keys() or {node.module}
    return names


def test_there_is_no_import_cycle() -> None:
    graph = {name.removesuffix(".__init__"): imports_of(path) for name, path in FILES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("model.paligemma") < order.index("model")


def test_what_the_network_imports_of_others() -> None:
    """torch and safetensors; huggingface_hub where the Hub is asked, and nowhere else."""
    for name, path in FILES.items():
        outside = {imported.partition(".")[0] for imported in imports_of(path)} - set(sys.stdlib_module_names)
        allowed = {"torch", "safetensors", "model"} | ({"huggingface_hub"} if name == "model.hub" else set())
        assert outside <= allowed, name
