"""Read a generation: `with model.hooks(fwd_hooks=hooks): model.generate(...)`, then one line for each token.

`generate` calls the hooks with the prompt and then with one new token at a time; the hook joins them. The last new token is
sampled and never run, so it has no activation to read.
"""

import tempfile
from pathlib import Path

import tl_latentlens as tll

HOOK_NAME = "blocks.4.hook_resid_post"
PROMPT = "The old man walked down to the"


def main() -> None:
    """Generate greedily, print for each token its nearest context and what the logit lens expects next."""
    model = tll.load_demo_model()
    with tempfile.TemporaryDirectory() as folder:
        texts = tll.load_corpus("demo", limit=300)
        bank = tll.build_bank(model, texts, Path(folder) / "generation.h5", hook_names=HOOK_NAME, progress=False)
        hooks = tll.latentlens_hooks(tll.ContextualIndex(bank), top_k=1)
        with model.hooks(fwd_hooks=hooks):
            text = model.generate(PROMPT, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
        print(f"{text}\n\n{HOOK_NAME}")
        for cell in hooks.result.cells():
            likely = " ".join(repr(token) for token, _ in cell.logit_lens or [])
            print(f"{cell.pos:3} {cell.token!r:12} next {likely:12} near {cell.neighbors[0].context}")


if __name__ == "__main__":
    main()
