"""Find what writes the meaning of a word: the SAE features, attention heads and MLP neurons that set this use of it apart.

The meaning is what this use shares with the nearest other uses of its token and others lack; each component's output at the
word is measured along that direction, less what the same component adds at other uses, and held against the most that any
adds along the meanings of other words.
"""

import tempfile
from pathlib import Path

import tl_latentlens as tll

PROMPT = "We fished in the river and sat on the grassy bank"
WORD = "bank"


def main() -> None:
    """Bank the activation that the SAE reads, find what writes one use of a word, print the largest of each kind."""
    model = tll.load_demo_model()
    sae = tll.load_sae("demo")
    name = sae.hook_name
    assert name is not None
    texts = list(tll.load_corpus("demo"))
    about = [text for text in texts if WORD in text] + texts[:500]
    with tempfile.TemporaryDirectory() as folder:
        bank = tll.build_bank(model, about, Path(folder) / "find.h5", hook_names=name, progress=False)
        index = tll.ContextualIndex(bank)
        features = tll.find_features(PROMPT, WORD, sae, index, model=model, top_k=5)
        print(f"{PROMPT}\n{name}: {WORD!r}, as in")
        for near in features.meaning.alike()[:3]:
            print(f"  {near.similarity:.2f}  {near.context}")
        heads = tll.find_heads(PROMPT, WORD, index, model=model, top_k=5)
        neurons = tll.find_neurons(PROMPT, WORD, index, model=model, top_k=5)
        for line in features.table.to_dict("records"):
            said = line["label"] or "no label"
            print(f"feature {line['feature']}: {line['share']:.0%} of it (p = {line['p_family']:.2f}), {said}")
        for line in heads.table.to_dict("records"):
            seen = f"attends most to {line['attends_to']!r}"
            print(f"head {line['layer']}.{line['head']}: {line['share']:.0%} of it (p = {line['p_family']:.2f}), {seen}")
        for line in neurons.table.to_dict("records"):
            print(f"neuron {line['layer']}.{line['neuron']}: {line['share']:.0%} of it (p = {line['p_family']:.2f})")


if __name__ == "__main__":
    main()
