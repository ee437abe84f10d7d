"""Images in the explore page: patches hold what the API reads, whatever is given is answered in one line, words stay text."""

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import torch
from support.models import TEXTS, available_kinds
from support.pages import BROWSER_ARGUMENTS, found, texts_of
from support.vlms import IMAGE, MODELS, Vlm

import tl_latentlens as tll

pytest.importorskip("dash")
pytest.importorskip("PIL")
from PIL import Image
from werkzeug.serving import make_server

from tl_latentlens.explorer import upload_source
from tl_latentlens.explorer.app import image_source_for, make_app
from tl_latentlens.explorer.layout import past_links
from tl_latentlens.explorer.page import Page
from tl_latentlens.explorer.reader import Reader
from tl_latentlens.explorer.scene_source import SceneSource
from tl_latentlens.explorer.upload_source import UploadSource
from tl_latentlens.views.text import visible
from tl_latentlens.vision.picture_files import read_picture
from tl_latentlens.vision.scenes import draw_scenes

HOSTILE = "The bank <script>document.title = 'ran'</script><img src=x onerror=alert(1)> of the river"
SCENE_LAYERS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
LAYERS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
needs_bridge = pytest.mark.skipif("bridge" not in available_kinds(), reason="no TransformerBridge")


class Processor:
    """What transformers' processors do, for the tiny LLaVA: one placeholder becomes one id a patch, the middle is cut out."""

    image_token = IMAGE
    chat_template: str | None = None

    def __init__(self, vlm: Vlm) -> None:
        self.vlm = vlm
        self.tokenizer = vlm.bridge.tokenizer
        self.image_processor = SimpleNamespace(do_center_crop=True)
        self.asked: list[str] = []

    def __call__(self, images: Any, text: str, return_tensors: str, add_special_tokens: bool = True) -> dict[str, Any]:
        self.asked.append(text)
        assert return_tensors == "pt"
        side = min(images.size)
        left, top = ((size - side) // 2 for size in images.size)
        seen = images.crop((left, top, left + side, top + side)).resize((self.vlm.width, self.vlm.height))
        pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None].double() / 255
        text = text.replace(IMAGE, IMAGE * self.vlm.n_tokens)
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])
        if add_special_tokens:
            ids = torch.cat([torch.tensor([[self.tokenizer.bos_token_id]]), ids], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "unused": "a string"}

    def apply_chat_template(self, conversation: Any, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        [turn] = conversation
        return (
            "<s>USER: "
            + "".join(IMAGE if part["type"] == "image" else part["text"] for part in turn["content"])
            + " ASSISTANT:"
        )


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    torch.manual_seed(0)
    return MODELS["llava"]()


@pytest.fixture(scope="module")
def text_index(vlm: Vlm, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    path = tmp_path_factory.mktemp("vlm") / "text.h5"
    bank = tll.build_bank(vlm.bridge, [HOSTILE, *TEXTS], path, hook_names=LAYERS, progress=False)
    return tll.ContextualIndex(bank, device="cpu")


@pytest.fixture
def page(vlm: Vlm, text_index: tll.ContextualIndex) -> Page:
    return page_of(vlm.bridge, text_index, Processor(vlm))


@pytest.fixture(scope="module")
def scene_index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    path = tmp_path_factory.mktemp("scenes") / "text.h5"
    bank = tll.build_bank(any_model, [HOSTILE, *TEXTS], path, hook_names=SCENE_LAYERS, progress=False)
    return tll.ContextualIndex(bank, device="cpu")


def page_of(model: Any, index: tll.ContextualIndex, processor: Any = None) -> Page:
    return Page(Reader(model, index, top_k=3, images=image_source_for(model, processor)))


def picture(width: int = 36, height: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def file_of(array: np.ndarray, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **settings)
    return buffer.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@needs_bridge
def test_patches_show_what_the_api_reads(page: Page, vlm: Vlm, text_index: tll.ContextualIndex) -> None:
    reading, cell, prompt, message = page.open_picture(uri(file_of(picture())), "cat <b>.png", "The old man saw", "raw", LAYERS)
    assert (prompt, message) == (f"{IMAGE}\nThe old man saw", "")
    inputs = Processor(vlm)(Image.fromarray(picture()), prompt, "pt")
    hooks = tll.latentlens_hooks(text_index, top_k=3, positions="image", embedding_lens=True)
    vlm.bridge.run_with_hooks(inputs["input_ids"], pixel_values=inputs["pixel_values"].float(), fwd_hooks=hooks)
    expected = hooks.result
    grid = tll.patch_grids(vlm.bridge, inputs)[0].on(24, 36, center_crop=True)
    nearest = {pos: expected.cell(cell["hook"], pos).neighbors[0].similarity for pos in grid.positions.tolist()}
    assert cell == {"hook": LAYERS[1], "pos": max(nearest, key=nearest.__getitem__)}

    for lens in ("LatentLens", "logit lens", "embedding lens"):
        title, drawn, ends, _ = page.show(reading, lens, "raw", LAYERS)
        json.dumps(drawn)
        assert title == "cat <b>.png: 36 × 24 pixels, 3 × 3 visual tokens"
        assert ends == []
        assert [row["hook"] for row in drawn["rows"]] == LAYERS[::-1]
        assert [column["pos"] for column in drawn["columns"]] == grid.positions.tolist()
        assert drawn["image"]["pixels"] == grid.boxes.round(1).tolist()
        assert np.allclose(drawn["image"]["boxes"], 100 * grid.boxes / [36, 24, 36, 24], atol=1e-3)
        assert drawn["image"]["places"] == [[0, row, column] for row in range(3) for column in range(3)]
        for row in drawn["rows"]:
            for pos, (_, token, _, score, is_faint) in zip(grid.positions.tolist(), row["cells"], strict=True):
                one = expected.cell(row["hook"], pos)
                assert not is_faint, "visual tokens are far from all text"
                near = one.neighbors[0]
                best = {"logit lens": one.logit_lens, "embedding lens": one.embedding_lens}.get(lens)
                want = (near.token, near.similarity) if best is None else best[0]
                assert (token.strip(), score) == (visible(want[0]).strip(), pytest.approx(want[1], abs=1e-4))
    sent = page.picture(reading, "raw")
    assert sent is not None
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(sent["uri"].partition(",")[2]))), picture())

    shown = page.panel({"hook": LAYERS[0], "pos": int(grid.positions[5])}, reading, "LatentLens", "raw")
    assert texts_of(shown[:2]) == f"row 2, column 3 at layer 0 resid_preposition {grid.positions[5]}, pixels 22, 8 to 30, 16"
    want = expected.cell(LAYERS[0], int(grid.positions[5]))
    contexts = [texts_of(one.children[:3]) for one in found(shown, "context")]
    assert contexts == [n.context.replace("«", "").replace("»", "") for n in want.neighbors]
    assert [one.children for one in found(shown, "score")] == [f"{n.similarity:.2f}" for n in want.neighbors]
    assert "known" not in texts_of(shown)
    links = [one for one in found(shown, "link") if one.id["link"] == "text"]
    assert page.open_link("text", links[0].id["to"], [], "raw", LAYERS)[0]["prompt"] in [HOSTILE, *TEXTS]


