"""`decode-image` reads the patches that the API reads, of a folder with a model and of the embedded model's scenes."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS, available_kinds
from support.vlms import IMAGE, save_llava

import tl_latentlens as tll

pytest.importorskip("PIL")
from PIL import Image

from tl_latentlens.vision.decode_image import decode_image
from tl_latentlens.vision.patch_choice import clearest_patches, named_patches
from tl_latentlens.vision.picture_files import read_picture
from tl_latentlens.vision.prompted_images import PromptedImages
from tl_latentlens.vision.scenes import draw_scenes

LAYERS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)
needs_bridge = pytest.mark.skipif("bridge" not in available_kinds(), reason="no TransformerBridge")


@pytest.fixture(autouse=True)
def no_installing(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens installs torchvision by itself where it finds no processor."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llava")
    save_llava(path, TEMPLATE)
    return path


@pytest.fixture(scope="module")
def bank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "text.h5"
    model = tll.load_model(folder, kind="bridge")
    tll.build_bank(model, TEXTS, path, hook_names=LAYERS, progress=False)
    return path


@pytest.fixture(scope="module")
def scene_bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "text.h5"
    tll.build_bank(tll.load_demo_model(), TEXTS, path, hook_names=[1, 4], progress=False)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(pixels()).save(path)
    return path


def pixels(height: int = 48, width: int = 72) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


@needs_bridge
def test_patches_of_a_model_folder_are_what_the_api_reads(run, bank: Path, photo: Path, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "photo.html"
    code, out, error = run("decode-image", str(bank), str(photo), "--html", str(page))
    assert code == 0, error
    assert "photo.png: 72 × 48 pixels, 3 × 3 visual tokens" in out
    assert f"prompt: USER: {IMAGE}Describe the image. ASSISTANT:" in out
    assert out.count("9 of 9 visual tokens") == len(LAYERS)
    assert "row 1, column 2" in out
    assert "44,16 to 60,32" in out  # the middle is seen, 48 × 48
    assert "of each ninth of the image" in out
    assert "tl-latentlens decode-image" in page.read_text(encoding="utf-8")

    code, out, _ = run("decode-image", str(bank), str(photo), "--json", "--patches", "all", "--top-k", "2")
    assert code == 0
    lines = json.loads(out)
    model = tll.load_model(folder, kind="bridge")
    inputs = model.processor(images=Image.open(photo), text=f"USER: {IMAGE}Describe the image. ASSISTANT:", return_tensors="pt")
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank), positions="image", top_k=2)
    model.run_with_hooks(inputs["input_ids"], pixel_values=inputs["pixel_values"], fwd_hooks=hooks)
    assert len(lines) == 9 * 2 * len(LAYERS)
    for line in lines:
        near = hooks.result.cell(line["hook_name"], line["pos"]).neighbors[line["rank"] - 1]
        assert line["similarity"] == pytest.approx(near.similarity, abs=1e-4)
        assert (line["patch"], line["pos"] - line["patch"]) == (3 * line["row"] + line["column"], lines[0]["pos"])


@needs_bridge
def test_patches_are_chosen_by_number_point_and_box(run, bank: Path, photo: Path) -> None:
    def chosen(*arguments: str) -> list[int]:
        code, out, error = run("decode-image", str(bank), str(photo), "--json", "-n", "1", "--words", "0", *arguments)
        assert code == 0, error
        lines = json.loads(out)
        assert {line["hook_name"] for line in lines} == {"blocks.1.hook_resid_post"}
        return list(dict.fromkeys(line["patch"] for line in lines))

    assert chosen("--patches", "7, 2") == [2, 7]
    assert chosen("--at", "13,1", "--at", "59,47") == [0, 8]
    assert chosen("--box", "12,0,44,16", "--patches", "1,8") == [0, 1, 8]
    assert chosen("--prompt", f"She saw {IMAGE}", "--patches", "4") == [4]
    assert chosen("--prompt", "", "--patches", "4") == [4]
    code, out, _ = run("decode-image", str(bank), str(photo), "--csv", "--patches", "0")
    assert code == 0
    assert out.startswith("patch,pos,level,row,column,x0,y0,x1,y1,hook_name,")


@needs_bridge
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--patches", "9"), "got patch 9; this image has patches 0 to 8"),
        (("--patches", "a"), "got --patches 'a'; expected numbers from 0, as 17,40, or all"),
        (("--patches", ""), "got --patches ''"),
        (("--patches=-1",), "got --patches '-1'"),
        (("--at", "5"), "got --at '5'; expected 2 numbers in pixels, as 120,80"),
        (("--at", "nan,1"), "got --at 'nan,1'"),
        (
            ("--at", "2,2"),
            "no patch shows the point 2, 2; the image has 72 × 48 pixels, of which the model sees 12, 0 to",
        ),
        (("--box", "1,2,3"), "got --box '1,2,3'; expected 4 numbers"),
        (("--box", "9,9,3,3"), "expected left < right and top < bottom"),
        (("--box", "62,0,72,9"), "no patch lies in the box 62, 0, 72, 9"),
        (("--prompt", f"{IMAGE} {IMAGE}"), "the prompt has 2 places for an image"),
        (("--json", "--csv"), "got --json and --csv"),
        (("--html", "/nowhere/page.html"), "no folder for /nowhere/page.html"),
        (("-n", "7"), "7"),
    ],
)
def test_bad_options_are_answered_in_one_line(run, bank: Path, photo: Path, arguments: tuple[str, ...], said: str) -> None:
    code, out, error = run("decode-image", str(bank), str(photo), *arguments)
    assert code != 0
    assert not out
    assert said in error
    assert "Traceback" not in error


@needs_bridge
@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "cut"])
def test_files_that_are_no_images_are_named(run, bank: Path, photo: Path, tmp_path: Path, kind: str) -> None:
    path = {"missing": tmp_path / "none.png", "folder": tmp_path}.get(kind, photo)
    if path == photo:
        photo.write_bytes({"text": b"no image", "empty": b"", "cut": photo.read_bytes()[:900]}[kind])
    code, _, error = run("decode-image", str(bank), str(path), "--model", "no/model")  # images are read first
    assert code == 1
    expected = f"cannot read the image {path}" if path != photo else "photo.png cannot be read as an image"
    assert expected in error


@needs_bridge
def test_a_model_without_its_processor_or_of_text_says_what_is_needed(
    run, bank: Path, scene_bank: Path, photo: Path, folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.name not in ("processor_config.json", "preprocessor_config.json"):
            (bare / file.name).write_bytes(file.read_bytes())
    code, _, error = run("decode-image", str(bank), str(photo), "--model", str(bare))
    assert code == 1
    assert f"the processor of {bare}" in error or "has no processor for images" in error
    code, _, error = run("decode-image", str(scene_bank), str(photo))
    assert code == 1
    assert "reads text alone" in error
    assert "demo-vlm" in error
    code, _, error = run("decode-image", str(scene_bank), str(photo), "--model", str(folder))
    assert code == 1
    assert "pass --model" in error


@needs_bridge
def test_prompts_get_the_image_where_the_processor_wants_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = PromptedImages(tll.load_model(folder, kind="bridge"))
    processor: Any = images.processor
    monkeypatch.setattr(processor, "chat_template", "{% for m in messages %}{{ m['content'] | nothing }}{% endfor %}")
    with pytest.raises(
        tll.InvalidInputError,
        match=r"chat template does not take an image with a text: Template.*, with <image> ",
    ):
        images.make_prompt("What?")
    monkeypatch.setattr(processor, "chat_template", "a template of text alone")
    assert images.make_prompt("What?") == f"{IMAGE}\nWhat?"
    monkeypatch.setattr(processor, "chat_template", None)
    assert images.make_prompt("What?") == f"{IMAGE}\nWhat?"
    assert images.make_prompt("") == IMAGE
    # A processor that writes an image's tokens where another token stands.
    monkeypatch.setattr(processor, "boi_token", "<start>", raising=False)
    monkeypatch.setattr(type(processor), "__call__", _replacing("<start>", type(processor).__call__))
    images = PromptedImages(images.model)
    assert images.make_prompt("What?") == "<start>\nWhat?"
    assert images.make_prompt("Here <start> it is") == "Here <start> it is"


def _replacing(token: str, call: Any) -> Any:
    def replaced(self: Any, images: Any, text: str, **settings: Any) -> Any:
        if token not in text:
            raise ValueError("the text has 0 images")
        return call(self, images=images, text=text.replace(token, IMAGE), **settings)

    return replaced


@pytest.mark.parametrize("kind", available_kinds())
def test_a_scene_is_read_by_the_embedded_model(run, kind: str, scene_bank: Path, tmp_path: Path) -> None:
    scenes = draw_scenes(1, np.random.default_rng(7))
    path, page = tmp_path / "scene.png", tmp_path / "scene.html"
    Image.fromarray((255 * scenes.images[0]).round().astype(np.uint8)).save(path)
    command = ("decode-image", str(scene_bank), str(path), "--model", "demo-vlm", "--kind", kind)
    code, out, error = run(*command, "--html", str(page))
    assert code == 0, error
    assert out.count("9 of 36 visual tokens") == 2
    assert "prompt" not in out
    assert "data:image/" in page.read_text(encoding="utf-8")
    code, out, error = run(*command, "--json", "--patches", "all", "--prompt", "What?")
    assert code == 0
    assert "--prompt is not used" in error
    mask = torch.tensor([[False, *[True] * 36]])
    vlm = tll.load_demo_vlm(kind)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(scene_bank), positions=mask, top_k=3, model=vlm.model)
    vlm.run_with_hooks(scenes, fwd_hooks=hooks)
    for line in json.loads(out)[::7]:
        near = hooks.result.cell(line["hook_name"], line["pos"]).neighbors[line["rank"] - 1]
        assert line["similarity"] == pytest.approx(near.similarity, abs=5e-3)  # of a picture of bytes
    Image.fromarray(pixels()).save(path)
    code, _, error = run(*command)
    assert code == 1
    assert "scene.png has 72 × 48 pixels; the embedded model sees scenes of 72 × 72" in error


def test_gray_transparent_deep_and_moving_pictures_become_bytes() -> None:
    def read(image: Any, kind: str = "PNG", **settings: Any) -> np.ndarray:
        buffer = io.BytesIO()
        image.save(buffer, kind, **settings)
        return read_picture(buffer.getvalue(), "x", max_side=None)

    gray = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for kind in ("PNG", "TIFF"):
        deep = read(Image.fromarray(gray), kind)
        assert np.array_equal(deep, np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, -1))
    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200))
    for kind in ("GIF", "WEBP", "PNG"):
        assert abs(read(first, kind, save_all=True, append_images=[second]).astype(int) - 10).max() <= 4
    clear = np.zeros((8, 8, 4), np.uint8)
    assert (read(Image.fromarray(clear)) == 255).all()
    assert read(Image.fromarray(np.full((8, 8), True)), "PNG").shape == (8, 8, 3)
    assert read(Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert("P")).shape == (8, 8, 3)
    assert read(Image.fromarray(np.zeros((8, 8, 4), np.uint8), "CMYK"), "JPEG").shape == (8, 8, 3)
    assert read(Image.fromarray(np.zeros((10, 2000, 3), np.uint8))).shape == (10, 2000, 3)
    with pytest.raises(tll.InvalidInputError, match="x cannot be read as an image"):
        read(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")


def test_the_clearest_patches_are_spread_over_the_image() -> None:
    grid = tll.PatchGrid.regular(6, 7, range(42))
    scores = np.zeros(42)
    scores[[0, 8, 41]] = 1, 2, 3
    chosen = clearest_patches(grid, scores)
    assert len(chosen) == 9
    assert {8, 41} <= set(chosen.tolist())
    assert 0 not in chosen
    assert clearest_patches(tll.PatchGrid.regular(1, 2, range(2)), np.zeros(2)).tolist() == [0, 1]
    assert named_patches(grid, [3, 3], [(0.5, 0.5)], [(0, 0, 2, 1)]).tolist() == [0, 1, 3]


@needs_bridge
def test_a_token_that_the_model_has_no_vector_for_is_named(bank: Path, folder: Path) -> None:
    model = tll.load_model(folder, kind="bridge")
    model.processor.tokenizer.add_tokens(["<beyond>"])
    with pytest.raises(tll.InvalidInputError, match=r"has token 356 .*tokens that the model has no vectors for"):
        decode_image(model, pixels(), tll.ContextualIndex(bank), prompt=f"{IMAGE} <beyond>")
