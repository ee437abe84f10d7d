"""Visual tokens: positions and boxes against what tiny models make of changed pixels, and readings of them."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS, available_kinds
from support.vlms import MODELS, Vlm
from torch import Tensor

import tl_latentlens as tll
from tl_latentlens.model.hook_names import expand_hook_names

pytestmark = pytest.mark.skipif("bridge" not in available_kinds(), reason="no TransformerBridge")
NAMES = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module", params=list(MODELS))
def vlm(request: pytest.FixtureRequest) -> Vlm:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def llava() -> Vlm:
    torch.manual_seed(0)
    return MODELS["llava"]()


@pytest.fixture(scope="module")
def text_index(llava: Vlm, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    """Text rows of the same model."""
    path = tmp_path_factory.mktemp("vlm") / "text.h5"
    return tll.ContextualIndex(tll.build_bank(llava.bridge, TEXTS, path, hook_names=NAMES, progress=False), device="cpu")


def run(vlm: Vlm, inputs: dict[str, Tensor], hooks: Any) -> None:
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        vlm.bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=hooks, **rest)


def merged(vlm: Vlm, inputs: dict[str, Tensor]) -> Tensor:
    """The merged embeddings: text, and what the connector gave."""
    seen = []
    run(vlm, inputs, [(NAMES[0], lambda x, hook: seen.append(x.detach().clone()))])
    return seen[0]


def test_each_visual_token_sees_its_box_and_no_other(vlm: Vlm) -> None:
    """The image encoders here do not mix patches: a token changes where pixels of its box do."""
    image = torch.rand(3, vlm.height, vlm.width)
    inputs = vlm.prompt(image)
    assert torch.equal(tll.image_positions(vlm.bridge, inputs["input_ids"]), inputs["input_ids"] == vlm.image_token)
    [grid] = tll.patch_grids(vlm.bridge, inputs, tiles=vlm.tiles)
    assert (grid.height, grid.width) == (vlm.height, vlm.width)
    assert grid.positions.tolist() == list(range(2, 2 + vlm.n_tokens))
    before = merged(vlm, inputs)[0]
    for token in np.flatnonzero(grid.is_patch):
        x0, y0, x1, y1 = grid.boxes[token].round().astype(int)
        changed = image.clone()
        changed[:, y0:y1, x0:x1] += 1
        moved = (merged(vlm, vlm.prompt(changed))[0] - before).abs().amax(-1) > 1e-5
        expected = grid.inside((x0, y0, x1, y1), least=1e-6)  # of models that look at tiles too, the whole's token as well
        assert token in expected
        assert np.flatnonzero(moved).tolist() == sorted(grid.positions[expected])


def test_boxes_tile_the_image_and_lead_back(vlm: Vlm) -> None:
    [grid] = tll.patch_grids(vlm.bridge, vlm.prompt(torch.rand(3, vlm.height, vlm.width)), tiles=vlm.tiles)
    boxes = grid.boxes[grid.is_patch]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [vlm.width, vlm.height]).all()
    for token in np.flatnonzero(grid.is_patch):
        x0, y0, x1, y1 = grid.boxes[token]
        found = grid.at((x0 + x1) / 2, (y0 + y1) / 2)
        assert token in found
        assert len(found) == len(grid.shapes) == len(set(grid.levels[found]))
        assert grid.token(grid.positions[token]) == token
    assert len(grid.at(vlm.width, vlm.height)) == 0
    for level, (rows, columns) in enumerate(grid.shapes):
        here = grid.is_patch & (grid.levels == level)
        assert set(zip(grid.rows[here], grid.columns[here], strict=True)) == set(np.ndindex(rows, columns))
    table = grid.to_dataframe()
    assert list(table) == ["token", "position", "level", "row", "column", "x0", "y0", "x1", "y1"]
    assert np.array_equal(table[["x0", "y0", "x1", "y1"]], grid.boxes, equal_nan=True)


def config_only(config: Any) -> Any:
    return SimpleNamespace(original_model=SimpleNamespace(config=config))


@pytest.mark.parametrize("size", [(20, 100), (100, 20), (64, 64), (37, 51), (333, 70), (15, 16), (97, 96)])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_of_any_resolution_are_packed_as_the_model_packs_them(family: str, size: tuple[int, int]) -> None:
    """Features that say where on the padded canvas they come from, packed by the model itself, are the boxes."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextModel, LlavaOnevisionConfig, LlavaOnevisionModel

    # Of tiles of 18 pixels two are seen by no patch; where grids are shrunk, by interpolation, that would blur the boxes.
    tile, patch = (18 if family == "llava_next" else 16), 4
    pinpoints = [[tile * i, tile * j] for i, j in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (4, 4))]
    vision = CLIPVisionConfig(image_size=tile, patch_size=patch)
    config: Any
    pack: Any
    if family == "llava_next":
        config, pack = LlavaNextConfig(vision_config=vision, image_grid_pinpoints=pinpoints), LlavaNextModel.pack_image_features
        extra: Any = "default"
    else:
        config = LlavaOnevisionConfig(vision_config=vision, image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_3")
        pack, extra = LlavaOnevisionModel.pack_image_features, None
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution(size, pinpoints)
    centers = [
        torch.tensor([[j * tile + x * patch + patch / 2, i * tile + y * patch + patch / 2] for y in range(4) for x in range(4)])
        for i in range(best[0] // tile)
        for j in range(best[1] // tile)
    ]
    features = torch.stack([torch.zeros(16, 2), *centers])
    newline = torch.full((2,), torch.nan)
    packed = (
        pack(SimpleNamespace(config=config), [features], torch.tensor([size]), extra, image_newline=newline)
        if family == "llava_next"
        else pack(SimpleNamespace(config=config), [features], torch.tensor([size]), newline, "anyres_max_3")
    )[0][0].numpy()
    ids = torch.full((1, len(packed)), config.image_token_id)
    [grid] = tll.patch_grids(config_only(config), {"input_ids": ids, "image_sizes": torch.tensor([size])})
    detail = grid.levels == 1
    assert detail.sum() == len(packed) - 16
    assert np.array_equal(grid.is_patch, ~np.isnan(packed[:, 0]))
    scale = min(best[0] / size[0], best[1] / size[1])
    resized = [min(int(np.ceil(length * scale)), room) for length, room in zip(size, best, strict=True)]
    pasted = [(room - length) // 2 for length, room in zip(resized, best, strict=True)]
    expected = (packed[detail & grid.is_patch] - pasted[::-1]) * np.array(size[::-1]) / resized[::-1]
    x0, y0, x1, y1 = grid.boxes[detail & grid.is_patch].T
    inner = (x0 > 0) & (y0 > 0) & (x1 < size[1]) & (y1 < size[0])  # those at the edge may have been clipped to the image
    assert inner.any()
    assert np.abs(np.stack([x0 + x1, y0 + y1], -1) / 2 - expected)[inner].max() < 1e-3
    assert (x0 <= x1).all()
    assert (y0 <= y1).all()


def test_several_images_and_prompts_are_told_apart(vlm: Vlm) -> None:
    one = vlm.inputs(torch.rand(3, vlm.height, vlm.width))
    more = {name: torch.cat([value] * 3) for name, value in one.items()}
    n = vlm.n_tokens
    ids = torch.cat([vlm.ids([0, 1], n, [1], n, [1]), vlm.ids([0] * (n + 2), n, [1, 1])])
    first, second, third = tll.patch_grids(vlm.bridge, {"input_ids": ids, **more}, tiles=vlm.tiles and vlm.tiles * 3)
    assert [grid.batch for grid in (first, second, third)] == [0, 0, 1]
    assert second.positions.tolist() == list(range(n + 3, 2 * n + 3))
    assert third.positions.tolist() == list(range(n + 2, 2 * n + 2))
    assert np.array_equal(first.boxes, third.boxes, equal_nan=True)


def test_positions_image_decodes_the_visual_tokens_against_text(llava: Vlm, text_index: tll.ContextualIndex) -> None:
    inputs = llava.prompt(torch.rand(3, 24, 24))
    hooks = tll.latentlens_hooks(text_index, positions="image", embedding_lens=True)
    everything = tll.latentlens_hooks(text_index)
    run(llava, inputs, [*hooks, *everything])
    assert hooks.result.positions.tolist() == [[0, pos] for pos in range(2, 11)]
    assert set(hooks.result.to_dataframe()["token"]) == {"<image>"}
    for name in NAMES:
        cell, same = (read.result.cell(name, 5) for read in (hooks, everything))
        assert cell.neighbors == same.neighbors
        assert cell.embedding_lens
    stream = merged(llava, inputs)[0, 5]
    assert hooks.result.cell(NAMES[0], 5).neighbors == text_index.search(stream).neighbors()


def test_a_forgotten_image_is_warned_of(llava: Vlm, text_index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(text_index, positions="image")
    run(llava, {"input_ids": llava.prompt(torch.rand(3, 24, 24))["input_ids"]}, hooks)
    with pytest.warns(UserWarning, match=r"all 9 visual tokens are the same at blocks.0.hook_resid_pre: was the image given"):
        hooks.result  # noqa: B018
    run(llava, llava.prompt(torch.rand(3, 24, 24)), hooks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.result  # noqa: B018


def test_merged_embeddings_in_a_hooked_transformer_read_the_same(
    llava: Vlm, text_index: tll.ContextualIndex, tmp_path: Path
) -> None:
    if "hooked" not in available_kinds():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformers import LlamaForCausalLM

    whole = llava.bridge.original_model
    language = LlamaForCausalLM(whole.config.text_config)
    weights = {name.replace("._original_component", ""): value for name, value in whole.state_dict().items()}
    weights = {name.replace("model.language_model.", "model."): value for name, value in weights.items()}
    assert not language.load_state_dict(weights, strict=False).missing_keys
    folder = tmp_path / "language"
    language.save_pretrained(folder)
    llava.bridge.tokenizer.save_pretrained(folder)
    model = tll.load_model(str(folder), kind="hooked")

    inputs = llava.prompt(torch.rand(3, 24, 24))
    mask = tll.image_positions(llava.bridge, inputs["input_ids"])
    on_bridge = tll.latentlens_hooks(text_index, positions="image", calibrate=False)
    run(llava, inputs, on_bridge)
    hooks = tll.latentlens_hooks(text_index, positions=mask, calibrate=False)
    embeddings = merged(llava, inputs)
    model.run_with_hooks(embeddings, start_at_layer=0, fwd_hooks=hooks)
    assert hooks.result.tokens is None
    first, second = (
        read.result.to_dataframe().drop(columns=["token", "around"], errors="ignore") for read in (on_bridge, hooks)
    )
    numbers = ["similarity", "logit_probability"]
    assert np.allclose(first[numbers], second[numbers], atol=1e-5)
    assert first.drop(columns=numbers).equals(second.drop(columns=numbers))

    unmasked = tll.latentlens_hooks(text_index, positions="image")
    model.run_with_hooks(embeddings, start_at_layer=0, fwd_hooks=unmasked)
    with pytest.raises(tll.InvalidInputError, match=r"was given embeddings.*positions=mask \[batch, pos\]"):
        _ = unmasked.result
    model.run_with_hooks(inputs["input_ids"], fwd_hooks=unmasked)
    with pytest.raises(tll.InvalidInputError, match="HookedTransformer does not say which of its tokens are visual"):
        _ = unmasked.result


def test_an_image_encoder_is_neither_banked_nor_decoded(llava: Vlm, text_index: tll.ContextualIndex, tmp_path: Path) -> None:
    fired = [name for name in llava.bridge.hook_dict if name.startswith("vision_")]
    assert fired
    for name in ("vision_encoder.hook_out", "vision_projector.hook_out"):
        assert name in fired
        with pytest.raises(tll.InvalidInputError, match=r"of an encoder beside the language model.*blocks\.0\.hook_resid_pre"):
            tll.build_bank(llava.bridge, TEXTS, tmp_path / "no.h5", hook_names=[NAMES[0], name])
        for model in (None, llava.bridge):
            with pytest.raises(tll.InvalidInputError, match="of an encoder beside the language model"):
                tll.latentlens_hooks(text_index, name, model=model)
    hook = tll.LatentLensHook(text_index)
    with pytest.raises(tll.InvalidInputError, match="of an encoder beside the language model"):
        run(llava, llava.prompt(torch.rand(3, 24, 24)), [("vision_encoder.hook_out", hook)])
    names = expand_hook_names(llava.bridge, lambda name: name.endswith(("hook_out", "hook_resid_post")))
    assert NAMES[1] in names
    assert not any(name.startswith("vision") for name in names)


def test_what_is_missing_is_said(llava: Vlm, text_index: tll.ContextualIndex, any_model: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"ids without an image token \(\d+\).*processor"):
        tll.patch_grids(llava.bridge, llava.ids([0, 1, 2]))
    with pytest.raises(tll.InvalidInputError, match="prompt 0 has 5 more visual tokens after 0 images; expected an image of 9"):
        tll.patch_grids(llava.bridge, llava.ids([0], 5))
    with pytest.raises(tll.InvalidInputError, match="expected input_ids among them"):
        tll.patch_grids(llava.bridge, {"pixel_values": torch.zeros(1)})
    with pytest.raises(tll.InvalidInputError, match="does not say which of its tokens are visual"):
        tll.image_positions(any_model, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(tll.InvalidInputError, match="positions='images'; expected 'image'"):
        tll.latentlens_hooks(text_index, positions="images")
    hooks = tll.latentlens_hooks(text_index, positions=torch.zeros(1, 5, dtype=torch.bool))
    run(llava, {"input_ids": llava.ids([0, 1, 2, 3, 4])}, hooks)
    with pytest.raises(tll.InvalidInputError, match="got positions that are False everywhere"):
        hooks.result  # noqa: B018
    with pytest.raises(tll.InvalidInputError, match="got 2 images and visual tokens for 1"):
        tll.patch_grids(llava.bridge, llava.ids([0], 9), shapes=[(3, 3), (3, 3)])
    assert len(tll.patch_grids(any_model, torch.zeros(1, 3), shapes=[(1, 2)], mask=torch.tensor([[True, False, True]]))[0]) == 2
    with pytest.raises(tll.InvalidInputError, match="does not describe an image encoder"):
        tll.patch_grids(any_model, torch.zeros(1, 3), mask=torch.tensor([[True, False, True]]))


@pytest.mark.parametrize(("name", "missing"), [("qwen2_5_vl", "image_grid_thw"), ("mistral3", "image_sizes")])
def test_a_missing_size_is_named(name: str, missing: str) -> None:
    vlm = MODELS[name]()
    with pytest.raises(tll.InvalidInputError, match=f"as its {missing} says, which is missing"):
        tll.patch_grids(vlm.bridge, vlm.ids([0], vlm.n_tokens))
    if name == "qwen2_5_vl":
        with pytest.raises(tll.InvalidInputError, match="no videos"):
            tll.patch_grids(vlm.bridge, {"input_ids": vlm.ids([0], 30), "image_grid_thw": [[2, 6, 10]]})


def test_tiles_must_be_said() -> None:
    vlm = MODELS["idefics3"]()
    ids = vlm.ids([0], 4, [1], 4, [1], 4)
    with pytest.raises(tll.InvalidInputError, match=r"3 crops of 2 × 2 visual tokens.*tiles=\[\(3, 4\)\]"):
        tll.patch_grids(vlm.bridge, ids)
    assert [grid.shapes for grid in tll.patch_grids(vlm.bridge, ids, tiles=[(1, 1)] * 3)] == [[(2, 2)]] * 3
    assert tll.patch_grids(vlm.bridge, ids, tiles=[(1, 2)])[0].shapes == [(2, 2), (2, 4)]
    assert tll.patch_grids(vlm.bridge, vlm.ids([0], 4))[0].shapes == [(2, 2)]


def test_gemma_4_counts_pooled_patches() -> None:
    from transformers import Gemma4Config, Gemma4VisionConfig

    config: Any = Gemma4Config(vision_config=Gemma4VisionConfig().to_dict())
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij"), -1).flip(-1).reshape(-1, 2)
    places = torch.cat([places, torch.full((9, 2), -1)])  # padding
    ids = torch.full((1, 6), config.image_token_id)
    [grid] = tll.patch_grids(config_only(config), {"input_ids": ids, "image_position_ids": places[None]})
    patch = config.vision_config.patch_size
    assert grid.shapes == [(2, 3)]
    assert (grid.height, grid.width) == (6 * patch, 9 * patch)
    assert grid.boxes[4].tolist() == [3 * patch, 3 * patch, 6 * patch, 6 * patch]


def test_a_grid_by_hand_and_on_another_size() -> None:
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[1, 3:9] = True
    grid = tll.PatchGrid.regular(2, 3, mask, height=20, width=30, batch=1)
    assert grid.positions.tolist() == [3, 4, 5, 6, 7, 8]
    assert grid.boxes[grid.token(7)].tolist() == [10, 10, 20, 20]
    assert grid.at(29, 19).tolist() == [5]
    assert grid.inside((5, 0, 30, 10)).tolist() == [0, 1, 2]
    assert grid.inside((6, 0, 30, 10)).tolist() == [1, 2]
    squeezed = grid.on(40, 30)
    assert squeezed.boxes[4].tolist() == [10, 20, 20, 40]
    assert (squeezed.height, squeezed.width) == (40, 30)
    cropped = grid.on(80, 60, center_crop=True)  # of 80 × 60 the middle 40 × 60 was taken and halved
    assert cropped.boxes[0].tolist() == [0, 20, 20, 40]
    assert cropped.boxes[5].tolist() == [40, 40, 60, 60]
    assert repr(grid) == "PatchGrid(2 × 3 patches of a 30 × 20 image, batch 1)"
    with pytest.raises(tll.InvalidInputError, match="got 5 positions; expected 2 rows × 3 columns = 6"):
        tll.PatchGrid.regular(2, 3, range(5))
    with pytest.raises(tll.InvalidInputError, match="position 2 is no token of this image"):
        grid.token(2)
    with pytest.raises(tll.InvalidInputError, match="expected left < right"):
        grid.inside((3, 0, 3, 5))


def test_the_bank_is_not_asked_whether_it_knows_visual_tokens(llava: Vlm, text_index: tll.ContextualIndex) -> None:
    """They are far from all tokens of text, however right their neighbors are."""
    inputs = llava.prompt(torch.rand(3, llava.height, llava.width))
    is_image = tll.image_positions(llava.bridge, inputs["input_ids"])[0].tolist()
    for positions in ("image", None):
        hooks = tll.latentlens_hooks(text_index, positions=positions, calibrate=True)
        run(llava, inputs, hooks)
        result = hooks.result
        cells = [(result.cell(name, pos), is_image[pos]) for name in NAMES for _, pos in result.positions.tolist()]
        assert all((cell.known is None) == is_visual for cell, is_visual in cells)
        assert any(is_visual for _, is_visual in cells)
        assert result.grid(0).score_name("latentlens") == "cosine"
        assert not result.grid(0).is_unknown[:, np.array(is_image)[result.positions[:, 1]]].any()
