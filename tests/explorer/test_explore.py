"""The explore page shows what the API gives, to callbacks and to a browser that clicks through it; no request leaves."""

import base64
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import torch

import tl_latentlens as tll

pytest.importorskip("dash")
from support.pages import BROWSER_ARGUMENTS, found, texts_of
from werkzeug.serving import make_server

from tl_latentlens import cli
from tl_latentlens.explorer import app as app_module
from tl_latentlens.explorer.app import Page, make_app
from tl_latentlens.explorer.feature_labels import FeatureLabels, ShownLabel
from tl_latentlens.explorer.parts import feature_chips
from tl_latentlens.explorer.reader import Reader
from tl_latentlens.views.jumps import is_jump
from tl_latentlens.views.known import format_share
from tl_latentlens.views.label_kinds import unbroken
from tl_latentlens.views.text import also_at, visible

TEXT = "She put the <script>alert(1)</script> & money in the bank"
HOOK = "blocks.3.hook_resid_post"
LEVEL = 0.2  # The bank is too small for figures of 0.05.

pytestmark = pytest.mark.usefixtures("few_random_directions")


@pytest.fixture(autouse=True)
def known_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_latentlens.views.known.KNOWN_LEVEL", LEVEL)


@pytest.fixture(scope="module")
def page(demo_model: Any, index: tll.ContextualIndex) -> Page:
    return Page(Reader(demo_model, index, tll.load_sae("demo"), top_k=4))


@pytest.fixture
def layers(index: tll.ContextualIndex) -> list[str]:
    return list(index.hook_names)


def read(model: Any, index: tll.ContextualIndex, text: str, **settings: Any) -> tll.LensResult:
    hooks = tll.latentlens_hooks(index, top_k=4, embedding_lens=True, **settings)
    model.run_with_hooks(text, fwd_hooks=hooks)
    return hooks.result


@pytest.mark.parametrize("transform", ["raw", "center", "csls"])
def test_a_cell_shows_what_the_api_finds(
    page: Page, demo_model: Any, bank: tll.Bank, layers: list[str], transform: str
) -> None:
    expected = read(demo_model, tll.ContextualIndex(bank, device="cpu", transform=transform), TEXT, calibrate=True)
    reading, cell, prompt, message = page.open_prompt(1, TEXT, transform, layers)
    assert (reading, prompt, message) == ({"prompt": TEXT}, TEXT, "")
    assert cell["pos"] == expected.positions[-1, 1]
    for hook_name, pos in ((HOOK, 3), (layers[-1], cell["pos"]), (layers[0], 1)):
        want = expected.cell(hook_name, pos)
        shown = page.panel({"hook": hook_name, "pos": pos}, reading, "LatentLens", transform)
        contexts = [texts_of(one.children[:3]) for one in found(shown, "context")]
        assert contexts == [n.context.replace("«", "").replace("»", "") for n in want.neighbors]
        assert [one.children[1].children for one in found(shown, "context")] == [n.token.strip() for n in want.neighbors]
        assert [one.children for one in found(shown, "score")] == [f"{n.similarity:.2f}" for n in want.neighbors]
        assert TEXT in texts_of(found(shown, "text"))
        assert want.known is not None
        assert f"known {format_share(want.known)}" in texts_of(shown)
        faint = [line.className for one in found(shown, "neighbors") for line in one.children]
        jumps = is_jump(np.array([near.similarity for near in want.neighbors]))
        marked = [["jump"] if is_last else [] for is_last in jumps]
        assert [names.split() for names in faint] == [["faint"] * (want.known <= LEVEL) + mark for mark in marked]
        notes = [texts_of(one) for one in found(shown, "where")]
        assert all(also_at(near.hook_names) in note for near, note in zip(want.neighbors, notes, strict=True))
        headings = [texts_of(part) for part in shown if type(part).__name__ == "H3"]
        around = ["words around"] * bool(want.around)
        assert headings[: 4 + len(around)] == ["other words", *around, "nearest uses", "logit lens", "embedding lens"]
        words, *_, logits, embeddings = (texts_of(one) for one in found(shown, "chips")[: 3 + len(around)])
        assert words == ("".join(near.word for near in want.words or []) or "none")
        assert all(token.strip() in logits for token, _ in want.logit_lens or [])
        assert all(f"{score:.2f}" in embeddings for _, score in want.embedding_lens or [])


