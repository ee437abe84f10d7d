"""Weights that were processed otherwise are told from other weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fingerprints import (
    HEADS,
    OTHER_SETTINGS,
    OTHERS,
    PROCESSING,
    RESIDUAL,
    Known,
    check,
    furthest,
    know,
    process,
    refusal,
    save_model,
)
from support.models import available_kinds

import tl_latentlens as tll
from tl_latentlens.model.fingerprint import TOLERANCES
from tl_latentlens.model.loading import load_model


@pytest.fixture(scope="module", params=available_kinds())
def raw_and_centred(request: pytest.FixtureRequest, demo_models: dict[str, Any]) -> dict[str, tuple[Any, Known]]:
    """The embedded model and what a bank would keep of it, with raw and with mean-centred weights."""
    centred = process(tll.load_demo_model(request.param), center_writing_weights=True)
    models = {"raw": demo_models[request.param], "centred": centred}
    return {which: (model, know(model, [*RESIDUAL, *HEADS, "hook_embed"])) for which, model in models.items()}


# Its means over d_model are so small that centring changes less than the tolerance: it is refused all the same.
@pytest.mark.parametrize(("held", "given"), [("raw", "centred"), ("centred", "raw")])
def test_mean_centred_weights_are_named_both_ways(raw_and_centred: dict[str, tuple[Any, Known]], held: str, given: str) -> None:
    (_, known), (model, _) = raw_and_centred[held], raw_and_centred[given]
    assert known.info.centered == (held == "centred")
    assert furthest(known.of(RESIDUAL), model) < TOLERANCES["float32"]
    for names in (RESIDUAL, ["hook_embed"], [*RESIDUAL, *HEADS, "hook_embed"]):
        message = refusal(model, known.of(names))
        one, other = (", mean-centred" if which == "centred" else "" for which in (held, given))
        assert f", float32{one}), the model is demo_model (" in message
        assert f", float32{other}), and their activations differ at {names[0]}" in message
        assert message.endswith(
            f": the bank holds {held} activations and the model's weights are {given} (center_writing_weights){OTHER_SETTINGS}"
            ", or let both be compared without their means: ContextualIndex(bank, transform='center_writing')"
        )
        check(model, known.of(names), without_means=True)


def test_large_means_are_named_as_small_ones_are() -> None:
    models = {}
    for which in ("raw", "centred"):
        models[which] = tll.load_demo_model()
        with torch.no_grad():
            models[which].W_E.add_(2.0)
    process(models["centred"], center_writing_weights=True)
    for held, given in (("raw", "centred"), ("centred", "raw")):
        known = know(models[held])
        assert furthest(known, models[given]) > 0.2
        assert f"the bank holds {held} activations and the model's weights are {given}" in refusal(models[given], known)
        check(models[given], known, without_means=True)


def test_other_weights_differ_without_their_means_too(raw_and_centred: dict[str, tuple[Any, Known]]) -> None:
    other = tll.load_demo_model()
    with torch.no_grad():
        other.W_E.mul_(1.1)
    for _, known in raw_and_centred.values():
        assert "its weights are others" in refusal(other, known, without_means=True)


def test_means_outside_the_residual_stream_are_compared(demo_models: dict[str, Any]) -> None:
    model = next(iter(demo_models.values()))
    known = know(model, [RESIDUAL[0], OTHERS[1]])
    known.fingerprint.activations[RESIDUAL[0]] += 1.0
    check(model, known, without_means=True)
    known.fingerprint.activations[OTHERS[1]] += 1.0
    assert f"differ at {OTHERS[1]}: " in refusal(model, known, without_means=True)


def test_centring_changes_nothing_without_layer_norm(tmp_path: Path) -> None:
    """TransformerLens leaves the weights of RMSNorm models uncentred, since their means are read."""
    path = save_model(tmp_path / "rms", "llama")
    raw, asked = (load_model(str(path), kind=available_kinds()[0]) for _ in range(2))
    known = know(raw, ["blocks.2.hook_resid_post", "hook_embed"])
    check(process(asked, center_writing_weights=True), known)
    assert furthest(known, asked) < 1e-5


@pytest.mark.parametrize("kind", available_kinds())
def test_folded_value_biases_are_named_both_ways(demo_models: dict[str, Any], demo_known: dict[str, Known], kind: str) -> None:
    raw, folded = demo_models[kind], process(tll.load_demo_model(kind), fold_value_biases=True)
    assert float(raw.b_V.detach().abs().max()) > 0.1
    for known, given in ((demo_known[kind], folded), (know(folded, [*RESIDUAL, *HEADS]), raw)):
        for names in ([*RESIDUAL, *HEADS], HEADS):
            assert refusal(given, known.of(names)).endswith(
                "their activations differ at blocks.1.attn.hook_v, blocks.1.attn.hook_z: they differ by the same vector at "
                f"every token, as value biases do (fold_value_biases){OTHER_SETTINGS}"
            )
        check(given, known.of([*RESIDUAL, HEADS[0]]))


@pytest.mark.parametrize("kind", available_kinds())
def test_weights_processed_otherwise(demo_known: dict[str, Known], kind: str) -> None:
    model = process(tll.load_demo_model(kind), refactor_factored_attn_matrices=True)
    assert refusal(model, demo_known[kind]).endswith(
        f"differ at {', '.join(HEADS)}: the residual stream is the same, so its weights are processed otherwise (fold_ln, "
        f"fold_value_biases, refactor_factored_attn_matrices){OTHER_SETTINGS}"
    )


def test_a_constant_difference_elsewhere_is_no_value_bias(demo_models: dict[str, Any]) -> None:
    model = next(iter(demo_models.values()))
    for names, cause in (
        ([RESIDUAL[0], HEADS[0]], "its weights are processed otherwise"),
        (HEADS[:1], "its weights are others"),
    ):
        known = know(model, names)
        known.fingerprint.activations[HEADS[0]] += 1.0
        assert cause in refusal(model, known)


@pytest.mark.parametrize("kind", available_kinds())
def test_all_processing_at_once_is_not_taken_for_other_weights(demo_known: dict[str, Known], kind: str) -> None:
    """`HookedTransformer.from_pretrained` folds and centres unless told otherwise: the commonest of all mistakes."""
    settings = dict.fromkeys(PROCESSING, True)
    for refactored in (False, True):
        model = process(tll.load_demo_model(kind), **{**settings, "refactor_factored_attn_matrices": refactored})
        message = refusal(model, demo_known[kind])
        assert "the bank holds raw activations and the model's weights are centred (center_writing_weights), and " in message
        assert "refactor_factored_attn_matrices" in message if refactored else "value biases do (fold_value_biases)" in message
        assert message.endswith(OTHER_SETTINGS)
