"""Steered readings against runs with a hook of one's own."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tl_latentlens as tll

pytestmark = pytest.mark.usefixtures("few_random_directions")

HOOK = "blocks.2.hook_resid_post"
LATER = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(2, 6))
TEXT = "They walked along the"


@pytest.fixture(scope="module")
def vector() -> torch.Tensor:
    return 40 * torch.nn.functional.normalize(torch.randn(256, generator=torch.Generator().manual_seed(3)), dim=0)


def adding(vector: torch.Tensor, multiple: float, name: str = HOOK) -> list[Any]:
    return [(name, lambda activation, hook: activation + multiple * vector)]


def cache_of(model: Any, text: Any, hooks: list[Any]) -> Any:
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model.run_with_cache(text)[1]


def test_the_steered_stream_is_read(demo_model: Any, index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    """Each cell has the neighbors of the activation that a steering hook of one's own gives, the steered layer included."""
    result = tll.SteeringLens(vector, index, HOOK, multiples=(0, 1, -3), top_k=4).run(demo_model, TEXT)
    assert list(result.readings) == [-3, 0, 1]
    plain = cache_of(demo_model, TEXT, [])
    for multiple, reading in result.readings.items():
        cache = cache_of(demo_model, TEXT, adding(vector, multiple))
        assert reading.hook_names == LATER
        for name in LATER:
            expected = index.search(cache[name][0, 1:], 4, distinct=True)
            assert torch.equal(reading.found[name].rows, expected.rows)
            torch.testing.assert_close(reading.found[name].similarities, expected.similarities, atol=1e-5, rtol=0)
            np.testing.assert_array_equal(
                reading.logit_lens[name].token_ids, tll.logit_lens(demo_model, cache[name][0, 1:], 4).token_ids
            )
            cosines = torch.cosine_similarity(cache[name][0, 1:], plain[name][0, 1:], dim=-1)
            np.testing.assert_allclose(result.cosines[multiple][name], cosines, atol=1e-5)
    assert not any(point.fwd_hooks for point in demo_model.hook_dict.values())


