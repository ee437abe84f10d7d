"""The head of the page of steered runs."""

from collections.abc import Sequence

from tl_latentlens.index.page_head import index_call, index_head
from tl_latentlens.lens.page_head import reading_notes
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.text import place_name


def steering_head(
    reading: LensResult,
    hook_name: str,
    multiples: Sequence[float],
    notes: Sequence[str],
    grids: Sequence[LensGrid],
    call: str = "",
) -> PageHead:
    """The head.

    Args:
        reading: The readings under one multiple.
        hook_name: Where the vector was added.
        multiples: The multiples.
        notes: What is known of the vector.
        grids: The cells of each text under one multiple.
        call: The command that made the runs; empty: the call of `SteeringLens`.
    """
    index = next(iter(reading.found.values())).index
    shown = ", ".join(f"{multiple:g}" for multiple in multiples)
    is_calibrated = any(search.known is not None for search in reading.found.values())
    return index_head(
        index,
        "What a steered run means, layer by layer",
        f"A vector v is added to the stream at {place_name(hook_name)} while the text runs; a column is one multiple of it.",
        call=call or f'SteeringLens(v, {index_call(index)}, "{hook_name}", multiples=({shown})).run(model, text)',
        notes=[
            f"v was {'; '.join(notes)}.",
            "Choose a cell to see what is read there; behind its layer stands the cosine with the unsteered activation.",
            *reading_notes(grids[0].lenses, is_calibrated=is_calibrated),
        ],
    )
