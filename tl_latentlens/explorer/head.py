"""The head of the explore page, and the stylesheet and script that it shares with the other pages."""

from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.page_head import index_head
from tl_latentlens.lens.page_head import reading_notes
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.template import shared_part

_PLACE = "{%css%}"  # Where Dash puts the stylesheets of its components and of the assets.


def explore_head(index: ContextualIndex, call: str) -> PageHead:
    """The head, with what each lens reads."""
    lead = "What a prompt, an image or a direction means: the tokens of the bank whose activations are nearest."
    notes = reading_notes(list(LENSES), is_calibrated=True)
    return index_head(index, "tl-latentlens explore", lead, call=call, notes=notes)


def with_shared_parts(page: str) -> str:
    """Dash's page with the stylesheet of all pages, which its own follow, and the script that marks edges."""
    shared = f"<style>\n{shared_part('css')}\n</style>\n<script>\n{shared_part('edges')}\n</script>\n"
    return page.replace(_PLACE, f"{shared}{_PLACE}", 1)