def test_hooks_do_in_a_run_what_adding_does(demo_model: Any, index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    steer = tll.SteeringLens(vector, index, HOOK)
    plain = demo_model(TEXT)
    assert torch.equal(demo_model.run_with_hooks(TEXT, fwd_hooks=steer.hooks(0)), plain), "multiple 0 leaves every bit"
    steered = demo_model.run_with_hooks(TEXT, fwd_hooks=steer.hooks(2))
    assert torch.equal(steered, demo_model.run_with_hooks(TEXT, fwd_hooks=adding(vector, 2)))
    assert not torch.equal(steered, plain)
    assert list(steer.result.readings) == [0, 2], "what was run by hand so far"
    by_hand, at_once = (
        steer.result.to_dataframe(),
        tll.SteeringLens(vector, index, HOOK, multiples=(0, 2)).run(demo_model, TEXT),
    )
    drop = ["similarity", "logit_probability", "cos_to_unsteered"]
    assert by_hand.drop(columns=drop).equals(at_once.to_dataframe().drop(columns=drop))
    cache = cache_of(demo_model, TEXT, held := steer.hooks(2))
    assert torch.equal(cache[HOOK], cache_of(demo_model, TEXT, adding(vector, 2))[HOOK])
    assert torch.equal(held.result.found[HOOK].rows, index.search(cache[HOOK][0, 1:], 5, distinct=True).rows)
    steer.clear()
    with pytest.raises(tll.InvalidInputError, match=r"nothing was read: call steer\.run"):
        _ = steer.result


def test_generation(demo_model: Any, index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    """New tokens are steered and read too; cosines stop where the texts part."""
    steer = tll.SteeringLens(vector, index, HOOK, multiples=(0, 6))
    texts = {}
    for multiple in (0, 6):
        with demo_model.hooks(fwd_hooks=steer.hooks(multiple)):
            texts[multiple] = demo_model.generate(TEXT, max_new_tokens=4, do_sample=False, verbose=False)
    with demo_model.hooks(fwd_hooks=adding(vector, 6)):
        assert texts[6] == demo_model.generate(TEXT, max_new_tokens=4, do_sample=False, verbose=False)
    result = steer.result
    tokens = [result.readings[multiple].tokens[0] for multiple in (0, 6)]
    unsteered, steered = tokens
    alike = [unsteered[: i + 1] == steered[: i + 1] for i in range(1, len(steered))]
    assert 3 < sum(alike) < len(alike)
    for cosines in result.cosines[6].values():
        assert np.isfinite(cosines).tolist() == alike


@pytest.mark.parametrize(
    ("positions", "chosen"), [(-1, [4]), (2, [2]), ([1, -2], [1, 3]), (slice(3, None), [3, 4]), (None, [0, 1, 2, 3, 4])]
)
def test_positions(
    demo_model: Any, index: tll.ContextualIndex, vector: torch.Tensor, positions: Any, chosen: list[int]
) -> None:
    steer = tll.SteeringLens(vector, index, HOOK, positions=positions)
    apart = cache_of(demo_model, TEXT, steer.hooks(1))[HOOK] - cache_of(demo_model, TEXT, [])[HOOK]
    assert apart.shape[1] == 5
    expected = torch.zeros(5, 256)
    expected[chosen] = vector
    torch.testing.assert_close(apart[0], expected, atol=1e-4, rtol=0)
    untouched = [i for i in range(5) if i not in chosen]
    assert not apart[0, untouched].any()


@pytest.mark.parametrize(("positions", "new"), [(-1, True), (slice(5, None), True), (2, False), ([2, 7], "refused")])
def test_positions_go_on_in_generate(
    demo_model: Any, index: tll.ContextualIndex, vector: torch.Tensor, positions: Any, new: Any
) -> None:
    added: list[torch.Tensor] = []
    steer = tll.SteeringLens(vector, index, HOOK, positions=positions)
    hooks: list[Any] = [(HOOK, lambda x, hook: added.append(-x.clone())), *steer.hooks(1)]
    hooks.append((HOOK, lambda x, hook: added[-1].add_(x)))
    with torch.no_grad(), demo_model.hooks(fwd_hooks=hooks):
        if new == "refused":
            with pytest.raises(tll.InvalidInputError, match=r"positions=\[2, 7\] is outside the run's 5 positions"):
                demo_model.generate(TEXT, max_new_tokens=3, do_sample=False, verbose=False)
            return
        demo_model.generate(TEXT, max_new_tokens=3, do_sample=False, verbose=False)
    steps = [part for part in added if part.shape[1] == 1]
    assert len(steps) == 2
    for part in steps:
        torch.testing.assert_close(part[0, 0], vector if new else 0 * vector, atol=1e-4, rtol=0)


def test_several_texts_and_tokens(demo_model: Any, index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    texts = [TEXT, "She went down to the river and"]
    steer = tll.SteeringLens(vector, index, HOOK, multiples=(0, 2))
    together = steer.run(demo_model, texts)
    for batch, text in enumerate(texts):
        alone = steer.run(demo_model, demo_model.to_tokens(text))
        for multiple in (0, 2):
            both, one = together.readings[multiple], alone.readings[multiple]
            mine = both.positions[:, 0] == batch
            assert torch.equal(both.found[LATER[-1]].rows[torch.from_numpy(mine)], one.found[LATER[-1]].rows)
            np.testing.assert_allclose(
                together.cosines[multiple][LATER[-1]][mine], alone.cosines[multiple][LATER[-1]], atol=1e-4
            )
    assert str(together).count("«") > 2
    assert "She went down to the river «and»" in str(together)


def test_other_activations(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    """Heads side by side are steered as the model shapes them; what is read is what comes after, in the stream."""
    names = ["blocks.3.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    index = tll.ContextualIndex(tll.build_bank(any_model, texts, tmp_path / "b.h5", hook_names=names, progress=False))
    z = torch.randn(256, generator=torch.Generator().manual_seed(0))
    steer = tll.SteeringLens(z, index, "blocks.1.attn.hook_z")
    assert steer.read == ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    shape = any_model.cfg.n_heads, any_model.cfg.d_head
    expected = any_model.run_with_hooks(TEXT, fwd_hooks=adding(z.view(shape), 2, "blocks.1.attn.hook_z"))
    assert torch.equal(any_model.run_with_hooks(TEXT, fwd_hooks=steer.hooks(2)), expected)
    assert tll.SteeringLens(z, index, "blocks.1.hook_resid_pre").read[0] == "blocks.1.hook_resid_pre"
    with pytest.raises(tll.UnknownHookError, match="without model=, the index has no hook name"):
        tll.SteeringLens(z, index, "blocks.0.hook_resid_mid")
    steer = tll.SteeringLens(z, index, "blocks.0.hook_resid_mid", model=any_model, read="blocks.2.hook_resid_post")
    assert steer.relative_length is None
    assert steer.run(any_model, TEXT).readings[4.0].hook_names == ("blocks.2.hook_resid_post",)
    with pytest.raises(tll.InvalidInputError, match="unit='activation' needs the lengths of blocks"):
        tll.SteeringLens(z, index, "blocks.0.hook_resid_mid", model=any_model, unit="activation")
    with pytest.raises(tll.InvalidInputError, match="holds nothing of the residual stream from blocks"):
        tll.SteeringLens(z, index, "blocks.4.hook_resid_mid", model=any_model)


def test_lengths(index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    median = float(np.median(index.banks[0].norms(HOOK)))
    assert tll.SteeringLens(vector, index, HOOK).relative_length == pytest.approx(40 / median)
    steer = tll.SteeringLens(vector / 40, index, HOOK, unit="activation")
    assert steer.relative_length == pytest.approx(1)
    torch.testing.assert_close(steer.vector, vector / 40 * median)


def test_dtype_and_gradients_stay(index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    (_, add), *_ = tll.SteeringLens(vector.double().numpy(), index, HOOK).hooks(0.5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        activation = torch.ones(1, 2, 256, dtype=dtype, requires_grad=True)
        changed = add(activation, hook=None)
        assert changed.dtype == dtype
        assert changed.requires_grad
        assert bool((activation == 1).all())
        assert torch.equal(changed[0, 0], 1 + (0.5 * vector).to(dtype))


def test_refusals(demo_model: Any, index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    for bad, match in (
        (vector[None], r"steering vector of shape \(1, 256\); expected \(256,\)"),
        (vector[:9], r"steering vector of shape \(9,\); expected \(256,\)"),
        (0 * vector, "all zeros"),
        (vector * math.nan, "NaN or inf"),
    ):
        with pytest.raises(tll.InvalidInputError, match=match):
            tll.SteeringLens(bad, index, HOOK)
    with pytest.raises(tll.InvalidInputError, match="got unit='norm'; expected one of"):
        tll.SteeringLens(vector, index, HOOK, unit="norm")
    with pytest.raises(tll.InvalidInputError, match="got a multiple of nan"):
        tll.SteeringLens(vector, index, HOOK, multiples=(1, math.nan))
    with pytest.raises(tll.InvalidInputError, match="top_k=0"):
        tll.SteeringLens(vector, index, HOOK, top_k=0)
    steer = tll.SteeringLens(vector[:9], index, "blocks.0.hook_resid_mid", model=demo_model)
    with pytest.raises(tll.InvalidInputError, match=r"width 9; blocks\.0\.hook_resid_mid has width 256"):
        steer.run(demo_model, TEXT)
    with pytest.raises(tll.InvalidInputError, match="given prompt 0, '', has 0 tokens"):
        tll.SteeringLens(vector, index, HOOK).run(demo_model, "")


def test_dataframe(any_model: Any, index: tll.ContextualIndex, vector: torch.Tensor) -> None:
    steer = tll.SteeringLens(vector, index, HOOK, multiples=(1, 0), top_k=2)
    result = steer.run(any_model, TEXT)
    frame = result.to_dataframe()
    lens = result.readings[1].to_dataframe()
    assert list(frame.columns) == ["multiple", *lens.columns, "cos_to_unsteered"]
    assert frame[frame["multiple"] == 1][lens.columns].reset_index(drop=True).equals(lens)
    assert len(frame) == 2 * len(LATER) * 4 * 2
    np.testing.assert_allclose(frame[frame["multiple"] == 0].cos_to_unsteered, 1, atol=1e-5)
    line = frame[(frame["multiple"] == 1) & (frame["hook_name"] == LATER[1]) & (frame["pos"] == 3)]
    assert line.cos_to_unsteered.tolist() == [result.cosines[1][LATER[1]][2]] * 2
    without = tll.SteeringLens(vector, index, HOOK, multiples=(1,)).run(any_model, TEXT)
    assert without.cosines == {}
    assert without.to_dataframe().cos_to_unsteered.isna().all()


@pytest.mark.parametrize("n", [1, 4, 7])
def test_table(any_model: Any, index: tll.ContextualIndex, vector: torch.Tensor, n: int) -> None:
    result = tll.SteeringLens(vector, index, HOOK, multiples=range(n)).run(any_model, TEXT)
    shown = str(result)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    for heading in ["unsteered", *(f"× {i}" for i in range(1, n))]:
        assert len([line for line in lines if line.lstrip().startswith("hook ") and f"  {heading} " in f"{line} "]) == 1
    first_words = [line.split()[0] for line in lines if line.strip()]
    assert first_words.count("4") == len([line for line in lines if "They walked along «the»" in line])
    similarities = [f"{result.readings[0].cell(name, -1).neighbors[0].similarity:.2f}" for name in LATER]
    assert [line.split()[1] for line in lines if line.split()[:1] and line.split()[0].isdecimal()][: len(LATER)] == similarities
    assert "<pre" in result._repr_html_()
    with pytest.raises(tll.InvalidInputError, match="position 0 was not decoded"):
        result.table(pos=0)


def test_wrong_arguments(index: tll.ContextualIndex, bank: tll.Bank) -> None:
    hook = index.hook_names[2]
    assert tll.SteeringLens(torch.ones(256), index, hook, multiples=2).multiples == (2.0,)
    with pytest.raises(tll.InvalidInputError, match="got no multiples"):
        tll.SteeringLens(torch.ones(256), index, hook, multiples=())
    with pytest.raises(tll.InvalidInputError, match="expected a ContextualIndex"):
        tll.SteeringLens(torch.ones(256), bank, hook)


def test_a_calibrated_result_says_whether_its_vector_is_anything(
    any_model: Any, index: tll.ContextualIndex, vector: torch.Tensor
) -> None:
    result = tll.SteeringLens(vector, index, HOOK, multiples=(0, 1), top_k=3, calibrate=True).run(any_model, TEXT)
    own = tll.decode_directions(vector, index, top_k=3, hook_name=HOOK, calibrate=True).scores
    assert own is not None
    assert result.scores is not None
    assert result.scores.equals(own)
    lines = [line for line in str(result).splitlines() if "random directions come as near" in line]
    assert [line[:4] for line in lines] == ["+v: ", "−v: "]
    assert all(len(line) <= 80 for line in lines)
    assert "chance" in result.to_dataframe()
    elsewhere = tll.SteeringLens(
        vector, index, "blocks.2.hook_resid_mid", multiples=1, top_k=3, calibrate=True, model=any_model
    ).run(any_model, TEXT)
    read = list(elsewhere.readings[1].hook_names)
    expected = tll.decode_directions(vector, index, top_k=3, hook_name=read, calibrate=True).scores
    assert elsewhere.scores is not None
    assert elsewhere.scores.equals(expected)
    assert tll.SteeringLens(vector, index, HOOK, multiples=1).run(any_model, TEXT).scores is None
