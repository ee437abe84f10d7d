"""Read SAE features: which of them are active on a word in its context, and what the bank says each one is about.

The features' activations on the text come from the SAE; their labels from the bank alone: what carries half of a feature's
activation there. A feature that nothing carries is mixed. The words are those that its direction is near to.
"""

import tempfile
from pathlib import Path

import torch

import tl_latentlens as tll

PROMPT = "The boys ran down the street to the strong old bridge"
WORD = " street"


def main() -> None:
    """Bank the activation that the SAE reads, take the features most active on a word, print their labels and evidence."""
    model = tll.load_demo_model()
    sae = tll.load_sae("demo")
    name = sae.hook_name
    assert name is not None
    with torch.no_grad():
        _, cache = model.run_with_cache(PROMPT)
    pos = model.to_str_tokens(PROMPT).index(WORD)
    active = sae.encode(cache[name][0, pos]).topk(10)
    with tempfile.TemporaryDirectory() as folder:
        texts = tll.load_corpus("demo", limit=1000)
        bank = tll.build_bank(model, texts, Path(folder) / "features.h5", hook_names=name, progress=False)
        index = tll.ContextualIndex(bank)
        result = tll.label_features(sae, index, active.indices.tolist(), progress=False)
        print(f"{PROMPT}\n{name} at {WORD!r}\n")
        for line, activation in zip(result.table.to_dict("records"), active.values.tolist(), strict=True):
            if line["density"] > 0.1:  # active on so many tokens that it says little of this one
                continue
            label = line["label"] or f"no label: {line['why_not']}"
            print(f"feature {line['feature']}, activation {activation:.1f}: {label}  (writes {', '.join(line['words'][:3])})")
            for value, row in result.max_activating(line["feature"], 3):
                print(f"  {value:5.1f}  {row.context}")


if __name__ == "__main__":
    main()