@pytest.mark.parametrize("lens", ["other words", "LatentLens", "words around", "logit lens", "embedding lens"])
def test_the_grid_holds_the_first_reading_of_each_cell(
    page: Page, demo_model: Any, index: tll.ContextualIndex, layers: list[str], lens: str
) -> None:
    expected = read(demo_model, index, TEXT, calibrate=True)
    _, grid, ends, _ = page.show({"prompt": TEXT}, lens, "raw", layers[1:4])
    assert [row["hook"] for row in grid["rows"]] == layers[1:4][::-1]
    assert [column["pos"] for column in grid["columns"]] == expected.positions[:, 1].tolist()
    assert ends == []
    json.dumps(grid)
    for row in grid["rows"]:
        for column, shown in zip(grid["columns"], row["cells"], strict=True):
            cell = expected.cell(row["hook"], column["pos"])
            words = [near.word for near in cell.words or []]
            best = {
                "other words": ((words or ["·"])[0], cell.known),
                "LatentLens": (cell.neighbors[0].token, cell.known),
                "words around": ((cell.around or ["·"])[0], cell.known),
                "logit lens": (cell.logit_lens or [])[0],
                "embedding lens": (cell.embedding_lens or [])[0],
            }
            token, score = best[lens]
            assert shown[1].strip() == visible(token).strip()
            assert shown[3] == pytest.approx(score, abs=1e-4)
            is_of_vocabulary = lens in ("logit lens", "embedding lens")
            assert shown[4] == (not is_of_vocabulary and (cell.known <= LEVEL or token == "·"))


