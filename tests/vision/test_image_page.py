"""Pictures of visual tokens: the page holds what was read and runs nothing of a text; the PNG shows words and color."""

import base64
import re
import zlib
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS
from support.pages import dumped_dom, page_data

import tl_latentlens as tll
from tl_latentlens.views.text import visible
from tl_latentlens.vision.image_page import pixels

HOSTILE = (
    "The bank <script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\"> \x1b[31m</script><!-- end"
)
NAMES = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
GRID = tll.PatchGrid.regular(2, 3, range(2, 8), height=20, width=30)


@pytest.fixture(scope="module")
def results(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[tll.LensResult]:
    """A text whose positions 2 to 7 stand for six patches, read from a bank that holds markup; calibrated and not."""
    path = tmp_path_factory.mktemp("image") / "h.h5"
    index = tll.ContextualIndex(
        tll.build_bank(any_model, [HOSTILE, *TEXTS], path, hook_names=NAMES, progress=False), device="cpu"
    )
    hooks = [tll.latentlens_hooks(index, embedding_lens=True, calibrate=calibrate) for calibrate in (True, False)]
    any_model.run_with_hooks(f"Our old {HOSTILE}", fwd_hooks=[*hooks[0], *hooks[1]])
    return [one.result for one in hooks]


@pytest.fixture(scope="module")
def result(results: list[tll.LensResult]) -> tll.LensResult:
    return results[0]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def decoded(uri: str) -> np.ndarray:
    """The pixels of a PNG, by hand."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    length = int.from_bytes(data[33:37], "big")
    assert data[37:41] == b"IDAT"
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(height, 1 + 3 * width)
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:].reshape(height, width, 3)


def test_page_holds_the_picture_the_boxes_and_every_reading(
    result: tll.LensResult, picture: np.ndarray, tmp_path: Path
) -> None:
    path = tll.image_to_html(result, GRID, picture, tmp_path / "image.html")
    data = page_data(path)
    assert np.array_equal(decoded(data["image"]["picture"]), picture)
    assert np.allclose(data["image"]["boxes"][4], [100 / 3, 50, 200 / 3, 100], atol=1e-3)
    assert data["image"]["pixels"][4] == [20, 20, 40, 40]
    assert data["image"]["places"] == [[0, row, column] for row in range(2) for column in range(3)]
    [text] = data["texts"]
    assert text["positions"] == [2, 3, 4, 5, 6, 7]
    for i, name in enumerate(NAMES):
        for j, pos in enumerate(text["positions"]):
            cell = result.cell(name, pos)
            found = np.array(text["latentlens"][i][j]).reshape(-1, 3)
            assert found[:, 2] == pytest.approx([near.similarity for near in cell.neighbors], abs=1e-4)
            index = result.found[name].index
            for k, near in zip(found[:, 0], cell.neighbors, strict=True):
                context = index.row(near.row).window(160).clipped(160)
                assert data["contexts"][int(k)][:3] == [context.before, context.token, context.after]
            for lens in ("logit_lens", "embedding_lens"):
                assert [data["strings"][int(k)] for k in text[lens][i][j][::2]] == [visible(t) for t, _ in getattr(cell, lens)]
    assert (text["known"], data["lenses"][0]["scale"]) == (None, "cosine"), "text says nothing of how near a patch should be"
    assert any("<script>" in part for context in data["contexts"] for part in context)
    page = path.read_text(encoding="utf-8")
    assert "<script>document.title" not in page
    assert not re.search(r"https?:|@import|url\(", page), "nothing is asked of a network"


def test_the_page_works_in_a_browser(result: tll.LensResult, browser: str, picture: np.ndarray, tmp_path: Path) -> None:
    path = tll.image_to_html(result, GRID, picture, tmp_path / "image.html")
    clicks = (
        "const slider = document.getElementById('layer'); slider.value = 1; slider.dispatchEvent(new Event('input'));"
        "document.querySelector('[data-key=embedding_lens]').click(); document.querySelectorAll('#image button')[4].click()"
    )
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"<script>{clicks}</script></body>"), encoding="utf-8")
    dom = dumped_dom(browser, path, tmp_path / "profile")
    assert "<title>tl-latentlens</title>" in dom
    assert dom.count("<img") == 1
    shown = [unescape(word) for word in re.findall(r"<button[^>]*data-at[^>]*><span>(.*?)</span>", dom)]
    cells = [result.cell(NAMES[1], pos) for pos in range(2, 8)]
    assert shown == [visible(cell.embedding_lens[0][0]).strip() for cell in cells if cell.embedding_lens]
    panel = unescape(re.sub(r"<[^>]*>", "", dom.partition('id="cell"')[2]))
    assert "row 1, column 1" in panel
    assert "position 6" in panel
    for near in cells[4].neighbors:
        context = result.found[NAMES[1]].index.row(near.row).window(160).clipped(160)
        assert context.before + context.token + context.after in panel


@pytest.mark.skipif(find_spec("PIL") is None, reason="no Pillow")
def test_png_shows_the_picture_its_grid_and_color_by_similarity(results: list[tll.LensResult], tmp_path: Path) -> None:
    from PIL import Image

    calibrated, result = results
    assert tll.image_to_png(calibrated, GRID, np.zeros((20, 30)), tmp_path / "calibrated.png").stat().st_size > 500
    with pytest.raises(tll.InvalidInputError, match=r"got a\.jpg; expected a name that ends in \.png"):
        tll.image_to_png(calibrated, GRID, np.zeros((20, 30)), tmp_path / "a.jpg")
    white = np.full((40, 60, 3), 255, np.uint8)
    drawn = np.asarray(Image.open(tll.image_to_png(result, GRID, white, tmp_path / "image.png", hook_name=NAMES[0])))
    zoom = 76 / 20
    width, height = round(60 * zoom), round(40 * zoom)
    assert drawn.shape[1] >= width
    assert drawn.shape[0] > height  # a caption below
    middles = [drawn[round(zoom * 20 * row) + 8, round(zoom * 20 * column) + 30] for row in range(2) for column in range(3)]
    nearness = result.found[NAMES[0]].similarities[np.isin(result.positions[:, 1], GRID.positions), 0].numpy()
    redness = 255 - np.array(middles)[:, 0].astype(float)  # the hue is blue: the less red, the nearer
    assert np.corrcoef(nearness, redness)[0, 1] > 0.99
    words = drawn[:height, :width].reshape(2, height // 2, 3, width // 3, 3).min((1, 3, 4))
    assert (words < 120).all(), "dark letters in each patch"
    for lens in ("logit_lens", "embedding_lens"):
        assert tll.image_to_png(result, GRID, white, tmp_path / f"{lens}.png", lens=lens).stat().st_size > 500
    Image.fromarray(white).save(tmp_path / "white.png")
    for given in (tmp_path / "white.png", Image.fromarray(white)):
        path = tll.image_to_png(result, GRID, given, tmp_path / "again.png", hook_name=NAMES[0])
        assert np.array_equal(np.asarray(Image.open(path)), drawn)
    with pytest.raises(tll.UnknownHookError, match="was not decoded"):
        tll.image_to_png(result, GRID, white, tmp_path / "x.png", hook_name="blocks.0.hook_resid_post")
    with pytest.raises(tll.InvalidInputError, match="got lens='tuned'"):
        tll.image_to_png(result, GRID, white, tmp_path / "x.png", lens="tuned")
    with pytest.raises(tll.InvalidInputError, match="got level=1"):
        tll.image_to_png(result, GRID, white, tmp_path / "x.png", level=1)


def test_pictures_come_in_many_forms(picture: np.ndarray) -> None:
    share = torch.from_numpy(picture).permute(2, 0, 1) / 255
    assert np.array_equal(pixels(share), picture)
    assert np.array_equal(pixels(share.permute(1, 2, 0).numpy()), picture)
    assert np.array_equal(pixels(picture[..., 0]), np.repeat(picture[..., :1], 3, -1))
    with pytest.raises(tll.InvalidInputError, match=r"from -2 to .*normalised pixel_values"):
        pixels(3 * share - 2 - share.min() * 3)
    with pytest.raises(tll.InvalidInputError, match=r"shape \(1, 40, 60, 3\)"):
        pixels(picture[None])


def test_a_picture_of_other_proportions_needs_a_word(result: tll.LensResult, picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "image.html"
    with pytest.raises(
        tll.InvalidInputError, match=r"40 × 40 .* 30 × 20 .*grid\.on\(40, 40\); .*grid\.on\(40, 40, center_crop"
    ):
        tll.image_to_html(result, GRID, picture[:, :40], path)
    tll.image_to_html(result, GRID.on(40, 40), picture[:, :40], path)
    assert page_data(path)["image"]["boxes"][0] == pytest.approx([0, 0, 33.3333, 50], abs=1e-3)
    tll.image_to_html(result, GRID.on(40, 40, center_crop=True), picture[:, :40], path)
    assert page_data(path)["image"]["pixels"][0] == pytest.approx([0, 6.7, 13.3, 20], abs=0.1)
    with pytest.raises(tll.InvalidInputError, match=r"no visual token of this image was decoded, positions 900 to 905"):
        tll.image_to_html(result, tll.PatchGrid.regular(2, 3, range(900, 906)), picture, path)
    with pytest.raises(tll.InvalidInputError, match="there is no folder"):
        tll.image_to_html(result, GRID, picture, tmp_path / "none" / "image.html")
    large = np.kron(picture, np.ones((60, 60, 1), np.uint8))
    tll.image_to_html(result, GRID, large, path)
    assert decoded(page_data(path)["image"]["picture"]).shape == (800, 1200, 3)
