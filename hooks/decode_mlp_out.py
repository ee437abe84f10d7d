"""Read what each MLP writes: a bank of `blocks.L.hook_mlp_out`, decoded on the last token of a prompt.

The bank holds MLP outputs, so a neighbor is a token at which some MLP wrote nearly the same vector.
"""

import tempfile
from pathlib import Path

import tl_latentlens as tll

PROMPT = "Snow fell all night, and in the morning the field was"


def main() -> None:
    """Bank every layer's MLP output, run the prompt, print each layer's nearest writes."""
    model = tll.load_demo_model()
    texts = tll.load_corpus("demo", limit=300)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlp_out.h5"
        bank = tll.build_bank(model, texts, path, hook_names=lambda name: name.endswith("hook_mlp_out"), progress=False)
        hooks = tll.latentlens_hooks(tll.ContextualIndex(bank), top_k=3, positions=-1)
        model.run_with_hooks(PROMPT, fwd_hooks=hooks)
        print(f"{PROMPT}\n")
        for cell in hooks.result.cells():
            print(f"{cell.hook_name} on {cell.token!r}")
            for neighbor in cell.neighbors:
                print(f"  {neighbor.similarity:.2f}  {neighbor.hook_name}  {neighbor.context}")


if __name__ == "__main__":
    main()
