"""Makes the pictures of README and docs from the embedded model: `python docs/pictures.py`, from the root of the repository.

`python docs/pictures.py BANK MODEL` makes the picture of other words alone, from a bank of another model (a folder or a name).
Needs Chromium, playwright, pillow, and the extra explore.
"""

import io
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from werkzeug.serving import make_server

import tl_latentlens as tll
from tl_latentlens.explorer import make_app

PICTURES = Path(__file__).with_name("_static")
TEXTS = "She deposited her money and her savings at the bank", "We fished in the river and sat on the grassy bank"
WORD_TEXTS = "In the dark cave we saw a bat", "He hit the ball hard with his bat"
PROMPT = "The boat crossed the"
SCENE, PATCH = 812, 15  # a scene, and the position of a patch that holds an object
SHARPNESS, COLORS = 2, 128  # pixels a CSS pixel; of the palette


def main() -> None:
    """Build the bank of the demo, read, and take the pictures."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        bank, page = (str(Path(folder) / name) for name in ("demo.h5", "reading.html"))
        _command("build", "demo", bank, "--model", "demo")
        _command("decode", bank, *TEXTS, "--html", page)
        model, index = tll.load_demo_model(), tll.ContextualIndex(bank)
        hooks = tll.latentlens_hooks(index)
        model.run_with_hooks(PROMPT, fwd_hooks=hooks)
        curves = Path(folder) / "curves.html"
        hooks.follow_tokens([" river", " sea", " the"]).plot(by="rank").write_html(curves, include_plotlyjs=True)
        server = make_server("127.0.0.1", 0, make_app(model, index, tll.load_sae("demo"), top_k=4).server, threaded=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _shots(Path(page).as_uri(), "reading", _choose_text, (860, 830))
        _shots(curves.as_uri(), "followed", lambda tab: tab.wait_for_timeout(1000), (700, 610), ("light",))
        _shots(f"http://127.0.0.1:{server.server_port}", "explore", _type_a_prompt, (1200, 800), ("light",))
        server.shutdown()
        _scene(Path(folder) / "scenes.h5")


def words(bank: str, model: str) -> None:
    """Take the picture of the other words of one token in two texts."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "words.html"
        _command("decode", bank, *WORD_TEXTS, "--model", model, "--html", str(page))
        _shots(page.as_uri(), "words", _choose_last, (860, 800))


def _choose_last(tab: Page) -> None:
    tab.select_option("#text", "1")
    tab.click("tbody tr:nth-child(4) td >> nth=-1")


def _scene(bank: Path) -> None:
    """The picture of the page with a scene, at the second layer of four."""
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in (0, 2, 4))]
    _command("build", "demo", str(bank), "--model", "demo", *(part for name in names for part in ("-n", name)))
    app = make_app(tll.load_demo_vlm(), tll.ContextualIndex(bank), top_k=4)
    server = make_server("127.0.0.1", 0, app.server, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _shots(f"http://127.0.0.1:{server.server_port}", "explore-scene", _choose_scene, (1200, 960), ("light",))
    server.shutdown()


def _choose_scene(tab: Page) -> None:
    tab.wait_for_selector("#scene")
    tab.wait_for_timeout(1000)
    tab.evaluate(f"dash_clientside.set_props('reading', {{data: {{image: 'scene {SCENE}', text: ''}}}})")
    tab.evaluate(f"dash_clientside.set_props('cell', {{data: {{hook: 'blocks.0.hook_resid_post', pos: {PATCH}}}}})")
    tab.wait_for_selector(".stage img[src]")
    tab.wait_for_selector(".panel .chips")
    tab.wait_for_timeout(1000)


def _command(*arguments: str) -> None:
    command = shutil.which("tl-latentlens", path=Path(sys.executable).parent) or "tl-latentlens"
    subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)


def _choose_text(tab: Page) -> None:
    tab.select_option("#text", "1")
    tab.click("tbody tr:nth-child(3) td >> nth=-1")


def _type_a_prompt(tab: Page) -> None:
    tab.fill("#prompt", TEXTS[1])
    tab.press("#prompt", "Enter")
    tab.wait_for_selector(".panel .chips")
    tab.wait_for_timeout(1000)


def _shots(
    url: str, name: str, act: Callable[[Page], Any], size: tuple[int, int], schemes: tuple[Any, ...] = ("light", "dark")
) -> None:
    """A picture for each color scheme, as small as a palette makes it."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for scheme in schemes:
            viewport: Any = dict(zip(("width", "height"), size, strict=True))
            tab = browser.new_page(viewport=viewport, device_scale_factor=SHARPNESS, color_scheme=scheme)
            tab.goto(url)
            act(tab)
            picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
            ending = f"-{scheme}" if len(schemes) > 1 else ""
            picture.quantize(COLORS, dither=Image.Dither.NONE).save(PICTURES / f"{name}{ending}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    words(*sys.argv[1:]) if len(sys.argv) > 1 else main()
