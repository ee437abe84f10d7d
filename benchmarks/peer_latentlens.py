"""latentlens in an environment of its own: for each line on stdin one build, and a line of JSON about it.

Run by `build` as `PYTHON -m benchmarks.peer_latentlens SHAPE FOLDER DEVICE TEXTS LAYERS CAP THREADS OUT`, where the model is of
a shape with random weights or, for any other word, that of the folder; needs latentlens and what it needs alone.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import measured
from benchmarks.shapes import SHAPES, random_llama


def main(shape: str, folder: str, device: str, texts: str, layers: str, cap: str, threads: str, out: str) -> None:
    """Build an index and save it, as often as asked."""
    from latentlens.extract import build_index  # pyright: ignore[reportMissingImports]
    from latentlens.models import load_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    torch.set_num_threads(int(threads))
    if shape in SHAPES:
        model, tokenizer = random_llama(shape, device), AutoTokenizer.from_pretrained(folder)
    else:
        model, tokenizer = load_model(folder, device=device, trust_remote_code=False)
    corpus = json.loads(Path(texts).read_text())
    chosen = [int(layer) for layer in layers.split(",")]

    def build() -> Any:
        index = build_index(folder, corpus, chosen, int(cap), show_progress=False, model=model, tokenizer=tokenizer)
        index.save(out)
        return index

    for _ in sys.stdin:
        run = measured(build)
        answer = {field: getattr(run, field) for field in ("seconds", "peak_bytes", "peak_device_bytes")}
        answer["result"] = len(run.result) // len(chosen)
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer
        del run
        shutil.rmtree(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
