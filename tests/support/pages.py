"""What a page shows, and the browser that opens it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import tl_latentlens as tll

BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu"]
MARKUP = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
HOSTILE = f"The bank {MARKUP} \x1b[31m</script><!-- $x$ &amp; end"
"""A text with markup, an escape code and TeX."""


def find_browser() -> str | None:
    """A Chromium in PATH, or the one that Playwright installed; None where there is neither."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as play:
        path = play.chromium.executable_path
    return path if Path(path).is_file() else None


def dumped_dom(browser: str, page: Path, profile: Path) -> str:
    """The DOM of a page after its scripts ran, without the scripts."""
    command = [browser, "--headless", *BROWSER_ARGUMENTS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)


def page_json(page: Path) -> str:
    """The data of a page, as they stand in it."""
    return page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]


def page_data(page: Path) -> dict[str, Any]:
    """What the scripts of a page show."""
    return json.loads(page_json(page))


def lens_cells(result: tll.LensResult, batch: int = 0) -> list[list[Any]]:
    """The cells of one text, [layer][pos], found one by one."""
    positions = [pos for text, pos in result.positions.tolist() if text == batch]
    return [[result.cell(name, pos, batch) for pos in positions] for name in result.hook_names]


def texts_of(component: Any) -> str:
    """All that a Dash component shows."""
    if component is None or isinstance(component, str | int | float):
        return str(component or "")
    if isinstance(component, list | tuple):
        return "".join(map(texts_of, component))
    return texts_of(getattr(component, "children", None))


def found(components: Any, class_name: str) -> list[Any]:
    """All components of a class, in order."""
    if isinstance(components, list | tuple):
        return [one for part in components for one in found(part, class_name)]
    here = [components] if class_name in (getattr(components, "className", None) or "").split() else []
    return here + (found(components.children, class_name) if getattr(components, "children", None) is not None else [])
