"""Read one word at every layer: the nearest contexts of `blocks.L.hook_resid_post`, beside the logit lens.

The word "bank" ends two sentences. Early layers find the word itself; watch from which layer on the contexts part.
"""

import tempfile
from pathlib import Path

import tl_latentlens as tll

WORD = "bank"
SENTENCES = ["The river was high, and the boat lay on the bank", "She carried her money in a bag to the bank"]


def main() -> None:
    """Build a bank of all layers, run each sentence, print what its last token is near to."""
    model = tll.load_demo_model()
    corpus = list(tll.load_corpus("demo"))
    texts = corpus[:300] + [text for text in corpus[300:] if WORD in text]
    with tempfile.TemporaryDirectory() as folder:
        index = tll.ContextualIndex(tll.build_bank(model, texts, Path(folder) / "residual.h5", progress=False))
        for sentence in SENTENCES:
            hooks = tll.latentlens_hooks(index, top_k=2, positions=-1)
            model.run_with_hooks(sentence, fwd_hooks=hooks)
            print(f"\n{sentence}")
            for name in index.hook_names:
                cell = hooks.result.cell(name, pos=-1)
                likely = ", ".join(repr(token) for token, _ in cell.logit_lens or [])
                print(f"  {name}  next token by the logit lens: {likely}")
                for neighbor in cell.neighbors:
                    print(f"    {neighbor.similarity:.2f}  {neighbor.context}")


if __name__ == "__main__":
    main()
