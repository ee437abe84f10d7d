"""Models in other dtypes, and activations that overflow."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.fingerprints import OTHERS, RESIDUAL, Known, check, furthest, know, overflowing, process, refusal
from support.models import available_kinds

import tl_latentlens as tll
from tl_latentlens.model.describe import describe_model
from tl_latentlens.model.fingerprint import TOLERANCES, Fingerprint


@pytest.fixture(scope="module", params=available_kinds())
def in_dtypes(request: pytest.FixtureRequest, demo_models: dict[str, Any]) -> dict[str, tuple[Any, Known]]:
    """The embedded model in each dtype, and what a bank would keep of it."""
    models = {"float32": demo_models[request.param]}
    models.update({dtype: tll.load_demo_model(request.param).to(getattr(torch, dtype)) for dtype in ("float16", "bfloat16")})
    return {dtype: (model, know(model, [*RESIDUAL, *OTHERS])) for dtype, model in models.items()}


@pytest.mark.parametrize(
    ("held", "given"), [("float32", "float16"), ("float16", "float32"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_a_dtype_that_replays_the_bank_is_accepted(in_dtypes: dict[str, tuple[Any, Known]], held: str, given: str) -> None:
    (_, known), (model, _) = in_dtypes[held], in_dtypes[given]
    assert known.info.dtype == held
    assert 0 < furthest(known, model) < TOLERANCES[held]
    check(model, known)


# The residual stream of a float16 model is near enough, the wider activations are not.
@pytest.mark.parametrize(
    ("held", "names"),
    [
        ("float32", RESIDUAL),
        ("float16", OTHERS[1:2]),
        ("float16", [*RESIDUAL, *OTHERS]),
    ],
)
def test_a_coarser_dtype_is_named(in_dtypes: dict[str, tuple[Any, Known]], held: str, names: list[str]) -> None:
    (_, known), (model, _) = in_dtypes[held], in_dtypes["bfloat16"]
    assert TOLERANCES[held] < furthest(known.of(names), model) < TOLERANCES["bfloat16"]
    message = refusal(model, known.of(names))
    assert f", d_model 256, {held}), the model is " in message
    assert ", d_model 256, bfloat16), and " in message
    assert message.endswith(
        f"by about what rounding to bfloat16 does; load the model with dtype={held}, or read on with "
        "ContextualIndex(bank, allow_mismatch=True)"
    )


def test_the_dtype_that_rounds_is_the_coarser_one(demo_models: dict[str, Any]) -> None:
    """A bank of a bfloat16 model and a float32 model: it is not float32 that rounds."""
    model = next(iter(demo_models.values()))
    known = know(model)
    rng = np.random.default_rng(0)
    for rows in known.fingerprint.activations.values():
        noise = rng.standard_normal(rows.shape).astype(np.float32)
        rows += 0.1 * noise * np.linalg.norm(rows, axis=-1, keepdims=True) / np.linalg.norm(noise, axis=-1, keepdims=True)
    message = refusal(model, replace(known, info=replace(known.info, dtype="bfloat16")))
    assert "by about what rounding to bfloat16 does; load the model with dtype=bfloat16" in message


def test_centred_weights_are_known_in_every_dtype(in_dtypes: dict[str, tuple[Any, Known]]) -> None:
    """Rounding leaves means of 1e-4 or so where float32 leaves 1e-8; raw weights have 1e-2."""
    kind = "bridge" if "Bridge" in in_dtypes["float32"][1].info.class_name else "hooked"
    centred = process(tll.load_demo_model(kind), center_writing_weights=True)
    for dtype, (_, known) in in_dtypes.items():
        assert describe_model(centred.to(getattr(torch, dtype))).centered, dtype
        assert not known.info.centered, dtype


@pytest.mark.parametrize("kind", available_kinds())
def test_overflow_at_bos_must_be_on_both_sides(demo_models: dict[str, Any], demo_known: dict[str, Known], kind: str) -> None:
    model = overflowing(tll.load_demo_model(kind))
    known = know(model)
    assert np.isinf(known.fingerprint.activations[RESIDUAL[-1]]).any(-1).sum() == len(known.fingerprint.prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, known)
        for given, held in ((demo_models[kind], known), (model, demo_known[kind])):
            message = refusal(given, held.of(RESIDUAL))
            assert f"their activations differ at {RESIDUAL[-1]}: NaN or inf on one side only" in message


@pytest.mark.parametrize("kind", available_kinds())
def test_overflow_at_bos_hides_no_cause(kind: str) -> None:
    known = know(overflowing(tll.load_demo_model(kind)), [RESIDUAL[-1]])
    centred = overflowing(process(tll.load_demo_model(kind), center_writing_weights=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "(center_writing_weights)" in refusal(centred, known)
        check(centred, known, without_means=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_agreement_of_rows_that_are_not_finite(bad: float) -> None:
    rows = np.ones((3, 4), np.float32)
    broken = rows.copy()
    broken[0, 2] = bad
    one, other = Fingerprint(((0, 1, 2),), {"x": rows}), Fingerprint(((0, 1, 2),), {"x": broken})
    assert other.agrees(other, "x", "float16")
    assert not one.agrees(other, "x", "float16")
    assert not other.agrees(one, "x", "float16")
    further = broken.copy()
    further[1] *= 1.1
    assert not other.agrees(Fingerprint(((0, 1, 2),), {"x": further}), "x", "float16")
