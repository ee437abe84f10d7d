"""No circle of imports, no hidden import, no file that grew too long. The order of the rooms is checked by `lint-imports`."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import tl_latentlens

ROOT = Path(tl_latentlens.__file__).parents[1]
TESTS = Path(__file__).parents[1]
MAX_MODULE_LINES, MAX_TEST_LINES = 300, 500
LONG_MODULES = {  # each with its reason
    "tl_latentlens/bank/bank.py": "one class, the file as users open it: short methods that forward to the modules beside it",
    "tl_latentlens/index/contextual.py": "one class, the index as users open it: its docstrings define what a search compares",
}


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


def test_functions_import_optional_packages_alone() -> None:
    """An import of the package inside a function, or for the type checker alone, would hide a circle."""
    hidden = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tl_latentlens").rglob("*.py"))
        for node in nested_imports(path)
        if names_the_package(node)
    ]
    assert not hidden, f"import these at the top of the file: {hidden}"


def nested_imports(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that do not stand at the top of a file."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            yield from (node for node in ast.walk(statement) if isinstance(node, ast.Import | ast.ImportFrom))


def names_the_package(node: ast.Import | ast.ImportFrom) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    is_relative = isinstance(node, ast.ImportFrom) and node.level > 0
    return is_relative or any(name.split(".")[0] == "tl_latentlens" for name in names)


def test_files_are_short() -> None:
    """A longer file holds more than one thought: part it, or give the reason in LONG_MODULES."""
    modules = {name: n for name, n in n_lines(ROOT / "tl_latentlens").items() if n > MAX_MODULE_LINES}
    assert {name: n for name, n in modules.items() if name not in LONG_MODULES} == {}
    assert {name: n for name, n in n_lines(TESTS).items() if n > MAX_TEST_LINES} == {}


def n_lines(folder: Path) -> dict[str, int]:
    """Python file, from the folder's parent on → its number of lines."""
    files = sorted(folder.rglob("*.py"))
    return {path.relative_to(folder.parent).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