def test_a_click_does_not_run_the_model(page: Page, layers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, _, _, _ = page.open_prompt(1, "The river ran over the bridge.", "raw", layers)
    monkeypatch.setattr(page.reader, "_read_prompt", None)
    monkeypatch.setattr(type(page.reader.model), "run_with_hooks", None)
    for lens in ("LatentLens", "logit lens"):
        assert page.show(reading, lens, "raw", layers)[1]["rows"]
        assert page.panel({"hook": layers[0], "pos": 2}, reading, lens, "raw")


def test_features_and_vectors_are_read_as_directions(page: Page, bank: tll.Bank, layers: list[str], tmp_path: Path) -> None:
    sae = tll.load_sae("demo")
    centered = tll.ContextualIndex(bank, device="cpu", transform="center")
    vector = torch.randn(256, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "probe.npy", vector.numpy())
    content = base64.b64encode((tmp_path / "probe.npy").read_bytes()).decode()
    uploaded = page.open_upload(f"data:application/octet-stream;base64,{content}", "probe.npy", "center", layers)
    named = page.open_direction(1, str(tmp_path / "probe.npy"), "center", layers)
    assert uploaded[0] == named[0]
    assert uploaded[-1] is None
    for reading, direction in ((page.open_direction(1, "7", "center", layers)[0], sae.W_dec[7]), (named[0], vector)):
        for chosen in (layers, layers[2:4]):
            expected = tll.decode_directions(direction, centered, top_k=4, hook_name=chosen).neighbors(0)
            title, grid, ends, message = page.show(reading, "logit lens", "center", chosen)
            assert grid is None
            assert message == ""
            assert "length" in texts_of(title)
            for side, want in zip(ends, expected, strict=True):
                assert [one.children for one in found(side, "score")] == [f"{n.similarity:.2f}" for n in want]
                assert [one.children[1].children for one in found(side, "context")] == [n.token.strip() for n in want]


def test_features_active_on_a_token_are_those_of_the_encoder(page: Page, demo_model: Any, layers: list[str]) -> None:
    sae = tll.load_sae("demo")
    text = "He rowed the boat to the bank"
    _, cache = demo_model.run_with_cache(text)
    acts = sae.encode(cache[sae.hook_name][0, 5])
    reading = page.open_prompt(1, text, "raw", layers)[0]
    active = page.reader.active_features(page.reader.prompt(text, "raw"), 5)
    best = acts.topk(8)
    assert [i for i, _ in active] == [i for i, value in zip(best.indices.tolist(), best.values, strict=True) if value > 0]
    shown = texts_of(page.panel({"hook": HOOK, "pos": 5}, reading, "LatentLens", "raw"))
    index = page.reader.index("center")
    table = tll.label_features(sae, index, hook_name=str(sae.hook_name), progress=False).table.set_index("feature")
    assert any(table["label"])
    for feature, value in active:
        label = table["label"][feature]
        assert f"feature {feature} {f'{unbroken(label)} ' if label else ''}{value:.2f}" in shown


def test_named_features_are_strong_and_mixed_ones_faint() -> None:
    labels = {1: ShownLabel("team 59 %", True), 2: ShownLabel("mixed: a 9 % · b 8 %", False)}
    [_, chips] = feature_chips([(1, 0.5), (2, 0.25), (3, 0.125)], HOOK, lambda feature: labels.get(feature, ShownLabel()))
    named, mixed, none = chips.children
    assert [type(part).__name__ for part in named.children[1:]] == ["B", "Small"]
    assert texts_of(found(mixed, "faint")) == "mixed: a 9\xa0% · b 8\xa0% "
    assert not found([named, none], "faint")
    assert [texts_of(chip) for chip in chips.children][::2] == ["feature 1 team 59\xa0% 0.50", "feature 3 0.12"]


def test_features_that_cannot_be_labelled_have_no_label(bank: tll.Bank) -> None:
    def index() -> tll.ContextualIndex:
        return tll.ContextualIndex(bank, device="cpu", transform="center")

    assert FeatureLabels(None, None, index).of(3) == ShownLabel()
    assert FeatureLabels(tll.load_sae("demo"), "blocks.9.hook_resid_post", index).of(3) == ShownLabel()
    assert FeatureLabels(torch.zeros(4, 256), HOOK, index).of(3) == ShownLabel()


def test_history_goes_back_to_reading_and_cell(page: Page, layers: list[str]) -> None:
    first, second = {"prompt": "one <b>"}, {"feature": 3}
    history = page.remember(first, {"hook": HOOK, "pos": 1}, None)
    history = page.remember(first, {"hook": HOOK, "pos": 2}, history)
    history = page.remember(second, None, history)
    assert [texts_of(link) for link in app_module.past_links(history)] == ["feature 3", "one <b>"]
    assert page.open_link("past", 0, history, "raw", layers) == (first, {"hook": HOOK, "pos": 2}, "one <b>", "")
    of_another_bank = [{"reading": first, "cell": {"hook": "blocks.40.hook_resid_post", "pos": 2}}]
    assert page.open_link("past", 0, of_another_bank, "raw", layers)[:2] == (first, None)
    assert page.open_link("feature", 9, history, "raw", layers)[0] == {"feature": 9}
    row = page.reader.index("raw").row(5)
    assert page.open_link("text", 5, history, "raw", layers)[0] == {"prompt": row.prompt_text}


def test_exports_hold_the_view(page: Page, demo_model: Any, index: tll.ContextualIndex, layers: list[str]) -> None:
    reading = page.open_prompt(1, TEXT, "raw", layers)[0]
    expected = read(demo_model, index, TEXT).to_dataframe()
    expected = expected[expected["hook_name"].isin(layers[:2])].reset_index(drop=True)
    csv = page.export("csv", reading, "raw", layers[:2])
    assert csv["filename"] == "latentlens.csv"
    shown = pd.read_csv(io.StringIO(csv["content"]), keep_default_na=False)
    assert shown["context"].tolist() == expected["context"].tolist()
    assert shown["similarity"].to_numpy() == pytest.approx(expected["similarity"].to_numpy())
    lines = json.loads(page.export("json", reading, "raw", layers[:2])["content"])
    assert [line["neighbor"] for line in lines] == expected["neighbor"].tolist()
    page_html = page.export("html", reading, "raw", layers)
    assert page_html["filename"] == "latentlens.html"
    assert "<script>alert" not in page_html["content"]
    with pytest.raises(tll.InvalidInputError, match="HTML is for prompts"):
        page.export("html", {"feature": 3}, "raw", layers)
    assert {line["sign"] for line in json.loads(page.export("json", {"feature": 3}, "raw", layers)["content"])} == {1, -1}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("4096", r"features 0 to 1,535"),
        ("-1", r"got feature '-1'"),
        ("x", r"got feature 'x'"),
        ("", r"nothing to decode"),
        ("nowhere.npy", r"no vector at nowhere.npy"),
        ("wide.npy", r"wide.npy has width 300; the bank has width 256"),
        ("nan.npy", r"nan.npy holds NaN or inf"),
        ("zero.npy", r"zero.npy is zero"),
    ],
)
def test_what_cannot_be_decoded_is_said_in_one_line(
    page: Page, layers: list[str], given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.ones(300, np.float32))
    np.save("nan.npy", np.full(256, np.nan, np.float32))
    np.save("zero.npy", np.zeros(256, np.float32))
    with pytest.raises(tll.InvalidInputError, match=said) as error:
        page.open_direction(1, given, "raw", layers)
    assert "\n" not in str(error.value)
    if Path(given).is_file():
        content = base64.b64encode(Path(given).read_bytes()).decode()
        message = page.open_upload(f"data:;base64,{content}", given, "raw", layers)[3]
        assert message == str(error.value)


