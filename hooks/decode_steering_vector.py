"""Read a steering vector: a difference of mean `blocks.L.hook_resid_post`, decoded with both signs.

The direction is no activation, so no single token has it; the rows nearest to +v and to -v say what it separates.
"""

import tempfile
from pathlib import Path

import torch

import tl_latentlens as tll

HOOK_NAME = "blocks.3.hook_resid_post"
WATER = ["The boat crossed the sea", "Waves broke on the beach", "A fish swam in the river"]
FOREST = ["The fox ran into the forest", "Leaves fell from the oak", "An owl sat in the tree"]


def main() -> None:
    """Take the difference of two mean activations, print the nearest contexts of both its ends."""
    model = tll.load_demo_model()

    def mean(sentences: list[str]) -> torch.Tensor:
        with torch.no_grad():
            caches = [model.run_with_cache(sentence)[1] for sentence in sentences]
        return torch.stack([cache[HOOK_NAME][0, -1] for cache in caches]).mean(0)

    with tempfile.TemporaryDirectory() as folder:
        texts = tll.load_corpus("demo", limit=300)
        bank = tll.build_bank(model, texts, Path(folder) / "steering.h5", hook_names=HOOK_NAME, progress=False)
        result = tll.decode_directions(mean(WATER) - mean(FOREST), tll.ContextualIndex(bank), top_k=5)
        for label, neighbors in zip(("+v (water)", "-v (forest)"), result.neighbors(0), strict=True):
            print(f"{HOOK_NAME}, {label}")
            for neighbor in neighbors:
                print(f"  {neighbor.similarity:+.2f}  {neighbor.context}")


if __name__ == "__main__":
    main()
