"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.model.layers import one_hook_name

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="`demo`, a folder in Hugging Face format, or a name TransformerLens knows (`gpt2`)")
]
KindOption = Annotated[
    str | None, typer.Option(help="`hooked` (HookedTransformer) or `bridge` (TransformerBridge); default: what is installed")
]
DeviceOption = Annotated[str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`; default: CUDA where there is one")]
HookOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hook-name",
        "-n",
        help="a hook name, or layers in place of hook_resid_post (3, 3-8, 3,5,7, -1, all); give it several times for several",
    ),
]
DataOption = Annotated[
    bool | None, typer.Option("--json/--csv", help="print the result as JSON, or as CSV, in place of tables")
]
BankArgument = Annotated[Path, typer.Argument(help="a bank file (.h5)")]


def hook_name_in_bank(hook_name: str | None, bank: tll.Bank) -> str | None:
    """The hook name that an option names, where a layer stands for its hook_resid_post; None where it was left out."""
    return None if hook_name is None else one_hook_name(hook_name, bank.model_info.n_layers)
