"""Runs benchmarks and prints their tables: `python -m benchmarks [NAME …]`, from the root of the repository."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measure import Settings, environment

BENCHMARKS = (
    "planning",
    "build",
    "search",
    "checking",
    "opening",
    "live",
    "growth",
    "storage",
    "labels",
    "label_quality",
    "pages",
    "scenes",
    "keys",
    "coverage",
    "evidence",
)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(BENCHMARKS)}; default: all")] = None,
    corpus: Annotated[str, typer.Option(help='"demo", or a file of texts')] = "demo",
    repeats: Annotated[int, typer.Option(help="timed runs of each contestant, in turns")] = 5,
    large: Annotated[bool, typer.Option(help="also the sizes that take minutes or much memory")] = False,
    device: Annotated[str, typer.Option(help="for models and indices")] = "cpu",
    model: Annotated[str, typer.Option(help='"demo", a Hugging Face folder or name, or "llama-8b-shape"')] = "demo",
    peak_flops: Annotated[float | None, typer.Option(help="of the device; default: known for H100 and H200")] = None,
    peer_python: Annotated[str | None, typer.Option(help="Python of an environment with latentlens; default: this one")] = None,
    figure: Annotated[Path | None, typer.Option(help="draw what growth, scenes or keys measures here (.svg, .png)")] = None,
    folder: Annotated[Path | None, typer.Option(help="keeps what scenes, keys and evidence make; default: below build")] = None,
    draws: Annotated[int, typer.Option(help="simulated cases of each line of coverage")] = 1000,
    sae: Annotated[str, typer.Option(help='of `--model`, for label_quality: "demo", or a folder')] = "demo",
    seeds: Annotated[int, typer.Option(help="trainings of scenes")] = 3,
    out: Annotated[Path | None, typer.Option(help="write the tables here too, as Markdown")] = None,
) -> None:
    """Run benchmarks; a wrong result ends the command with an error."""
    if unknown := set(names or ()) - set(BENCHMARKS):
        raise typer.BadParameter(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if peer_python is not None and shutil.which(peer_python) is None:
        raise typer.BadParameter(f"no Python at {peer_python}")
    settings = Settings(corpus, repeats, large, device, model, peak_flops, peer_python, figure, folder, draws, sae, seeds)
    sections = [environment()]
    typer.echo(sections[0])
    for name in names or BENCHMARKS:
        sections.append(import_module(f"benchmarks.{name}").run(settings))
        typer.echo(f"\n{sections[-1]}")
        if out is not None:
            out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
