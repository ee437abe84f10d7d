"""The page of a lens result holds every reading, asks for nothing, and runs nothing of a text."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from support.pages import dumped_dom, lens_cells, page_data

import tl_latentlens as tll
from tl_latentlens.views.jumps import is_jump
from tl_latentlens.views.known import format_share
from tl_latentlens.views.text import also_at, short_hook_name, visible


def test_page_holds_every_reading(calibrated: tll.LensResult, tmp_path: Path) -> None:
    result, path, index = calibrated, tmp_path / "page.html", next(iter(calibrated.found.values())).index
    assert result.to_html(str(path)) == path
    data = page_data(path)
    assert data["headings"] == [name.split(".")[1] for name in result.hook_names]
    for batch, text in enumerate(data["texts"]):
        for i, line in enumerate(lens_cells(result, batch)):
            for j, cell in enumerate(line):
                found = np.array(text["latentlens"][i][j]).reshape(-1, 3)
                assert text["known"][i][j] == pytest.approx(cell.known, abs=1e-4)
                use = None if text["use"] is None else text["use"][i][j]
                assert use == (None if cell.use_chance is None else pytest.approx(cell.use_chance, abs=1e-4))
                assert [data["strings"][k] for k in text["words"][i][j]] == [near.word for near in cell.words]
                assert [data["strings"][k] for k in text["around"][i][j]] == cell.around
                assert [data["strings"][k] for k in text["also"][i][j]] == [also_at(near.hook_names) for near in cell.neighbors]
                cosines = np.array([near.similarity for near in cell.neighbors])
                assert text["jumps"][i][j] == np.flatnonzero(is_jump(cosines)).tolist()
                for (context, hook, cosine), near in zip(found, cell.neighbors, strict=True):
                    shown = index.row(near.row).window(160).clipped(160)
                    assert data["contexts"][int(context)][:3] == [shown.before, shown.token, shown.after]
                    assert data["hooks"][int(hook)] == short_hook_name(near.hook_name)
                    assert cosine == pytest.approx(near.similarity, abs=1e-4)
                for lens in ("logit_lens", "embedding_lens"):
                    read = np.array(text[lens][i][j]).reshape(-1, 2)
                    assert [data["strings"][int(k)] for k in read[:, 0]] == [visible(t) for t, _ in getattr(cell, lens)]
                    assert read[:, 1] == pytest.approx([score for _, score in getattr(cell, lens)], abs=1e-4)
    assert not re.search(r"https?:|src=|@import|url\(", path.read_text()), "nothing is asked of a network"


def test_the_page_shows_what_the_bank_does_not_know(calibrated: tll.LensResult, browser: str, tmp_path: Path) -> None:
    path = calibrated.to_html(tmp_path / "page.html")
    dom = dumped_dom(browser, path, tmp_path / "profile")
    faint = ["faint" in cell for cell in re.findall(r"<td([^>]*)>", dom)]
    assert re.findall(r"<button[^>]*data-key[^>]*>([^<]*)", dom) == [
        "other words",
        "uses",
        "around",
        "logit lens",
        "embedding lens",
    ]
    known = [[cell.known for cell in line] for line in lens_cells(calibrated)]
    assert faint == [share <= 0.05 for line in reversed(known) for share in line]
    assert 0 < sum(faint) < len(faint)
    panel = re.sub(r"<[^>]*>", "", dom.partition('id="cell"')[2])
    cells = re.findall(r"<td([^>]*)>", dom)
    chosen = known[-1][next(i for i, cell in enumerate(cells) if 'aria-selected="true"' in cell)]
    assert f"known {format_share(chosen)}" in unescape(panel)
    assert ("the bank does not know this token" in panel) == (chosen <= 0.05)


SWITCHED = """
const seen = [...document.querySelectorAll("#lenses button")].map(button => {
  button.click();
  return [...document.querySelectorAll("td")].map(cell => cell.textContent);
});
document.body.dataset.seen = JSON.stringify(seen);
"""


def test_the_switch_shows_every_lens(calibrated: tll.LensResult, browser: str, tmp_path: Path) -> None:
    path = calibrated.to_html(tmp_path / "page.html")
    path.write_text(path.read_text().replace("</body>", f"<script>{SWITCHED}</script></body>"))
    dom = dumped_dom(browser, path, tmp_path / "profile")
    seen = json.loads(unescape(re.findall(r'data-seen="([^"]*)"', dom)[0]))
    cells = [cell for line in reversed(lens_cells(calibrated)) for cell in line]
    words, uses, around, logits, embeddings = seen
    assert words == [cell.words[0].word if cell.words else "·" for cell in cells]
    assert around == [cell.around[0] if cell.around else "·" for cell in cells]
    assert all(cell.neighbors[0].token.strip() in use for use, cell in zip(uses, cells, strict=True))
    assert logits == [visible(cell.logit_lens[0][0]) for cell in cells]
    assert embeddings == [visible(cell.embedding_lens[0][0]) for cell in cells]
    assert "·" in words
    assert not any(word == visible(cell.token).strip().lower() for word, cell in zip(words, cells, strict=True))


def test_the_panel_reads_from_top_to_bottom(calibrated: tll.LensResult, browser: str, tmp_path: Path) -> None:
    path = calibrated.to_html(tmp_path / "page.html")
    n_columns = sum(batch == 0 for batch, _ in calibrated.positions.tolist())
    path.write_text(path.read_text().replace("</body>", "<script>document.querySelectorAll('td')[3].click()</script></body>"))
    dom = dumped_dom(browser, path, tmp_path / "profile")
    cell = lens_cells(calibrated)[-1][3]
    assert n_columns > 3
    panel = re.sub(r"<[^>]*>", "", dom.partition('id="cell"')[2]).replace("&nbsp;", " ")
    parts = ["money»", f"known {format_share(cell.known)}", "other words: ", cell.words[0].word, *(
        f"{near.similarity:.3f}" for near in cell.neighbors[:1]
    ), "logit lens: ", "embedding lens: "]  # fmt: skip
    places = [unescape(panel).index(part) for part in parts]
    assert places == sorted(places)


def test_the_page_works_in_a_browser(hostile: tll.LensResult, browser: str, tmp_path: Path) -> None:
    """Nothing of a text runs; cells, lens switch and clicks do."""
    path = hostile.to_html(tmp_path / "page.html")
    clicks = "document.querySelector('[data-key=logit_lens]').click(); document.querySelectorAll('td')[2].click()"
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
