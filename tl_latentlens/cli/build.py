"""`tl-latentlens build`: run a corpus through a model into a bank."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.cli.info import print_info
from tl_latentlens.cli.options import DataOptions, HookOption, ModelOptions, RayOptions


def build(
    corpus: Annotated[
        str,
        typer.Argument(
            help="a .txt, .csv, .tsv, .jsonl, .json or .parquet file, a folder of them, `demo`, or the id of a hub dataset"
        ),
    ],
    bank: Annotated[
        Path, typer.Argument(help="the bank file to make (.h5), or the folder of its shards; an interrupted build resumes")
    ],
    *,
    model: ModelOptions,
    data: DataOptions,
    ray: RayOptions,
    hook_name: HookOption = None,
    text_column: Annotated[
        str, typer.Option(help="column that holds the text (tables, datasets); dots lead into nested fields")
    ] = "text",
    field: Annotated[str | None, typer.Option(help="where the records are in a .json file, for instance data.rows")] = None,
    split: Annotated[str, typer.Option(help="split of a hub dataset")] = "train",
    limit: Annotated[int | None, typer.Option(help="read at most this many texts")] = None,
    max_rows_per_token: Annotated[int, typer.Option(help="most rows of one token id, a uniform sample; 0: no cap")] = 50,
    store_dtype: Annotated[str, typer.Option(help="how vectors are stored: float16, bfloat16 or float32")] = "float16",
    dtype: Annotated[str | None, typer.Option("--dtype", hidden=True)] = None,
    seed: Annotated[int, typer.Option(help="seed of the sample")] = 0,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="run each text twice and read the second copy, whose tokens know what comes after")
    ] = False,
    keep_special_tokens: Annotated[
        bool, typer.Option("--keep-special-tokens", help="make rows of special tokens in the texts too (chat templates)")
    ] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="most tokens of one batch; less needs less memory")] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="build part i of n alone, `3/64`, i from 0 on; default: what torchrun or a SLURM array says, or all"),
    ] = None,
) -> None:
    """Run a corpus through a model and keep the contextual vectors of its tokens in a bank.

    Example: `tl-latentlens build corpus.txt gpt2.h5 --model gpt2 -n 5,9`
    """
    settings = {
        "hook_names": hook_name,
        "max_rows_per_token": max_rows_per_token or None,
        "dtype": dtype or store_dtype,
        "seed": seed,
        "repeat": repeat,
        "keep_special_tokens": keep_special_tokens,
        "batch_tokens": batch_tokens,
    }
    try:
        loaded = None if ray.is_asked(shard) else model.load()
        texts = tll.load_corpus(corpus, text_column=text_column, field=field, split=split, limit=limit)
        with redirect_stdout(sys.stderr):  # its notes; stdout is for the result
            if loaded is None:
                built = tll.build_bank_on_ray(model.loader(), texts, bank, **ray.settings(), **settings)
            else:
                built = tll.build_bank(loaded, texts, bank, shard=shard, **settings)
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "stopped; nothing was written yet", err=True)
        raise typer.Exit(130) from None
    print_info(built, data.as_json)
