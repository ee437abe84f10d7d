"""latentlens in an environment of its own: for each line on stdin one build, and a line of JSON about it.

Run by `build` as `PYTHON -m benchmarks.peer_latentlens MODEL TEXTS LAYERS CAP THREADS OUT`; needs latentlens and torch alone.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import measured


def main(model_folder: str, texts: str, layers: str, cap: str, threads: str, out: str) -> None:
    """Build an index and save it, as often as asked."""
    from latentlens.extract import build_index  # pyright: ignore[reportMissingImports]
    from latentlens.models import load_model  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(int(threads))
    model, tokenizer = load_model(model_folder, device="cpu", trust_remote_code=False)
    corpus = json.loads(Path(texts).read_text())
    chosen = [int(layer) for layer in layers.split(",")]

    def build() -> Any:
        index = build_index(model_folder, corpus, chosen, int(cap), show_progress=False, model=model, tokenizer=tokenizer)
        index.save(out)
        return index

    for _ in sys.stdin:
        run = measured(build)
        answer = {"seconds": run.seconds, "peak_bytes": run.peak_bytes, "result": len(run.result) // len(chosen)}
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer
        del run
        shutil.rmtree(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