@needs_bridge
def test_a_click_and_a_lens_run_nothing(page: Page, vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, cell, *_ = page.open_picture(uri(file_of(picture())), "cat.png", None, "raw", LAYERS)
    monkeypatch.setattr(page.reader, "_run_with_hooks", None)
    processor: Any = vars(page.reader)["images"].processor
    assert len(processor.asked) == 1
    assert page.show(reading, "logit lens", "raw", LAYERS[:1])[1]["rows"][0]["hook"] == LAYERS[0]
    assert page.panel(cell, reading, "LatentLens", "raw")
    assert page.picture(reading, "raw")
    assert len(processor.asked) == 1


@needs_bridge
def test_exports_and_history_hold_images(page: Page) -> None:
    reading, cell, *_ = page.open_picture(uri(file_of(picture())), "cat.png", "saw", "raw", LAYERS)
    table = pd.read_csv(io.StringIO(page.export("csv", reading, "raw", LAYERS[:1])["content"]), keep_default_na=False)
    assert set(table["hook_name"]) == {LAYERS[0]}
    assert len(table) == 9 * 3
    assert table[["row", "column"]].drop_duplicates().to_numpy().tolist() == [
        [row, column] for row in range(3) for column in range(3)
    ]
    assert json.loads(page.export("json", reading, "raw", LAYERS)["content"])[0]["level"] == 0
    written = page.export("html", reading, "raw", LAYERS)
    assert written["filename"] == "latentlens.html"
    assert "data:image/png;base64," in written["content"]
    assert "<script>document.title" not in written["content"]
    history = page.remember(reading, cell, None)
    assert texts_of(past_links(history)).startswith("cat.png #")
    assert page.open_link("past", 0, history, "raw", LAYERS) == (reading, cell, reading["text"], "")


@needs_bridge
def test_the_prompt_says_where_the_image_is(page: Page, vlm: Vlm) -> None:
    reading = page.open_picture(uri(file_of(picture())), "cat.png", "", "raw", LAYERS)[0]
    assert reading["text"] == IMAGE
    again = page.read(1, f"She saw {IMAGE} there", "raw", LAYERS, reading)
    assert again[0] == {"image": reading["image"], "text": f"She saw {IMAGE} there"}
    assert page.read(1, "She saw", "raw", LAYERS, reading)[0] == {"prompt": "She saw"}
    for now in (None, {"prompt": "She saw"}):
        with pytest.raises(tll.InvalidInputError, match="has a place for an image: choose one"):
            page.read(1, f"{IMAGE} there", "raw", LAYERS, now)
    with pytest.raises(tll.InvalidInputError, match=r"2 places for an image \(<image>\)"):
        page.read(1, IMAGE * 2, "raw", LAYERS, reading)
    with pytest.raises(tll.InvalidInputError, match="have 135 tokens; the model reads 128"):
        page.read(1, IMAGE + "!" * 125, "raw", LAYERS, reading)


@needs_bridge
def test_a_chat_template_is_used_and_its_bos_not_doubled(page: Page, vlm: Vlm) -> None:
    processor: Any = vars(page.reader)["images"].processor
    processor.chat_template = "some"
    reading, _, prompt, _ = page.open_picture(uri(file_of(picture())), "cat.png", " What? ", "raw", LAYERS)
    assert prompt == f"<s>USER: {IMAGE}What? ASSISTANT:"
    tokens = page.reader.image(reading["image"], reading["text"], "raw").result.tokens
    assert tokens is not None
    assert tokens[0].count("<s>") == 1
    processor.chat_template, processor.image_token = None, None
    with pytest.raises(tll.InvalidInputError, match="the prompt has no place for the image: write the model's placeholder"):
        page.open_picture(uri(file_of(picture())), "cat.png", "She saw", "raw", LAYERS)
    assert (
        page.open_picture(uri(file_of(picture())), "cat.png", f"She saw {IMAGE}", "raw", LAYERS)[0]["text"]
        == f"She saw {IMAGE}"
    )


@needs_bridge
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no image", "cat.png cannot be read as an image; PNG, JPEG"),
        (b"", "cat.png cannot be read as an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cat.png cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cat.png cannot be read as an image"),
        (file_of(picture(200, 200))[:900], "cat.png cannot be read as an image"),
        (file_of(picture(200, 200), "JPEG")[:90], "cat.png cannot be read as an image"),
        (file_of(np.zeros((9000, 9000), bool)), r"cat.png has 9,000 × 9,000 pixels; at most 64 million"),
    ],
    ids=["text", "empty", "svg", "eps", "cut png", "cut jpeg", "huge"],
)
def test_what_is_no_picture_is_said_in_one_line(page: Page, data: bytes, said: str) -> None:
    with pytest.raises(tll.InvalidInputError, match=said) as error:
        page.open_picture(uri(data), "cat.png", "", "raw", LAYERS)
    assert "\n" not in str(error.value)


