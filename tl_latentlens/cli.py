"""The command line, `tl-latentlens COMMAND`: each command is a function here."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tl_latentlens.errors import InvalidInputError, LatentLensError

app = typer.Typer(
    name="tl-latentlens",
    help="What does this vector mean? Read a model's activations by their nearest contextual neighbors.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

DEMO_SENTENCES = (
    "She deposited her money and her savings at the bank",
    "We fished in the river and sat on the grassy bank",
)
DEMO_WORD = "bank"

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="`demo`, a folder in Hugging Face format, or a name TransformerLens knows (`gpt2`)")
]
KindOption = Annotated[
    str | None, typer.Option(help="`hooked` (HookedTransformer) or `bridge` (TransformerBridge); default: what is installed")
]
DeviceOption = Annotated[str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`; default: CUDA where there is one")]
HookOption = Annotated[
    list[str] | None, typer.Option("--hook-name", "-n", help="a hook name; give it several times for several")
]
BankArgument = Annotated[Path, typer.Argument(help="a bank file (.h5)")]


@app.command()
def demo(
    bank: Annotated[Path, typer.Option(help="where to build the demo bank (reused where it is there)")] = Path("demo.h5"),
    kind: KindOption = None,
) -> None:
    """Build a bank with the embedded model, read an ambiguous word in two sentences, label SAE features. Needs no network.

    Example: `tl-latentlens demo`
    """
    import tl_latentlens as tll

    model = tll.load_demo_model(kind)
    console.print(
        f"[dim]1. run {len(list(tll.load_corpus('demo'))):,} sentences through a small GPT-2, keep every token's vectors[/]"
    )
    built = tll.build_bank(model, "demo", bank)
    rows, layers = f"{built.n_rows:,} contextual tokens", f"{len(built.hook_names)} hook names"
    console.print(f"[dim]   {bank}: {rows} × {layers}, {bank.stat().st_size / 1e6:.0f} MB[/]")
    console.print("[dim]2. run two sentences with lens hooks, and read their last word at every layer[/]")
    hooks = tll.latentlens_hooks(tll.ContextualIndex(built))
    model.run_with_hooks(list(DEMO_SENTENCES), fwd_hooks=hooks)
    _print_result(hooks.result, DEMO_WORD, neighbors=3)
    console.print("[dim]3. label the features of a small SAE that are active on these sentences[/]")
    console.print(_features_active_on(model, built, DEMO_SENTENCES))
    console.print(
        "\nThe word is the same; what stands around its neighbors tells what the model made of it.\n"
        f'Your own text:   tl-latentlens decode {bank} "The judge walked into the court" --word court\n'
        "Your own model:  tl-latentlens build corpus.txt gpt2.h5 --model gpt2\n",
        highlight=False,
        soft_wrap=True,
    )


def _features_active_on(model: Any, bank: Any, texts: Sequence[str], n: int = 8) -> Table:
    """The embedded SAE's features that are active on some texts, labelled by the bank's rows."""
    import tl_latentlens as tll
    from tl_latentlens.activations import activations_at
    from tl_latentlens.model import tokenize
    from tl_latentlens.views.terminal import feature_table

    sae = tll.load_sae("demo")
    name = str(sae.hook_name)
    prompts = [(prompt, pos) for prompt in tokenize(model, texts).as_lists() for pos in range(1, len(prompt))]
    found = activations_at(model, [prompt for prompt, _ in prompts], [pos for _, pos in prompts], [name])
    active = (sae.encode(found[name]) > 0).any(0).nonzero()[:, 0].tolist()
    index = tll.ContextualIndex(bank, name, transform="center", verify=False)
    return feature_table(tll.label_features(sae, index, active, progress=False), n)


@app.command()
def build(
    corpus: Annotated[str, typer.Argument(help="a .txt, .csv, .jsonl or .parquet file, `demo`, or the id of a hub dataset")],
    bank: Annotated[Path, typer.Argument(help="the bank file to make (.h5); an interrupted build resumes")],
    model: ModelOption = "demo",
    hook_name: HookOption = None,
    text_column: Annotated[str, typer.Option(help="column that holds the text (csv, jsonl, parquet, datasets)")] = "text",
    split: Annotated[str, typer.Option(help="split of a hub dataset")] = "train",
    limit: Annotated[int | None, typer.Option(help="read at most this many texts")] = None,
    max_rows_per_token: Annotated[int, typer.Option(help="most rows of one token id, a uniform sample; 0: no cap")] = 50,
    dtype: Annotated[str, typer.Option(help="how vectors are stored: float16, bfloat16 or float32")] = "float16",
    seed: Annotated[int, typer.Option(help="seed of the sample")] = 0,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="run each text twice and read the second copy, whose tokens know what comes after")
    ] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="most tokens of one batch; less needs less memory")] = None,
    kind: KindOption = None,
    device: DeviceOption = None,
) -> None:
    """Run a corpus through a model and keep the contextual vectors of its tokens in a bank.

    Example: `tl-latentlens build corpus.txt gpt2.h5 --model gpt2 -n blocks.5.hook_resid_post -n blocks.9.hook_resid_post`
    """
    import tl_latentlens as tll

    try:
        texts = tll.load_corpus(corpus, text_column=text_column, split=split, limit=limit)
        loaded = tll.load_model(model, kind=kind, device=device)
        built = tll.build_bank(
            loaded,
            texts,
            bank,
            hook_names=hook_name,
            max_rows_per_token=max_rows_per_token or None,
            dtype=dtype,
            seed=seed,
            repeat=repeat,
            batch_tokens=batch_tokens,
        )
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "stopped; nothing was written yet", err=True)
        raise typer.Exit(130) from None
    console.print(_info_table(built))


@app.command()
def info(bank: BankArgument) -> None:
    """Show what a bank holds: model, rows, hook names, plan.

    Example: `tl-latentlens info demo.h5`
    """
    import tl_latentlens as tll

    console.print(_info_table(tll.Bank.open(bank)))


@app.command()
def verify(bank: BankArgument) -> None:
    """Read a bank whole and check every checksum.

    Example: `tl-latentlens verify demo.h5`
    """
    import tl_latentlens as tll

    tll.Bank.open(bank).verify(progress=True)
    console.print(f"{bank}: every checksum matches", markup=False)


@app.command()
def decode(
    bank: BankArgument,
    text: Annotated[list[str], typer.Argument(help="one or more texts")],
    model: ModelOption = "demo",
    hook_name: HookOption = None,
    word: Annotated[str | None, typer.Option(help="read only the token that ends this word; default: all")] = None,
    top_k: Annotated[int, typer.Option(help="neighbors for each token and hook name")] = 3,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="run each text twice and read the second copy, as for a bank built with --repeat")
    ] = False,
    transform: Annotated[
        str, typer.Option(help="`raw`, `center`, `standardize`, `remove_top`, `csls` or `center_writing`; see the docs")
    ] = "auto",
    calibrate: Annotated[
        bool, typer.Option(help="also show how likely a random activation comes as near (p), and dim what chance explains")
    ] = False,
    allow_mismatch: Annotated[bool, typer.Option(help="read on, with a warning, where the bank is of another model")] = False,
    csv: Annotated[Path | None, typer.Option(help="write all readings to this file too")] = None,
    html: Annotated[
        Path | None, typer.Option(help="write all readings as one page too, layers × tokens; it needs no network")
    ] = None,
    kind: KindOption = None,
    device: DeviceOption = None,
) -> None:
    """Run texts through a model and read every token by its nearest neighbors in a bank, beside the logit lens.

    Example: `tl-latentlens decode demo.h5 "We fished and sat on the grassy bank" --model demo --word bank`
    """
    import tl_latentlens as tll
    from tl_latentlens.build import cut_note
    from tl_latentlens.heads import names_heads, output_layer
    from tl_latentlens.model import tokenize

    _require_folders(csv, html)
    heads = [name for name in hook_name or [] if names_heads(name) and output_layer(name) is None]
    index = tll.ContextualIndex(bank, heads or None, device, transform=transform, allow_mismatch=allow_mismatch)
    loaded = tll.load_model(model, kind=kind, device=device)
    index.check_model(loaded)  # first of all: a forgotten --model shows as a bank of another model
    if n_truncated := tokenize(loaded, text, repeat=repeat).n_truncated:
        console.print(cut_note(loaded, n_truncated, len(text), repeat))
    if index.banks[0].plan.settings.repeat != repeat:
        console.print(
            f"note: the bank was built {'without' if repeat else 'with'} --repeat, so its rows saw other texts than these: "
            f"{'leave --repeat out' if repeat else 'add --repeat'}"
        )
    result = _read(loaded, list(text), index, repeat, hook_names=hook_name, top_k=top_k, calibrate=calibrate)
    _print_result(result, word, neighbors=top_k)
    if csv is not None:
        result.to_dataframe().to_csv(csv, index=False)
        console.print(f"wrote {csv}", markup=False)
    if html is not None:
        result.to_html(html)
        console.print(f"wrote {html}", markup=False)


def _read(model: Any, texts: list[str], index: Any, repeat: bool, **settings: Any) -> Any:
    import tl_latentlens as tll

    if not repeat:
        hooks = tll.latentlens_hooks(index, model=model, **settings)
        model.run_with_hooks(texts, fwd_hooks=hooks)
        return hooks.result
    run = tll.repeated(model, texts)
    hooks = tll.latentlens_hooks(index, positions=run.second_copy, model=model, **settings)
    model.run_with_hooks(run.tokens, attention_mask=run.attention_mask, fwd_hooks=hooks)
    result = hooks.result
    lines = zip(result.tokens or [], result.decoded, strict=True)
    once = [[token if read else "" for token, read in zip(*line, strict=True)] for line in lines]
    return replace(result, tokens=once)  # so that a title shows the text once


@app.command()
def decode_vector(
    bank: BankArgument,
    vector: Annotated[Path | None, typer.Argument(help="a file with one vector: .npy, .pt, .safetensors or .csv")] = None,
    key: Annotated[str | None, typer.Option(help="which tensor of a .pt or .safetensors file; default: the first")] = None,
    positive: Annotated[
        Path | None, typer.Option(help="a file of prompts (one a line): the vector is their mean activation minus ...")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="... that of the prompts in this one, both at their last token")] = None,
    sae: Annotated[str | None, typer.Option(help="`demo`, a folder as SAELens saves it, or a safetensors file")] = None,
    feature: Annotated[int | None, typer.Option("--feature", "-f", help="the decoder row of this feature of the SAE")] = None,
    hook_name: Annotated[
        str | None,
        typer.Option(
            "--hook-name", "-n", help="activation of the prompts, and where --text is steered; default: the SAE's own"
        ),
    ] = None,
    model: ModelOption = "demo",
    top_k: Annotated[int, typer.Option(help="neighbors of each end")] = 5,
    transform: Annotated[
        str, typer.Option(help="`raw`; `center`: take each hook name's mean away, as a direction stands for what is above it")
    ] = "raw",
    text: Annotated[str | None, typer.Option(help="also add the vector while this text runs, and read its last token")] = None,
    multiple: Annotated[
        list[float] | None, typer.Option("--multiple", "-x", help="multiples to add, one option each; default: 0, 1, 2 and 4")
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="of the multiples: the `vector` as it is, or an `activation` of median length in its direction; default: "
            "`activation` for an SAE's row, else `vector`"
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="write the neighbors here too; what --text gave to NAME.steered.csv")] = None,
    json: Annotated[Path | None, typer.Option(help="the same as JSON records")] = None,
    kind: KindOption = None,
    device: DeviceOption = None,
) -> None:
    """Read both ends of a vector by their nearest neighbors in a bank: of a file, of two sets of prompts, or of an SAE.

    Example: `tl-latentlens decode-vector demo.h5 --sae demo --feature 12 --text "They walked along the"`
    """
    import tl_latentlens as tll
    from tl_latentlens.directions import read_vector
    from tl_latentlens.views.steering import direction_table

    named: dict[str, list[Any]] = {
        "a vector file": [vector],
        "--positive with --negative": [positive, negative],
        "--sae with --feature": [sae, feature],
    }
    given = {name: None not in parts for name, parts in named.items() if any(part is not None for part in parts)}
    if list(given.values()) != [True]:
        raise InvalidInputError(f"expected one of {', '.join(named)}; got {' and '.join(given) or 'none'} in part or together")
    _require_folders(csv, json)
    weights = None if sae is None else tll.load_sae(sae, hook_name=hook_name)
    hook_name = hook_name or getattr(weights, "hook_name", None)
    if hook_name is None and (positive is not None or text is not None):
        raise InvalidInputError("give the activation that the vector belongs to, for instance -n blocks.3.hook_resid_post")
    index = tll.ContextualIndex(bank, device=device, transform=transform)
    loaded = None
    if positive is not None or text is not None:
        loaded = tll.load_model(model, kind=kind, device=device)
        index.check_model(loaded)
    if positive is not None and negative is not None:
        sides = [list(tll.load_corpus(path)) for path in (positive, negative)]
        direction = tll.difference_of_means(loaded, sides[0], sides[1], hook_name or "")
        title = f"{positive} − {negative} at {hook_name}"
    elif weights is not None and feature is not None:
        if not 0 <= feature < len(weights.W_dec):
            raise InvalidInputError(f"got feature {feature}; the SAE has features 0 to {len(weights.W_dec) - 1}")
        direction, title = weights.W_dec[feature], f"feature {feature} of {sae} at {hook_name}"
    else:
        direction, title = read_vector(vector or "", key=key), f"{vector}"
    result = tll.decode_directions(direction, index, top_k=top_k)
    console.print(f"v: {title}, length {float(direction.norm()):.3g}", markup=False, highlight=False)
    console.print(direction_table(result, width=console.width))
    frames = {"": result.to_dataframe()}
    if text is not None:
        unit = unit or ("vector" if sae is None else "activation")
        multiples = multiple or (0, 1, 2, 4)
        steer = tll.SteeringLens(direction, index, hook_name or "", multiples=multiples, unit=unit, model=loaded)
        steered = steer.run(loaded, text)
        console.print(steered.table(width=console.width))
        frames[".steered"] = steered.to_dataframe()
    for suffix, path in ((".csv", csv), (".json", json)):
        for part, frame in frames.items():
            if path is not None:
                _WRITERS[suffix](frame, where := path.with_suffix(part + path.suffix))
                console.print(f"wrote {where}", markup=False)


@app.command()
def label_sae(
    sae: Annotated[str, typer.Argument(help="`demo`, a folder as SAELens saves it, or a safetensors file")],
    bank: BankArgument,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", "-f", help="a feature; give it several times for several; default: all")
    ] = None,
    hook_name: Annotated[
        str | None, typer.Option("--hook-name", "-n", help="the activation that the SAE reads, where it does not say")
    ] = None,
    top_k: Annotated[int, typer.Option(help="neighbors and max-activating rows of each feature")] = 10,
    transform: Annotated[
        str,
        typer.Option(
            help="`center`: take the hook name's mean away, as a decoder direction stands for what is above it; `raw`"
        ),
    ] = "center",
    rows: Annotated[int, typer.Option(help="lines of the table to print")] = 30,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="also read each direction by this model's logit lens")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the whole table, with contexts, to this .csv, .parquet or .json file")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Label the features of a sparse autoencoder by a bank's rows, with the figures that say which labels to believe.

    Example: `tl-latentlens label-sae demo demo.h5 --out features.parquet`
    """
    import tl_latentlens as tll
    from tl_latentlens.views.terminal import feature_table, refusals, summary_table

    _require_writable(out)
    encoder = tll.load_sae(sae, hook_name=hook_name)
    opened = tll.Bank.open(bank)
    read = [encoder.hook_name] if encoder.hook_name in opened.hook_names else None
    index = tll.ContextualIndex(opened, read, device=device, transform=transform)
    loaded = None if model is None else tll.load_model(model, device=device)
    if loaded is not None:
        index.check_model(loaded)
    result = tll.label_features(encoder, index, feature, top_k=top_k, model=loaded)
    if out is not None:
        _WRITERS[out.suffix](result.with_evidence(), out)
    console.print(feature_table(result, rows))
    console.print(refusals(result.table), highlight=False, markup=False)
    if len(result.table) > 1:
        console.print(summary_table(result.summary()))
    if out is not None:
        console.print(f"wrote {out}", markup=False)


