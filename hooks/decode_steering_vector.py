"""Read a steering vector: a difference of mean `blocks.L.hook_resid_post`, and the stream that it was added to.

The direction is no activation, so no single token has it; the rows nearest to +v and to -v say what it separates. Then
multiples of it are added while a text runs, and every later layer is read.
"""

import tempfile
from pathlib import Path

import tl_latentlens as tll

HOOK_NAME = "blocks.3.hook_resid_post"
WATER = ["The boat crossed the sea", "Waves broke on the beach", "A fish swam in the river"]
FOREST = ["The fox ran into the forest", "Leaves fell from the oak", "An owl sat in the tree"]
TEXT = "They walked along the"


def main() -> None:
    """Print the nearest contexts of both ends of a difference of means, then what it does to the stream."""
    model = tll.load_demo_model()
    vector = tll.difference_of_means(model, WATER, FOREST, HOOK_NAME)
    names = [f"blocks.{layer}.hook_resid_post" for layer in (3, 4, 5)]
    with tempfile.TemporaryDirectory() as folder:
        texts = tll.load_corpus("demo", limit=300)
        bank = tll.build_bank(model, texts, Path(folder) / "steering.h5", hook_names=names, progress=False)
        index = tll.ContextualIndex(bank)
        result = tll.decode_directions(vector, index, top_k=5, hook_name=HOOK_NAME)
        for label, neighbors in zip(("+v (water)", "-v (forest)"), result.neighbors(0), strict=True):
            print(f"{HOOK_NAME}, {label}")
            for neighbor in neighbors:
                print(f"  {neighbor.similarity:+.2f}  {neighbor.context}")
        steer = tll.SteeringLens(vector, index, HOOK_NAME, multiples=(0, 1, 2, 4))
        print(steer.run(model, TEXT))  # by hand: model.run_with_hooks(TEXT, fwd_hooks=steer.hooks(2)), then steer.result


if __name__ == "__main__":
    main()
