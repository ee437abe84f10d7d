"""`tl-latentlens merge`: the shards of a bank as one file."""

from pathlib import Path
from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.cli.info import print_info
from tl_latentlens.cli.options import DataOptions


def merge(
    folder: Annotated[Path, typer.Argument(help="the folder of the parts: shards, files by hook name, or both")],
    bank: Annotated[Path, typer.Argument(help="the bank file to make (.h5); an interrupted merge resumes")],
    *,
    data: DataOptions,
) -> None:
    """Write the parts of a bank into one file, the one that a single process would have built.

    Example: `tl-latentlens merge gpt2 gpt2.h5`
    """
    print_info(tll.merge_bank(folder, bank), data.as_json)
