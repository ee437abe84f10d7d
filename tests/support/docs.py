"""Pages of the documentation, read as text."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def build_pages(*arguments: str) -> None:
    """Run Sphinx here, and end as it does."""
    from sphinx.cmd.build import main

    raise SystemExit(main(list(arguments)))


def snippets(page: str) -> list[str]:
    """The Python code of a page, block after block."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    return blocks


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the table of a page whose first column has a heading."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows
