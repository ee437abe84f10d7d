"""`tl-latentlens demo`: everything once, with what the package embeds; with another model in `demo_model`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import tl_latentlens as tll
from tl_latentlens.cli.decode import positions_of, readings_at
from tl_latentlens.cli.demo_model import demo_with_model
from tl_latentlens.cli.options import DataOptions, KindOption
from tl_latentlens.cli.output import console, notes, print_tables
from tl_latentlens.model.activations import activations_at
from tl_latentlens.model.tokenize import tokenize

DEMO_SENTENCES = (
    "She deposited her money and her savings at the bank",
    "We fished in the river and sat on the grassy bank",
)
DEMO_WORD = "bank"


def demo(
    bank: Annotated[
        Path | None,
        typer.Option(
            help="where to build the demo bank, which is used again where it is there; default: `demo.h5`, `smollm2.h5`"
        ),
    ] = None,
    *,
    model: Annotated[
        str, typer.Option("--model", "-m", help="`demo`, the embedded one; or a real one: `smollm2`, `gemma3-270m`, any other")
    ] = "demo",
    data: DataOptions,
    kind: KindOption = None,
) -> None:
    """Build a bank with the embedded model, read an ambiguous word in two sentences, label SAE features. Needs no network.

    With a real model: the word at six layers, and a sentiment direction.

    Example: `tl-latentlens demo`, `tl-latentlens demo --model smollm2`
    """
    bank = bank or Path(f"{Path(model).name.removesuffix('.gguf')}.h5")
    if model != "demo":
        demo_with_model(model, bank, kind, data)
        return
    _demo_embedded(bank, kind, data)


def _demo_embedded(bank: Path, kind: str | None, data: DataOptions) -> None:
    progress = console if data.as_json is None else notes
    model = tll.load_demo_model(kind)
    n_texts = len(list(tll.load_corpus("demo")))
    progress.print(f"[dim]1. run {n_texts:,} sentences through a small GPT-2, keep every token's vectors[/]")
    built = tll.build_bank(model, "demo", bank)
    rows, layers = f"{built.n_rows:,} contextual tokens", f"{len(built.hook_names)} hook names"
    progress.print(f"[dim]   {escape(str(bank))}: {rows} × {layers}, {bank.stat().st_size / 1e6:.0f} MB[/]")
    progress.print("[dim]2. run two sentences with lens hooks, and read their last word at every layer[/]")
    hooks = tll.latentlens_hooks(tll.ContextualIndex(built))
    model.run_with_hooks(list(DEMO_SENTENCES), fwd_hooks=hooks)
    positions = positions_of(hooks.result, DEMO_WORD)
    if data.as_json is None:
        console.print(hooks.result.to_rich(3, positions, width=console.width))
    progress.print("[dim]3. label the features of a small SAE that are active on these sentences[/]")
    features = _label_active_features(model, built)
    if data.as_json is not None:
        print_tables(data.as_json, {"readings": readings_at(hooks.result, positions), "features": features.with_evidence()})
        return
    console.print(features.to_rich(8, width=console.width))
    console.print(
        "\nThe word is the same; what stands around its neighbors tells what the model made of it.\n"
        f'Your own text:   tl-latentlens decode {bank} "The judge walked into the court" --word court\n'
        "A real model:    tl-latentlens demo --model smollm2\n"
        "Your own model:  tl-latentlens build corpus.txt gpt2.h5 --model gpt2\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _label_active_features(model: Any, bank: tll.Bank) -> tll.FeatureResult:
    """Labels of the embedded SAE's features that are active on the sentences, by the rows of a bank."""
    sae = tll.load_sae("demo")
    hook_name = str(sae.hook_name)
    prompts = [(prompt, pos) for prompt in tokenize(model, DEMO_SENTENCES).as_lists() for pos in range(1, len(prompt))]
    activations = activations_at(model, [prompt for prompt, _ in prompts], [pos for _, pos in prompts], [hook_name])
    active = (sae.encode(activations[hook_name]) > 0).any(0).nonzero()[:, 0].tolist()
    index = tll.ContextualIndex(bank, hook_name, verify=False)
    return tll.label_features(sae, index, active, progress=False)
