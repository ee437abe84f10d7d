"""The heads of the pages of a run: of its tokens, and of the patches of an image."""

from collections.abc import Mapping, Sequence

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.page_head import index_call, index_head
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.index.word_search import WordSearchResult
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.jumps import JUMP_SENTENCE
from tl_latentlens.views.page_head import PageHead

_KNOWN_NOTE = (
    "known, from 0 to 1: the share of the bank's own tokens that are no nearer to their nearest row than this token is. Up to "
    "0.05 the bank does not know the token, and its word is faint."
)
_LENS_NOTES = {
    "words": (
        "Other words: the nearest words of the bank that are not the token's own, each once, from rows of its own layer. They "
        "say what the token means here. Punctuation and the first layers have none (·)."
    ),
    "latentlens": (
        "Uses: the activation at a layer and token is compared with the rows of the bank (LatentLens), and the nearest are "
        "shown in their texts. The number before each is the cosine, at most 1; the small number behind it is the layer of the "
        f"row, and the other layers at which it is near. A dashed line is a jump: {JUMP_SENTENCE}."
    ),
    "around": "Words around: those that stand near the nearest uses of the token, and not near its other uses.",
    "logit_lens": "Logit lens: the model's own unembedding reads the activation; percent: how likely each token comes next.",
    "embedding_lens": "Embedding lens: the input tokens whose embeddings are nearest, each with its cosine.",
}


def reading_head(
    found: Mapping[str, SearchResult],
    words: Mapping[str, WordSearchResult],
    grids: Sequence[LensGrid],
    *,
    image: bool = False,
    call: str = "",
) -> PageHead:
    """The head of the page of a run.

    Args:
        found: Hook name → neighbors.
        words: Hook name → nearest other words; empty where they were not asked for.
        grids: The cells of each text.
        image: Whether the patches of an image were read, else the tokens of texts.
        call: The command that made the reading; empty: the call of `latentlens_hooks` that does.

    Raises:
        InvalidInputError: There is no text.
    """
    if not grids:
        raise InvalidInputError("nothing was decoded: no position was selected")
    first = next(iter(found.values()))
    is_calibrated = not image and any(search.known is not None for search in found.values())
    n_words = next(iter(words.values())).rows.shape[-1] if words else 0
    settings = {"top_k": first.rows.shape[-1], "words": n_words}
    settings |= {} if image else {"calibrate": is_calibrated}
    settings |= {"embedding_lens": True} if "embedding_lens" in grids[0].lenses else {}
    arguments = "".join(f", {name}={value}" for name, value in settings.items())
    positions = ', positions="image"' if image else ""
    notes = reading_notes(grids[0].lenses, is_calibrated=is_calibrated)
    what = "each patch of the image" if image else "each token"
    shown = "nearest other word" if "words" in grids[0].lenses and not image else "word of the bank whose activation is nearest"
    return index_head(
        first.index,
        f"What {what} means, layer by layer",
        f"In each cell: the {shown}. Choose {'a patch' if image else 'a cell'} to see its uses in their texts.",
        call=call or f"latentlens_hooks({index_call(first.index)}{arguments}{positions})",
        notes=notes,
    )


def reading_notes(lenses: Sequence[str], *, is_calibrated: bool) -> list[str]:
    """What each lens reads, and what `known` says where it was computed."""
    return [_LENS_NOTES[lens] for lens in lenses] + [_KNOWN_NOTE] * is_calibrated
