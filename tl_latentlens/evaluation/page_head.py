"""The head of the page of an evaluation."""

from collections.abc import Sequence

from tl_latentlens.bank.bank import Bank
from tl_latentlens.index.page_head import model_line
from tl_latentlens.views.page_head import PageHead

_NOTES = (
    "Each chart has the hooks from left to right. A colored line is a way to read: a transform of the neighbors, or another "
    "lens. A gray one is a null: what chance, or the token without its context, gives. The bands are 95 % intervals. A "
    "reading says something where its line is off the gray ones by more than their bands.",
    "The table below a chart has the same figures, with their intervals; at each hook the best transform is in bold. Point at "
    "a line to see it alone, or at a point to see its figure.",
)


def evaluation_head(
    bank: Bank, hook_names: Sequence[str], transforms: Sequence[str], n_tokens: int, top_k: int, seed: int
) -> PageHead:
    """The head, with the call of `evaluate` that makes the figures."""
    settings = f"transforms={list(transforms)}, n_tokens={n_tokens}, top_k={top_k}, seed={seed}"
    return PageHead(
        "Is the lens right?",
        "How often the nearest rows of the bank agree with the truth, at each hook, beside what chance and other lenses give.",
        model_line(bank.model_info),
        f"{bank.path.name}, {bank.n_rows:,} rows",
        hook_names,
        call=f'evaluate(model, "{bank.path.name}", {settings})',
        notes=_NOTES,
    )
