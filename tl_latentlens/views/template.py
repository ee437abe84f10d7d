"""Pages as self-contained HTML files: a template of this folder with the parts that all pages share, and its data."""

import json
from importlib import resources
from typing import Any

from tl_latentlens.views.lens_names import LENSES

_SHARED_PARTS = {"head": "head.html", "css": "page.css", "js": "page.js", "lens": "lens.js"}


def render_template(template: str, data: dict[str, Any], *, title: str = "tl-latentlens", image_source: str = "") -> str:
    """The page, which asks for nothing from a network.

    Args:
        template: A file of this folder.
        data: What the scripts of the page show. It stands in the page as JSON of ASCII characters without any "<", which no
            HTML parser takes for markup.
        title: The title of the page.
        image_source: Where the page may take pictures from, such as "data:"; empty: it has none.
    """
    folder = resources.files("tl_latentlens.views")
    page = folder.joinpath(template).read_text(encoding="utf-8")
    for name, file in _SHARED_PARTS.items():
        page = page.replace(f"{{{{{name}}}}}", folder.joinpath(file).read_text(encoding="utf-8").rstrip())
    hues = {f"{{{{hue:{lens}}}}}": " ".join(map(str, info.hue)) for lens, info in LENSES.items()}
    image_policy = f"img-src {image_source}; " if image_source else ""
    for name, text in {"{{title}}": title, "{{image_policy}}": image_policy, **hues}.items():
        page = page.replace(name, text)
    return page.replace("{{data}}", json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
