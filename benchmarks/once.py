"""One bare forward pass or one build in a new process, as a user who builds one bank has it: a line of JSON about it.

Run by `build` as `PYTHON -m benchmarks.once bare|build TEXTS FOLDER`.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import tl_latentlens as tll
from benchmarks.bare_forward import MAX_ROWS_PER_TOKEN, batches_of, forward
from benchmarks.measure import Measured, measured


def in_a_new_process(what: str, texts: list[str], folder: Path) -> Measured:
    """Measure "bare" or "build" over some texts on the embedded model."""
    corpus = folder / "texts.json"
    corpus.write_text(json.dumps(texts))
    command = [sys.executable, "-m", "benchmarks.once", what, str(corpus), str(folder)]
    root = Path(__file__).parent.parent
    answer = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return Measured(**json.loads(answer.stdout.splitlines()[-1]))


def main(what: str, corpus: str, folder: str) -> None:
    """Run it once."""
    model, texts = tll.load_demo_model(), json.loads(Path(corpus).read_text())
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    bank, batches = Path(folder) / "once.h5", batches_of(model, texts, Path(folder) / "once_batches.h5", names, 1024)

    def build() -> None:
        tll.build_bank(model, texts, bank, max_rows_per_token=MAX_ROWS_PER_TOKEN, progress=False)

    run = measured(build if what == "build" else lambda: forward(model, batches, names[-1]))
    for file in Path(folder).glob("once*"):
        file.unlink()
    print(json.dumps(asdict(run)))  # noqa: T201 - the answer


if __name__ == "__main__":
    main(*sys.argv[1:])
