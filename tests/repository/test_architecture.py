"""No two modules of the package import each other, directly or in a circle; the order of the rooms is `lint-imports`' part."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import tl_latentlens

ROOT = Path(tl_latentlens.__file__).parents[1]


def import_graph() -> dict[str, set[str]]:
    """Module → the modules of the package that it imports, wherever in it the import stands."""
    files = {module_name(path): path for path in (ROOT / "tl_latentlens").rglob("*.py")}
    return {name: {m for m in imported(path) if m in files} - {name} for name, path in files.items()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = import_graph()
    assert len(graph) > 100
    assert "tl_latentlens.bank.partial_file" in graph["tl_latentlens.bank.writer"]
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle
