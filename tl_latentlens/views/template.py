"""Pages as self-contained HTML files: a template of this folder with the parts that all pages share, and its data."""

import json
import re
from functools import cache
from importlib import resources
from typing import Any

from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.page_head import PageHead, head_html

_SHARED_PARTS = {
    "head": "head.html",
    "css": "page.css",
    "edges": "edges.js",
    "js": "page.js",
    "lens": "lens.js",
    "feature_card": "feature_card.js",
}
_PLACE = re.compile(r"\{\{([\w:]+)\}\}")


def render_template(
    template: str,
    data: dict[str, Any],
    head: PageHead,
    *,
    title: str = "tl-latentlens",
    image_source: str = "",
    body: str = "",
) -> str:
    """The page, which asks for nothing from a network.

    Args:
        template: A file of this folder.
        data: What the scripts of the page show. It stands in the page as JSON of ASCII characters without any "<", which no
            HTML parser takes for markup.
        head: What the page opens with.
        title: The title of the page.
        image_source: Where the page may take pictures from, such as "data:"; empty: it has none.
        body: HTML that stands where the template says so.
    """
    texts = {
        "title": title,
        "image_policy": f"img-src {image_source}; " if image_source else "",
        "header": head_html(head),
        "body": body,
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    return _PLACE.sub(lambda place: texts[place[1]], _with_shared_parts(template))


def shared_part(name: str) -> str:
    """A part that all pages share, such as "css", whole: a page that is no template of this folder can hold it too."""
    return _filled(f"{{{{{name}}}}}")


@cache
def _with_shared_parts(template: str) -> str:
    return _filled(_read(template))


def _filled(text: str) -> str:
    """A text with the shared parts that it names, theirs too, and the hues of the lenses."""
    parts = {f"hue:{lens}": " ".join(map(str, info.hue)) for lens, info in LENSES.items()}

    def fill(place: re.Match[str]) -> str:
        name = place[1]
        return _filled(_read(_SHARED_PARTS[name])) if name in _SHARED_PARTS else parts.get(name, place[0])

    return _PLACE.sub(fill, text)


def _read(file: str) -> str:
    return resources.files("tl_latentlens.views").joinpath(file).read_text(encoding="utf-8").rstrip()
