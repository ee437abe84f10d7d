"""Notebooks run cell by cell in this process, as a kernel would run them, with fewer texts and smaller numbers."""

import json
from pathlib import Path

from support.controls import few_controls, few_texts

_TEXTS_STEP = 4
_SMALLER = {  # Notebook → what stands in its cells, and what is run instead.
    "01_what_does_a_vector_mean": {"corpus[:300]": "corpus[:50]", "corpus[300:]": "corpus[50:500]"},
    "03_label_an_sae": {
        "label_features(sae, index,": "label_features(sae, index, range(0, len(sae.W_dec), 4),",
        "torch.randn(50,": "torch.randn(10,",
        '["noise"] * 50': '["noise"] * 10',
    },
    "04_steering_vectors": {
        "texts[:300]": "texts[:50]",
        "texts[300:]": "texts[50:300]",
        "torch.randn(10,": "torch.randn(2,",
        "-2, -1, -0.5, 0, 0.5, 1, 2": "-1, 1",
        "max_new_tokens=14": "max_new_tokens=4",
        "multiples=(0, 1, 2)": "multiples=(0, 1)",
    },
    "06_is_it_right": {"[:40]": "[:16]", "words[:20]": "words[:8]", "words[20:]": "words[8:]", "n_tokens=30": "n_tokens=8"},
    "07_visual_tokens": {'tll.load_corpus("demo")': 'tll.load_corpus("demo", limit=400)', "draw_scenes(20,": "draw_scenes(12,"},
}


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
    for source in smaller_cells(path):
        values: list = []
        shell.display_trap = DisplayTrap(hook=CapturingDisplayHook(shell=shell, outputs=values))
        with few_controls(), few_texts(_TEXTS_STEP), capture_output() as captured:
            result = shell.run_cell(source)
        result.raise_error()
        n_shown.append(bool(captured.stdout) + len(captured.outputs) + len(values))
    record.write_text(json.dumps(n_shown))


def smaller_cells(path: Path) -> list[str]:
    """The code of a notebook's cells, with smaller numbers."""
    cells = ["".join(cell["source"]) for cell in code_cells(path)]
    for full, small in _SMALLER.get(path.stem, {}).items():
        assert any(full in cell for cell in cells), f"{path.name} has no {full!r} any more"
        cells = [cell.replace(full, small) for cell in cells]
    return cells
