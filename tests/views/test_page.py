"""The page of a lens result holds every reading, asks for nothing, and runs nothing of a text."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pages import dumped_dom, lens_cells, page_data

import tl_latentlens as tll
from tl_latentlens.views.text import short_hook_name, visible


def test_page_holds_every_reading(any_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    hooks = tll.latentlens_hooks(index, top_k=3, embedding_lens=True, calibrate=True)
    any_model.run_with_hooks(["He rowed the boat to the bank", "A small red ball"], fwd_hooks=hooks)
    result, path = hooks.result, tmp_path / "page.html"
    assert result.to_html(str(path)) == path
    data = page_data(path)
    assert data["headings"] == [name.split(".")[1] for name in result.hook_names]
    for batch, text in enumerate(data["texts"]):
        for i, line in enumerate(lens_cells(result, batch)):
            for j, cell in enumerate(line):
                found = np.array(text["latentlens"][i][j]).reshape(-1, 4)
                for (context, hook, cosine, chance), near in zip(found, cell.neighbors, strict=True):
                    shown = index.row(near.row).window(160).clipped(160)
                    assert data["contexts"][int(context)][:3] == [shown.before, shown.token, shown.after]
                    assert data["hooks"][int(hook)] == short_hook_name(near.hook_name)
                    assert (cosine, chance) == pytest.approx((near.similarity, near.chance), abs=1e-4)
                for lens in ("logit_lens", "embedding_lens"):
                    read = np.array(text[lens][i][j]).reshape(-1, 2)
                    assert [data["strings"][int(k)] for k in read[:, 0]] == [visible(t) for t, _ in getattr(cell, lens)]
                    assert read[:, 1] == pytest.approx([score for _, score in getattr(cell, lens)], abs=1e-4)
    assert not re.search(r"https?:|src=|@import|url\(", path.read_text()), "nothing is asked of a network"


def test_the_page_works_in_a_browser(hostile: tll.LensResult, browser: str, tmp_path: Path) -> None:
    """Nothing of a text runs; cells, lens switch and clicks do."""
    path = hostile.to_html(tmp_path / "page.html")
    clicks = "document.querySelectorAll('nav button')[1].click(); document.querySelectorAll('td')[2].click()"
    path.write_text(path.read_text().replace("</body>", f"<script>{clicks}</script></body>"))
    dom = dumped_dom(browser, path, tmp_path / "profile")
    assert "<title>tl-latentlens</title>" in dom
    assert "<img" not in dom
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", dom)]
    top = hostile.hook_names[-1]
    places = [pos for _, pos in hostile.positions.tolist()]
    assert len(cells) == len(hostile.hook_names) * len(places)
    assert cells[: len(places)] == [visible(hostile.cell(top, pos).logit_lens[0][0]) for pos in places]
    chosen = hostile.cell(top, places[2])
    panel = unescape(re.sub(r"<[^>]*>", "", re.sub(r"&nbsp;", " ", dom.partition('id="cell"')[2])))
    for near in chosen.neighbors:
        context = hostile.found[top].index.row(near.row).window(160).clipped(160)
        assert context.before + context.token + context.after in panel