@app.command()
def evaluate(
    bank: BankArgument,
    model: ModelOption = "demo",
    hook_name: HookOption = None,
    transform: Annotated[
        list[str] | None, typer.Option("--transform", "-t", help="a transform; give it several times for several; default: all")
    ] = None,
    senses: Annotated[
        str,
        typer.Option(help="labelled uses of ambiguous words: `demo`, or a .csv or .jsonl file (text, word, sense, held_out)"),
    ] = "demo",
    sae: Annotated[str | None, typer.Option(help="also score the labels of all features of this SAE (see `label-sae`)")] = None,
    n_tokens: Annotated[int, typer.Option(help="tokens of the bank that are read, and replaced by their neighbors")] = 300,
    top_k: Annotated[int, typer.Option(help="neighbors that vote or are read")] = 5,
    seed: Annotated[int, typer.Option(help="seed of what is drawn at random")] = 0,
    out: Annotated[Path | None, typer.Option(help="write every figure to this .csv, .parquet or .json file too")] = None,
    html: Annotated[Path | None, typer.Option(help="write the curves over the layers to this file too")] = None,
    kind: KindOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure without a judge how often the neighbors are right, at each hook name and with each transform, beside nulls.

    Example: `tl-latentlens evaluate demo.h5 --html evaluation.html`
    """
    import tl_latentlens as tll
    from tl_latentlens.transforms import TRANSFORMS
    from tl_latentlens.views.terminal import evaluation_tables

    _require_writable(out)
    loaded = tll.load_model(model, kind=kind, device=device)
    found = tll.evaluate(
        loaded,
        bank,
        hook_names=hook_name,
        transforms=transform or TRANSFORMS,
        senses=senses,
        sae=None if sae is None else tll.load_sae(sae),
        n_tokens=n_tokens,
        top_k=top_k,
        device=device,
        seed=seed,
    )
    console.print(evaluation_tables(found))
    if out is not None:
        _WRITERS[out.suffix](found.to_dataframe(), out)
        console.print(f"wrote {out}", markup=False)
    if html is not None:
        found.plot().write_html(html, include_plotlyjs=True)
        console.print(f"wrote {html}", markup=False)


def _require_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise InvalidInputError(f"no folder for {path}; make it first")


def _require_writable(out: Path | None) -> None:
    if out is not None and (out.suffix not in _WRITERS or not out.parent.is_dir()):
        raise InvalidInputError(f"got --out {out}; expected a name that ends in {', '.join(_WRITERS)}, in a folder that exists")


@app.command()
def find_features(
    sae: Annotated[str, typer.Argument(help="`demo`, a folder as SAELens saves it, or a safetensors file")],
    bank: BankArgument,
    text: Annotated[str, typer.Argument(help="a text, run up to the word")],
    word: Annotated[str | None, typer.Option(help="the word: the last token that ends it is read")] = None,
    position: Annotated[int | None, typer.Option(help="a position in its place, BOS counted; negative: from the end")] = None,
    model: ModelOption = "demo",
    hook_name: Annotated[
        str | None, typer.Option("--hook-name", "-n", help="the activation that the SAE reads, where it does not say")
    ] = None,
    top_k: Annotated[int, typer.Option(help="components of each kind")] = 10,
    heads: Annotated[bool, typer.Option("--heads", help="the attention heads too")] = False,
    neurons: Annotated[bool, typer.Option("--neurons", help="the MLP neurons too")] = False,
    transform: Annotated[
        str, typer.Option(help="`center`: neighbors of directions with each hook name's mean taken away; `raw`")
    ] = "center",
    json: Annotated[bool, typer.Option("--json", help="print JSON in place of tables")] = False,
    csv: Annotated[Path | None, typer.Option(help="write the tables to this file too")] = None,
    kind: KindOption = None,
    device: DeviceOption = None,
) -> None:
    """Find the SAE features, and heads and neurons, that write what a word means in its context.

    Example: `tl-latentlens find-features demo demo.h5 "We fished and sat on the grassy bank" --word bank --heads`
    """
    from json import dumps, loads

    import pandas as pd

    import tl_latentlens as tll
    from tl_latentlens.views.found import find_table, meaning_lines

    if (word is None) == (position is None):
        raise InvalidInputError("expected one of --word and --position")
    encoder = tll.load_sae(sae, hook_name=hook_name)
    index = tll.ContextualIndex(bank, encoder.hook_name, device=device, transform=transform)
    loaded = tll.load_model(model, kind=kind, device=device)
    at: Any = position if word is None else word
    results = [tll.find_features(text, at, encoder, index, model=loaded, top_k=top_k)]
    for wanted, find in ((heads, tll.find_heads), (neurons, tll.find_neurons)):
        if wanted:
            results.append(find(text, at, index, model=loaded, hook_name=encoder.hook_name, top_k=top_k))
    tables = {result.kind: result.to_dataframe() for result in results}
    if csv is not None:
        pd.concat([table.assign(kind=of) for of, table in tables.items()]).to_csv(csv, index=False)
    if json:
        meaning = results[0].meaning
        word_read = {"tokens": meaning.tokens, "hook_name": meaning.hook_name, "by_token": meaning.by_token}
        alike = {"alike": [near.context for near in meaning.alike()], "n_uses": meaning.n_uses}
        read = {f"{of}s": loads(str(table.to_json(orient="records"))) for of, table in tables.items()}
        typer.echo(dumps({**word_read, **alike, **read}, indent=1, ensure_ascii=False))
        return
    console.print(meaning_lines(results[0].meaning, width=console.width))
    for result in results:
        console.print(find_table(result, width=console.width))
    if csv is not None:
        console.print(f"wrote {csv}", markup=False)


@app.command()
def explore(
    bank: BankArgument,
    model: ModelOption = "demo",
    sae: Annotated[
        str | None,
        typer.Option(help="an SAE whose features can be read: `demo`, a folder as SAELens saves it, or a safetensors file"),
    ] = None,
    hook_name: HookOption = None,
    transform: Annotated[str, typer.Option(help="the transform that is shown first; the page switches it")] = "auto",
    top_k: Annotated[int, typer.Option(help="neighbors for each token and hook name")] = 10,
    port: Annotated[int, typer.Option(help="of the page")] = 8050,
    host: Annotated[
        str, typer.Option(help="address to serve; any but this machine's own lets others use the page")
    ] = "127.0.0.1",
    kind: KindOption = None,
    device: DeviceOption = None,
) -> None:
    """Serve a local page: type a prompt, click a token at a layer, read its neighbors, follow features and vectors.

    Example: `tl-latentlens explore demo.h5 --sae demo`
    """
    import tl_latentlens as tll
    from tl_latentlens.views.explore import LOOPBACK, make_app, serve

    weights = None if sae is None else tll.load_sae(sae)
    index = tll.ContextualIndex(bank, hook_name, device=device, transform=transform)
    page = make_app(tll.load_model(model, kind=kind, device=device), index, weights, top_k=top_k, loopback=host in LOOPBACK)
    shown = f"[{host}]" if ":" in host else host
    console.print(f"http://{shown}:{port}   (Ctrl+C ends it)", markup=False, highlight=False)
    if host not in LOOPBACK:
        console.print("note: whoever reaches this port can use the page; there is no password")
    serve(page, host, port)


_LISTS = ("neighbors", "max_activating")
_WRITERS: dict[str, Callable[[Any, Path], None]] = {
    ".csv": lambda table, path: table.assign(**{name: table[name].str.join(" | ") for name in _LISTS if name in table}).to_csv(
        path, index=False
    ),
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
    ".json": lambda table, path: table.to_json(path, orient="records", indent=1),
}


def _print_result(result: Any, word: str | None, neighbors: int) -> None:
    from tl_latentlens.views.terminal import lens_table
    from tl_latentlens.words import word_up_to

    positions = [tuple(place) for place in result.positions.tolist()]
    if word is not None:
        matching = [(b, p) for b, p in positions if word_up_to(result.tokens[b], p) == word.strip()]
        if not matching:
            raise InvalidInputError(f"no token of the text ends the word {word!r}; its tokens are {result.tokens}")
        positions = matching
    console.print(lens_table(result, neighbors=neighbors, positions=positions))


_REPEAT = ", each text run twice and read in its second copy (repeat)"


def _info_table(bank: Any) -> Table:
    model, plan = bank.model_info, bank.plan
    cap = plan.settings.max_rows_per_token
    table = Table(show_header=False, title=escape(str(bank.path)), title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    weights = f"{model.dtype}{', mean-centred' if model.centered else ''}"
    lines = {
        "model": f"{model.name} ({model.class_name}, {model.n_layers} layers, d_model {model.d_model}, {weights})",
        "rows": f"{bank.n_rows:,} contextual tokens of {len(plan.tokens):,} tokens in {plan.n_prompts:,} prompts",
        "plan": f"{'no cap' if cap is None else f'at most {cap} rows'} a token id, seed {plan.settings.seed}, "
        f"{plan.n_truncated:,} prompts cut at n_ctx {model.n_ctx}{_REPEAT if plan.settings.repeat else ''}",
        "hook names": "\n".join(f"{name}  [{bank.n_rows:,}, {bank.d(name)}]" for name in bank.hook_names),
        "stored as": f"{bank.dtype}, {bank.path.stat().st_size / 1e6:,.1f} MB",
        "built with": ", ".join(f"{name} {number}" for name, number in bank.versions.items()),
    }
    for key, value in lines.items():
        table.add_row(key, escape(value))
    return table


def main() -> None:
    """Run the command line; an error of this package is one line, not a traceback."""
    try:
        app()
    except LatentLensError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
