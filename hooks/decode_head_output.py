"""Read attention heads one by one: `blocks.L.attn.hook_z[h]` among its own rows, `hook_result[h]` in the residual bank.

`hook_z` is [batch, pos, head, d_head]; a bank holds all its heads, and an index of `hook_z[:]` reads each in its own space. A
neighbor there is a token at which this head brought back nearly the same thing. `hook_result[h]` is what the head adds to
the residual stream, z @ W_O, and its neighbors are tokens that it makes this one more like; "center" takes away what all
rows have in common.
"""

import tempfile
from pathlib import Path

import tl_latentlens as tll

LAYER = 3
PROMPT = "The owl flew over the barn. Later that night the owl"


def main() -> None:
    """Bank one layer's heads and its residual stream, run a prompt, print what each head's last token is nearest to."""
    model = tll.load_demo_model()
    z, result, post = (f"blocks.{LAYER}.{name}" for name in ("attn.hook_z", "attn.hook_result", "hook_resid_post"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heads.h5"
        bank = tll.build_bank(model, tll.load_corpus("demo", limit=300), path, hook_names=[z, post], progress=False)
        heads = tll.latentlens_hooks(tll.ContextualIndex(bank, f"{z}[:]"), positions=-1, top_k=3)
        outputs = tll.latentlens_hooks(
            tll.ContextualIndex(bank, post, transform="center"), f"{result}[:]", positions=-1, top_k=3
        )
        model.run_with_hooks(PROMPT, fwd_hooks=[*heads, *outputs])
        print(heads.result)
        print(outputs.result)


if __name__ == "__main__":
    main()