def test_what_cannot_be_read_is_said_in_one_line(page: Page, layers: list[str]) -> None:
    n_ctx = page.reader.model.cfg.n_ctx
    for text, said in (("  ", "the prompt is empty"), (None, "empty"), ("bank" * (n_ctx + 1), f"the model reads {n_ctx:,}")):
        with pytest.raises(tll.InvalidInputError, match=said):
            page.open_prompt(1, text, "raw", layers)
    broken = page.open_upload("data:;base64,AAA", "probe.npy", "raw", layers)
    assert "did not arrive whole" in broken[3]
    unreadable = page.open_upload("data:;base64,AAAA", "probe.npy", "raw", layers)
    assert unreadable[3].startswith("probe.npy cannot be read")
    with pytest.raises(tll.InvalidInputError, match="gone is not kept"):
        page.show({"vector": "gone"}, "LatentLens", "raw", layers)
    with pytest.raises(tll.InvalidInputError, match="cannot be named from another machine"):
        Page(page.reader, files=False).open_direction(1, "/etc/passwd.npy", "raw", layers)
    with pytest.raises(tll.InvalidInputError, match="no SAE was loaded"):
        Page(Reader(page.reader.model, page.reader.index("raw"))).open_direction(1, "3", "raw", layers)


def test_a_bank_of_repeated_texts_is_read_in_the_second_copy(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    bank = tll.build_bank(any_model, texts, tmp_path / "twice.h5", repeat=True, progress=False)
    reader = Reader(any_model, tll.ContextualIndex(bank, device="cpu"), tll.load_sae("demo"), top_k=2)
    page = Page(reader)
    reading, cell, _, _ = page.open_prompt(1, texts[4], "raw", list(bank.hook_names))
    shown = page.panel(cell, reading, "LatentLens", "raw")
    assert texts_of(found(shown, "text")).strip() == texts[4]
    assert found(shown, "score")[0].children == "1.00"


def test_only_this_machine_is_answered(any_model: Any, index: tll.ContextualIndex) -> None:
    client = make_app(any_model, index).server.test_client()
    answer = client.get("/", headers={"Host": "127.0.0.1:8050"})
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert re.findall(r"(?:src|href)=.(?:https?:)?//", answer.text) == []
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
    from_elsewhere = {"Host": "127.0.0.1:8050", "Sec-Fetch-Site": "cross-site"}
    assert client.post("/_dash-update-component", json={}, headers=from_elsewhere).status_code == 403
    open_to_others = make_app(any_model, index, loopback=False).server.test_client()
    assert open_to_others.get("/", headers={"Host": "cluster.example"}).status_code == 200


def test_without_dash_the_extra_is_named() -> None:
    code = "import sys; sys.modules['dash'] = None\nfrom tl_latentlens.explorer import make_app; make_app(None, None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'MissingExtraError: the explore page needs dash: pip install "tl-latentlens[explore]"' in done.stderr


def test_the_command_serves_the_page(
    bank: tll.Bank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(app_module, "serve", lambda *arguments: asked.extend(arguments))
    monkeypatch.setattr(
        sys, "argv", ["tl-latentlens", "explore", str(bank.path), "--sae", "demo", "--port", "8123", "-n", HOOK]
    )
    monkeypatch.setattr(cli.console, "width", 160)
    with pytest.raises(SystemExit):
        cli.main()
    app, *where, ready = asked
    assert where == ["127.0.0.1", 8123]
    assert "http" not in capsys.readouterr().out  # before the port is held
    ready()
    assert "http://127.0.0.1:8123 " in capsys.readouterr().out
    shown = app.server.test_client().get("/_dash-layout", headers={"Host": "127.0.0.1:8123"}).get_data(as_text=True)
    assert HOOK in shown
    assert "blocks.4.hook_resid_post" not in shown


@pytest.fixture
def served(any_model: Any, index: tll.ContextualIndex) -> Iterator[str]:
    app = make_app(any_model, index, tll.load_sae("demo"), top_k=4)
    server = make_server("127.0.0.1", 0, app.server, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_a_browser_clicks_through(
    served: str, browser: str, any_model: Any, index: tll.ContextualIndex, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    expected = read(any_model, index, TEXT)
    said: list[str] = []
    asked: set[str | None] = set()
    np.save(tmp_path / "probe.npy", np.arange(256, dtype=np.float32))
    np.save(tmp_path / "wide.npy", np.ones(300, np.float32))
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        tab = chromium.new_page()
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.add(urlsplit(request.url).hostname))

        def contexts(count: int) -> list[str]:
            playwright.expect(tab.locator(".neighbors li")).to_have_count(count)
            return [one.replace("\n", " ") for one in tab.locator(".context").all_inner_texts()]

        tab.goto(served)
        tab.fill("#prompt", TEXT)
        tab.press("#prompt", "Enter")
        pos = int(expected.positions[-1, 1])
        playwright.expect(tab.locator(".panel h2")).to_be_visible()
        playwright.expect(tab.locator(f'#grid td[data-pos="{pos}"].chosen')).to_be_in_viewport()
        tokens = tab.locator("#grid thead th").all_inner_texts()[1:]
        assert [token.strip() for token in tokens] == [visible(t).strip() for t in (expected.tokens or [[]])[0][1:]]
        tab.click(f'#grid td[data-hook="{HOOK}"][data-pos="3"]')
        playwright.expect(tab.locator(".panel h2")).to_have_text("the at layer 3")
        want = [n.context.replace("«", "").replace("»", "") for n in expected.cell(HOOK, 3).neighbors]
        assert all(shown.startswith(one) for shown, one in zip(contexts(4), want, strict=True))
        assert tab.locator(".panel .text").inner_text() == TEXT

        tab.keyboard.press("Tab")
        tab.focus("#grid table")
        tab.keyboard.press("ArrowRight")
        tab.wait_for_selector(f'#grid td[data-hook="{HOOK}"][data-pos="4"].chosen')
        for switch, expected_word in (("uses", expected.cell(HOOK, 4).neighbors[0].token), ("other words", None)):
            tab.click(f"#lens label:has-text('{switch}')")
            word = expected_word or next((near.word for near in expected.cell(HOOK, 4).words or []), "·")
            cell = tab.locator(f'#grid td[data-hook="{HOOK}"][data-pos="4"]')
            playwright.expect(cell).to_contain_text(word.strip())
        tab.click("#lens label:has-text('logit lens')")
        (best, probability), *_ = expected.cell(HOOK, 4).logit_lens or []
        cell = tab.locator(f'#grid td[data-hook="{HOOK}"][data-pos="4"]')
        playwright.expect(cell).to_have_attribute("title", f"{visible(best)}  {probability:.3f}")
        tab.click("#layers label >> nth=0")
        playwright.expect(tab.locator("#grid tbody tr")).to_have_count(len(index.hook_names) - 1)

        tab.locator(".panel button", has_text="feature").first.click()
        playwright.expect(tab.locator(".title")).to_contain_text("feature")
        feature = int(tab.locator(".title").inner_text().split()[1])
        towards = tll.decode_directions(
            tll.load_sae("demo").W_dec[feature], index, top_k=4, hook_name=index.hook_names[1:]
        ).neighbors(0)
        want = [n.context.replace("«", "").replace("»", "") for side in towards for n in side]
        assert all(shown.startswith(one) for shown, one in zip(contexts(8), want, strict=True))
        tab.set_input_files("#upload input", str(tmp_path / "probe.npy"))
        playwright.expect(tab.locator(".title")).to_contain_text("probe.npy")
        tab.set_input_files("#upload input", str(tmp_path / "wide.npy"))
        playwright.expect(tab.locator("#message")).to_contain_text("has width 300")
        tab.fill("#direction", "99999")
        tab.click("#decode")
        playwright.expect(tab.locator("#message")).to_have_text("got feature '99999'; the SAE has features 0 to 1,535")
        tab.locator("#past button", has_text="She put").click()
        tab.wait_for_selector(f'#grid td[data-hook="{HOOK}"][data-pos="4"].chosen')
        playwright.expect(tab.locator("#message")).to_be_empty()
        with tab.expect_download() as download:
            tab.click("#save-csv")
        assert set(pd.read_csv(download.value.path())["hook_name"]) == set(index.hook_names[1:])
        tab.reload()
        tab.locator("#past button", has_text="She put").click()
        tab.wait_for_selector(f'#grid td[data-hook="{HOOK}"][data-pos="4"].chosen')
        assert tab.locator("#past button").count() == 3
        chromium.close()
    assert said == []
    assert asked <= {"127.0.0.1", None}
