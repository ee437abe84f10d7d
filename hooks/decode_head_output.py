"""Read attention heads one by one: a bank of `blocks.L.attn.hook_z`, searched head by head.

`hook_z` is [batch, pos, head, d_head] and is banked with its heads side by side, so head h is the columns from
h * d_head on. VectorSearch takes any vectors, hence also one head's columns; it normalizes them again. A neighbor is a
token at which this head brought back nearly the same thing, so compare it with the token that the head attends to most.
"""

import tempfile
from pathlib import Path

import torch

import tl_latentlens as tll

LAYER = 3
PROMPT = "The owl flew over the barn. Later that night the owl"


def main() -> None:
    """Bank one layer's head outputs, cache them for a prompt, print the nearest tokens of each head."""
    model = tll.load_demo_model()
    name = f"blocks.{LAYER}.attn.hook_z"
    with torch.no_grad():
        _, cache = model.run_with_cache(PROMPT)
    tokens = model.to_str_tokens(PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        bank = tll.build_bank(model, tll.load_corpus("demo", limit=300), Path(folder) / "z.h5", hook_names=name, progress=False)
        print(f"{PROMPT}\n")
        for head, query in enumerate(cache[name][0, -1]):
            columns = slice(head * len(query), (head + 1) * len(query))
            found = tll.VectorSearch(bank.vectors(name)[:, columns]).top_k(query, 3)
            source = cache[f"blocks.{LAYER}.attn.hook_pattern"][0, head, -1].argmax()
            print(f"{name}, head {head}, attends most to {tokens[source]!r}")
            for similarity, row in zip(found.similarities.tolist(), found.rows.tolist(), strict=True):
                print(f"  {similarity:.2f}  {bank.row(row).context()}")


if __name__ == "__main__":
    main()
