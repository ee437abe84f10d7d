"""`tl-latentlens demo --model smollm2`: an ambiguous word and a direction, read with a real language model."""

from pathlib import Path

from rich.markup import escape

import tl_latentlens as tll
from tl_latentlens.cli.decode import positions_of, readings_at
from tl_latentlens.cli.options import DataOptions
from tl_latentlens.cli.output import console, notes, print_tables

SENTENCES = ("In the dark cave we saw a bat", "He hit the ball hard with his bat")
WORD = "bat"
N_LAYERS = 6
EVERY_TEXT = 2  # of the embedded corpus: every second
HAPPY = (
    "I loved every minute of the concert", "What a wonderful surprise this was", "She smiled and hugged her best friend",
    "The children laughed with joy all day", "This is the best cake I have ever had", "We were thrilled with the good news",
    "He felt proud and happy about his work", "The holiday was relaxing and beautiful",
)  # fmt: skip
UNHAPPY = (
    "I hated every minute of the concert", "What a terrible disappointment this was", "She cried and mourned her lost friend",
    "The children wept with grief all day", "This is the worst cake I have ever had", "We were crushed by the awful news",
    "He felt ashamed and sad about his work", "The holiday was stressful and miserable",
)  # fmt: skip


def demo_with_model(name: str, bank: Path, kind: str | None, data: DataOptions) -> None:
    """Build a bank of part of the embedded corpus at six layers, read a word in two sentences, and a sentiment direction.

    Args:
        name: The model, as `load_model` takes it.
        bank: Where to build the bank; one that is there is used again.
        kind: As in `load_model`.
        data: Tables, or the data of all that is shown.
    """
    progress = console if data.as_json is None else notes
    progress.print(f"[dim]1. load {escape(name)}[/]")
    model = tll.load_model(name, kind=kind)
    n_layers = model.cfg.n_layers
    layers = sorted({(i + 1) * n_layers // N_LAYERS - 1 for i in range(N_LAYERS)} - {-1})
    texts = list(tll.load_corpus("demo"))[::EVERY_TEXT]
    progress.print(f"[dim]2. run {len(texts):,} sentences through it, keep every token's vectors at {len(layers)} layers[/]")
    built = tll.build_bank(model, texts, bank, hook_names=layers)
    rows = f"{built.n_rows:,} contextual tokens × {len(built.hook_names)} hook names"
    progress.print(f"[dim]   {escape(str(bank))}: {rows}, {bank.stat().st_size / 1e6:.0f} MB[/]")
    progress.print("[dim]3. run two sentences with lens hooks, and read their last word at every layer[/]")
    index = tll.ContextualIndex(built)
    hooks = tll.latentlens_hooks(index)
    model.run_with_hooks(list(SENTENCES), fwd_hooks=hooks)
    positions = positions_of(hooks.result, WORD)
    if data.as_json is None:
        console.print(hooks.result.to_rich(3, positions, width=console.width))
    early = layers[min(1, len(layers) - 1)]
    progress.print(f"[dim]4. the direction from {len(UNHAPPY)} unhappy to {len(HAPPY)} happy sentences at layer {early}[/]")
    direction = tll.difference_of_means(model, HAPPY, UNHAPPY, early, positions=None)
    found = tll.decode_directions(direction, index, hook_name=early, top_k=8)
    if data.as_json is not None:
        print_tables(data.as_json, {"readings": readings_at(hooks.result, positions), "direction": found.neighbors_dataframe()})
        return
    console.print(found.neighbors_to_rich(width=console.width))
    console.print(
        f'\nYour own text:    tl-latentlens decode {bank} "The judge walked into the court" --word court\n'
        f"Is it right?      tl-latentlens evaluate {bank} --html evaluation.html\n"
        f"Your own corpus:  tl-latentlens build corpus.txt mine.h5 --model {name}\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
