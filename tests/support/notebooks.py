"""Notebooks run cell by cell in this process, as a kernel would run them."""

import json
from pathlib import Path


def code_cells(path: Path) -> list[dict]:
    """The code cells of a notebook as it is stored."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run_notebook(path: Path, record: Path) -> None:
    """Run a notebook; write to `record`, as a JSON list, how many outputs each cell showed, all that was printed as one."""
    from IPython.core.display_trap import DisplayTrap
    from IPython.core.displayhook import CapturingDisplayHook
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    n_shown = []
    for cell in code_cells(path):
        values: list = []
        shell.display_trap = DisplayTrap(hook=CapturingDisplayHook(shell=shell, outputs=values))
        with capture_output() as captured:
            result = shell.run_cell("".join(cell["source"]))
        result.raise_error()
        n_shown.append(bool(captured.stdout) + len(captured.outputs) + len(values))
    record.write_text(json.dumps(n_shown))
