"""The application of the command line: all commands, and the options that stand before a command."""

import platform
from importlib.metadata import version
from typing import Annotated

import typer

from tl_latentlens import __version__
from tl_latentlens.cli.build import build
from tl_latentlens.cli.decode import decode
from tl_latentlens.cli.decode_image import decode_image
from tl_latentlens.cli.decode_vector import decode_vector
from tl_latentlens.cli.demo import demo
from tl_latentlens.cli.evaluate import evaluate
from tl_latentlens.cli.explore import explore
from tl_latentlens.cli.find_features import find_features
from tl_latentlens.cli.info import info, verify
from tl_latentlens.cli.label_sae import label_sae
from tl_latentlens.cli.merge import merge
from tl_latentlens.cli.option_groups import with_option_groups
from tl_latentlens.cli.plan import plan

_SHOWN_VERSIONS = ("torch", "transformer-lens", "transformers", "h5py")

app = typer.Typer(
    name="tl-latentlens",
    help="What does this vector mean? Read a model's activations by their nearest contextual neighbors.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
_BANKS = (demo, plan, build, merge, info, verify)
_READINGS = (decode, decode_image, decode_vector, label_sae, evaluate, find_features, explore)
for command in (*_BANKS, *_READINGS):
    app.command()(with_option_groups(command))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        others = [f"{name} {version(name)}" for name in _SHOWN_VERSIONS]
        typer.echo(f"tl-latentlens {__version__} ({', '.join(others)}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def options(
    is_version_asked: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version, and those of the packages it runs on"
        ),
    ] = False,
) -> None:
    """What does this vector mean? Read a model's activations by their nearest contextual neighbors."""
