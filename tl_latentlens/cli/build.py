"""`tl-latentlens build`: run a corpus through a model into a bank."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.cli.corpus_options import CorpusArgument, CorpusOptions, PlanOptions
from tl_latentlens.cli.info import print_info
from tl_latentlens.cli.options import DataOptions, HookOption, ModelOptions, RayOptions


def build(
    corpus: CorpusArgument,
    bank: Annotated[
        Path, typer.Argument(help="the bank file to make (.h5), or the folder of its shards; an interrupted build resumes")
    ],
    *,
    model: ModelOptions,
    data: DataOptions,
    ray: RayOptions,
    texts: CorpusOptions,
    plan: PlanOptions,
    hook_name: HookOption = None,
    shard: Annotated[
        str | None,
        typer.Option(help="build part i of n alone, `3/64`, i from 0 on; default: what torchrun or a SLURM array says, or all"),
    ] = None,
) -> None:
    """Run a corpus through a model and keep the contextual vectors of its tokens in a bank.

    Example: `tl-latentlens build corpus.txt gpt2.h5 --model gpt2 -n 5,9`
    """
    try:
        loaded = None if ray.is_asked(shard) else model.load()
        loaded_texts = texts.load(corpus)
        with redirect_stdout(sys.stderr):  # its notes; stdout is for the result
            if loaded is None:
                settings = ray.settings() | plan.settings()
                built = tll.build_bank_on_ray(model.loader(), loaded_texts, bank, hook_names=hook_name, **settings)
            else:
                built = tll.build_bank(loaded, loaded_texts, bank, hook_names=hook_name, shard=shard, **plan.settings())
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "stopped; nothing was written yet", err=True)
        raise typer.Exit(130) from None
    print_info(built, data.as_json)
