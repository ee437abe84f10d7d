"""`tl-latentlens decode-image`: read the visual tokens of an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import tl_latentlens as tll
from tl_latentlens.cli.image_model import ImageModelOptions
from tl_latentlens.cli.options import BankArgument, DataOptions, HookOption
from tl_latentlens.cli.output import command_line, console, note, print_table, require_folders
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.loading import installed_kinds
from tl_latentlens.views.text import printable
from tl_latentlens.vision.decode_image import ImageReading, read_image_file
from tl_latentlens.vision.decode_image import decode_image as read_image
from tl_latentlens.vision.patch_choice import named_patches

_PROMPT = "Describe the image."


def decode_image(
    bank: BankArgument,
    image: Annotated[Path, typer.Argument(help="a PNG, JPEG, GIF, WebP, BMP or TIFF file")],
    *,
    model: ImageModelOptions,
    data: DataOptions,
    hook_name: HookOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="what stands with the image: framed by the model's chat template, or behind the image where it has none; a "
            f"text with the model's placeholder is taken as it is; default: {_PROMPT!r}",
            show_default=False,
        ),
    ] = None,
    patches: Annotated[
        str | None,
        typer.Option(
            help="show these patches, by their number from 0 in the order of the prompt (17,40), or `all`; default, where --at "
            "and --box are not given either: of each ninth of the image the one whose nearest token the fewest share"
        ),
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="show the patch at a point, x,y in pixels; give it several times for several")
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="show the patches in a box, left,top,right,bottom in pixels; give it several times for several"),
    ] = None,
    top_k: Annotated[int, typer.Option(help="neighbors for each patch and hook name")] = 3,
    words: Annotated[int, typer.Option(help="nearest other words, which say what a patch means; 0: none")] = 8,
    transform: Annotated[
        str, typer.Option(help="`raw`, `center`, `standardize`, `remove_top`, `csls` or `center_writing`; see the docs")
    ] = "auto",
    allow_mismatch: Annotated[bool, typer.Option(help="read on, with a warning, where the bank is of another model")] = False,
    html: Annotated[
        Path | None, typer.Option(help="also write all patches as one page, with the image; it needs no network")
    ] = None,
) -> None:
    """Show an image to a vision-language model and read its patches by their nearest words in a bank of text.

    Example: `tl-latentlens decode-image llava.h5 photo.png --html photo.html`
    """
    require_folders(html)
    numbers = _patch_numbers(patches)
    points = [_numbers(text, 2, "--at") for text in at or []]
    boxes = [_numbers(text, 4, "--box") for text in box or []]
    picture = read_image_file(image)  # before a model is loaded, which may take minutes
    index = tll.ContextualIndex(bank, device=model.device, transform=transform, allow_mismatch=allow_mismatch)
    if not model.sees_scenes and model.kind is None and "bridge" in installed_kinds():
        model.kind = "bridge"  # a HookedTransformer sees no images
    if model.sees_scenes and prompt is not None:
        note("demo-vlm sees scenes without a prompt; --prompt is not used", "note")
    reading = read_image(
        model.load_for(index.banks[0]),
        picture,
        index,
        name=image.name,
        prompt=_PROMPT if prompt is None else prompt,
        hook_names=hook_name,
        top_k=top_k,
        words=words,
    )
    everything, is_default = patches == "all", not (patches or points or boxes)
    chosen = _chosen(reading, numbers, points, boxes, everything=everything)
    if data.as_json is not None:
        print_table(data.as_json, reading.to_dataframe(chosen))
    else:
        _print_readings(reading, chosen, top_k, is_default=is_default)
    if html is not None:
        reading.to_html(html, call=command_line())
        note(f"wrote {html}")


def _chosen(
    reading: ImageReading, numbers: list[int], points: list[list[float]], boxes: list[list[float]], *, everything: bool
) -> Sequence[int]:
    grid = reading.image.grid
    if everything:
        return np.flatnonzero(grid.is_patch).tolist()
    if numbers or points or boxes:
        return named_patches(grid, numbers, points, boxes).tolist()
    return reading.clearest().tolist()


def _print_readings(reading: ImageReading, chosen: Sequence[int], top_k: int, *, is_default: bool) -> None:
    console.print(printable(reading.image.title), markup=False, highlight=False, style="bold")
    if reading.prompt:
        console.print(f"prompt: {printable(reading.prompt)}", markup=False, highlight=False, style="dim")
    console.print(reading.to_rich(chosen, top_k, width=console.width))
    if is_default:
        console.print(
            f" These {len(chosen)}: of each ninth of the image the patch whose nearest token the fewest share. Others: --at "
            "x,y, --box left,top,right,bottom, --patches; all: --html page.html",
            style="dim",
            markup=False,
            highlight=False,
        )


def _patch_numbers(text: str | None) -> list[int]:
    """The numbers that --patches names; none where it was left out, or is `all`.

    Raises:
        InvalidInputError: It names none.
    """
    if text is None or text == "all":
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InvalidInputError(f"got --patches {text!r}; expected numbers from 0, as 17,40, or all")
    return [int(part) for part in parts]


def _numbers(text: str, n: int, option: str) -> list[float]:
    """So many numbers with commas between them.

    Raises:
        InvalidInputError: It is something else.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != n or not np.isfinite(values).all():
        example = {2: "120,80", 4: "40,40,90,200"}[n]
        raise InvalidInputError(f"got {option} {text!r}; expected {n} numbers in pixels, as {example}")
    return values