@needs_bridge
def test_what_cannot_be_shown_is_said_in_one_line(
    page: Page, vlm: Vlm, text_index: tll.ContextualIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = uri(file_of(picture()))
    with pytest.raises(tll.InvalidInputError, match=r"cat.png did not arrive whole"):
        page.open_picture("data:image/png;base64,AAA", "cat.png", "", "raw", LAYERS)
    assert len(set(map(str, page.open_picture(None, "cat.png", "", "raw", LAYERS)))) == 1
    with pytest.raises(tll.InvalidInputError, match=r"cat.png #123 is not kept any more; give the file once more"):
        page.show({"image": "cat.png #123", "text": IMAGE}, "LatentLens", "raw", LAYERS)

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("Invalid image\nand more")

    monkeypatch.setattr(Processor, "__call__", broken)
    with pytest.raises(tll.InvalidInputError, match=r"processor does not take this: ValueError: Invalid image$"):
        page.open_picture(image, "cat.png", "", "raw", LAYERS)
    alone = page_of(vlm.bridge, text_index)
    with pytest.raises(tll.InvalidInputError, match=r"came without its processor.*make_app\(model, banks, processor="):
        alone.open_picture(image, "cat.png", "", "raw", LAYERS)
    assert alone.read(1, f"{IMAGE} The river", "raw", LAYERS, None)[0] == {"prompt": f"{IMAGE} The river"}
    monkeypatch.setattr(vlm.bridge.original_model.config, "_name_or_path", "some/model-that-is-nowhere")
    with pytest.raises(tll.InvalidInputError, match=r"the processor of some/model-that-is-nowhere cannot be loaded \(OSError"):
        alone.open_picture(image, "cat.png", "", "raw", LAYERS)
    monkeypatch.undo()
    monkeypatch.setattr(vlm.bridge, "processor", Processor(vlm))
    assert page_of(vlm.bridge, text_index).open_picture(image, "cat.png", "", "raw", LAYERS)[3] == ""


@needs_bridge
def test_only_the_last_pictures_are_kept(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_source, "MAX_KEPT_IMAGES", 2)
    assert isinstance(page.reader.images, UploadSource)
    kept = page.reader.images.keep
    names = [kept(file_of(picture(24, 24 + i)), "cat.png") for i in (0, 1, 0, 2)]
    assert names[0] == names[2]
    page.reader.image(names[0], IMAGE, "raw")
    with pytest.raises(tll.InvalidInputError, match="is not kept any more"):
        page.reader.image(names[1], IMAGE, "raw")


def test_pictures_come_upright_on_white_and_no_larger_than_needed() -> None:
    array = picture(40, 20)
    tag = Image.Exif()
    tag[0x0112] = 6  # the camera was turned by a quarter
    assert np.array_equal(read_picture(file_of(array, exif=tag), "x.png"), np.rot90(array, -1))
    clear = np.dstack([array, np.full(array.shape[:2], 0, np.uint8)])
    assert (read_picture(file_of(clear), "x.png") == 255).all()
    for kind in ("JPEG", "PNG"):
        assert read_picture(file_of(picture(4000, 1000), kind), "x").shape == (400, 1600, 3)
    assert read_picture(file_of(array[..., 0]), "x.png").shape == array.shape


@pytest.mark.parametrize("kind", available_kinds())
def test_scenes_are_read_by_the_embedded_model(kind: str, scene_index: tll.ContextualIndex) -> None:
    scene_model = tll.load_demo_vlm(kind)
    images = image_source_for(scene_model)
    assert isinstance(images, SceneSource)
    page = Page(Reader(scene_model.model, scene_index, top_k=3, images=images))
    layers = list(scene_index.hook_names)
    reading, cell, prompt, message = page.open_scene(1, "raw", layers)
    assert reading["image"].startswith("scene ")
    assert cell["hook"] == layers[1]
    assert message == ""
    assert not isinstance(prompt, str)  # what was typed stays
    scenes = draw_scenes(1, np.random.default_rng(7))
    mask = torch.tensor([[False, *[True] * 36]])
    hooks = tll.latentlens_hooks(scene_index, top_k=3, positions=mask, model=scene_model.model, embedding_lens=True)
    scene_model.run_with_hooks(scenes, fwd_hooks=hooks)
    seventh = {"image": "scene 7", "text": ""}
    title, drawn, _, _ = page.show(seventh, "LatentLens", "raw", layers)
    assert all(thing in title for thing in scenes.objects(0))
    assert [column["pos"] for column in drawn["columns"]] == list(range(1, 37))
    for row in drawn["rows"]:
        scores = [cell[3] for cell in row["cells"]]
        assert scores == pytest.approx(hooks.result.found[row["hook"]].similarities[:, 0].tolist(), abs=1e-3)
    assert page.picture(seventh, "raw")
    assert (
        page.panel({"hook": layers[0], "pos": 8}, seventh, "embedding lens", "raw")[0].children
        == "row 2, column 2 at layer 0 resid_pre"
    )
    assert "data:image/png" in page.export("html", seventh, "raw", layers)["content"]
    with pytest.raises(tll.InvalidInputError, match=r"got 'cat.png #1'; this page's model sees scenes"):
        page.show({"image": "cat.png #1", "text": ""}, "LatentLens", "raw", layers)
    assert page.read(1, "A red circle", "raw", layers, reading)[0] == {"prompt": "A red circle"}


def layout_of(app: Any) -> str:
    return app.server.test_client().get("/_dash-layout", headers={"Host": "127.0.0.1:8050"}).get_data(as_text=True)


def test_a_text_model_has_nothing_of_images(
    any_model: Any, index: tll.ContextualIndex, scene_index: tll.ContextualIndex
) -> None:
    text = layout_of(make_app(any_model, index))
    assert "Image\\u2026" not in text
    assert "New scene" not in text
    with pytest.raises(tll.InvalidInputError, match="does not say which of its tokens are visual"):
        make_app(any_model, index, processor=object())
    with pytest.raises(tll.InvalidInputError, match=r"cat.png cannot be read: the model of this page reads text alone"):
        Page(Reader(any_model, index)).show({"image": "cat.png", "text": ""}, "LatentLens", "raw", [])
    assert "New scene" in layout_of(make_app(tll.load_demo_vlm(), scene_index))


@needs_bridge
def test_a_vision_model_has_an_upload(vlm: Vlm, text_index: tll.ContextualIndex) -> None:
    assert "Image\\u2026" in layout_of(make_app(vlm.bridge, text_index, processor=Processor(vlm)))


def test_the_command_shows_scenes(scene_index: tll.ContextualIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_latentlens.cli.explore import ImageModelOptions, explore
    from tl_latentlens.explorer import app as served

    apps: list[Any] = []
    monkeypatch.setattr(served, "serve", lambda app, *_: apps.append(app))
    explore(scene_index.banks[0].path, model=ImageModelOptions(model="demo-vlm", device="cpu"))
    assert "New scene" in layout_of(apps[0])


@pytest.fixture
def serving() -> Iterator[Callable[[Any], str]]:
    servers: list[Any] = []

    def serve(app: Any) -> str:
        servers.append(make_server("127.0.0.1", 0, app.server, threaded=True))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


@needs_bridge
def test_a_browser_looks_at_an_image(
    vlm: Vlm, text_index: tll.ContextualIndex, serving: Callable[[Any], str], browser: str, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    (tmp_path / "cat <i>.png").write_bytes(file_of(picture()))
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "note.txt").write_bytes(b"no image")
    said: list[str] = []
    asked: set[str | None] = set()
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        tab = chromium.new_page()
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        playwright.expect.set_options(timeout=60_000)
        expect, message = playwright.expect, tab.locator("#message")
        tab.goto(serving(make_app(vlm.bridge, text_index, processor=Processor(vlm), top_k=3)))
        tab.fill("#prompt", "saw")
        upload = tab.locator("#image input")
        for name, words in (("broken.png", "broken.png cannot be read as an image"), ("note.txt", "note.txt is no image")):
            for _ in range(2):
                upload.set_input_files(str(tmp_path / name))
                expect(message).to_contain_text(words)
        upload.set_input_files(str(tmp_path / "cat <i>.png"))
        expect(tab.locator("#title")).to_have_text("cat <i>.png: 36 × 24 pixels, 3 × 3 visual tokens")
        expect(message).to_be_empty()
        assert tab.input_value("#prompt") == f"{IMAGE}\nsaw"
        expect(tab.locator(".stage img")).to_have_js_property("naturalWidth", 36)
        tab.click(".stage button >> nth=4")
        expect(tab.locator(".panel h2")).to_have_text("row 2, column 2 at layer 1")
        tab.keyboard.press("ArrowRight")
        expect(tab.locator(".panel h2")).to_have_text("row 2, column 3 at layer 1")
        tab.keyboard.press("ArrowUp")
        expect(tab.locator(".panel h2")).to_have_text("row 1, column 3 at layer 1")
        assert tab.evaluate("document.activeElement.dataset.at") == "2"
        tab.focus(".looks input >> nth=0")
        tab.keyboard.press("ArrowLeft")
        expect(tab.locator(".panel h2")).to_have_text("row 1, column 3 at layer 0 resid_pre")
        tab.click("#lens label:has-text('embedding lens')")
        expect(tab.locator(".panel h3").first).to_have_text("nearest words")
        best = tab.locator(".panel h3:has-text('embedding lens') + .chips code").first.inner_text().strip()
        expect(tab.locator(".stage button >> nth=2")).to_have_attribute("title", re.compile(rf"{re.escape(best)}  0\.\d+"))
        tab.click("#layers label >> nth=0")
        expect(tab.locator(".panel h2")).to_have_text("row 1, column 3 at layer 1")
        tab.locator(".panel .where button").first.click()
        expect(tab.locator("#grid table")).to_be_visible()
        tab.locator("#past button", has_text="cat").click()
        expect(tab.locator(".stage button[aria-pressed=true]")).to_have_attribute("data-at", "2")
        assert tab.title() == "tl-latentlens explore"
        chromium.close()
    assert said == []
    assert asked <= {"127.0.0.1", None}
