"""The wrong model is refused, both sides named, with the cause where it can be told; the right one never is."""

import json
import shutil
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.models import ARCHITECTURES, TEXTS, available_kinds, make_tokenizer
from typer.testing import CliRunner

import tl_latentlens as tll
from tl_latentlens import cli
from tl_latentlens.model.describe import describe_model
from tl_latentlens.model.fingerprint import TOLERANCES, Fingerprint, fingerprint
from tl_latentlens.model.fingerprint_check import check_fingerprint
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.loading import DEMO_MODEL, load_model
from tl_latentlens.model.tokenize import tokenize

RESIDUAL = ["blocks.0.hook_resid_post", "blocks.3.hook_resid_mid", "blocks.5.hook_resid_post"]
HEADS = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"]
OTHERS = ["blocks.1.ln2.hook_normalized", "blocks.2.mlp.hook_post", "hook_embed"]
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
OTHER_WEIGHTS = "; load the model that built the bank, or rebuild the bank"
OTHER_SETTINGS = "; load the model as the bank's was loaded"


@dataclass(frozen=True)
class Known:
    """What a bank keeps of its model."""

    fingerprint: Fingerprint
    info: ModelInfo

    def of(self, hook_names: list[str]) -> "Known":
        """Of some activations alone."""
        kept = {name: self.fingerprint.activations[name] for name in hook_names}
        return replace(self, fingerprint=replace(self.fingerprint, activations=kept))


def know(model: Any, hook_names: list[str] = RESIDUAL) -> Known:
    """What a bank of the first two texts would keep."""
    prompts = tokenize(model, TEXTS[:2])
    ids = [prompts.tokens[a:b].tolist() for a, b in zip(prompts.starts[:-1], prompts.starts[1:], strict=True)]
    return Known(fingerprint(model, ids, hook_names), describe_model(model))


def check(model: Any, known: Known, **settings: bool) -> None:
    check_fingerprint(model, known.fingerprint, known.info, **settings)


def refusal(model: Any, known: Known, **settings: bool) -> str:
    """What a user reads when the model is refused."""
    with pytest.raises(tll.ModelMismatchError) as refused:
        check(model, known, **settings)
    return str(refused.value)


def furthest(known: Known, model: Any) -> float:
    """The largest change of an activation, as a share of its length."""
    before = known.fingerprint.activations
    after = fingerprint(model, known.fingerprint.prompts, list(before)).activations
    return max(
        float((np.linalg.norm(after[name] - rows, axis=-1) / np.linalg.norm(rows, axis=-1)).max())
        for name, rows in before.items()
    )


def process(model: Any, **changes: bool) -> Any:
    """TransformerLens' own processing of a model's weights, in place."""
    settings = {**dict.fromkeys(PROCESSING, False), **changes}
    if hasattr(model, "load_and_process_state_dict"):
        model.load_and_process_state_dict(model.state_dict(), **settings)
    else:
        model.process_weights(**settings)
    return model


def save_model(path: Path, architecture: str = "gpt2", *, seed: int = 1, **changes: Any) -> Path:
    """A small random model in Hugging Face format."""
    tokenizer = make_tokenizer()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    settings = {"vocab_size": len(tokenizer), **ids, **ARCHITECTURES[architecture], **changes}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(architecture, **settings))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load_small(path: Path, *arguments: Any, **changes: Any) -> Any:
    """A small random model as the default class."""
    return load_model(str(save_model(path, *arguments, **changes)), kind=available_kinds()[0])


@pytest.fixture(scope="module")
def demo_models() -> dict[str, Any]:
    """The embedded model as each available class."""
    return {kind: tll.load_demo_model(kind) for kind in available_kinds()}


@pytest.fixture(scope="module")
def demo_known(demo_models: dict[str, Any]) -> dict[str, Known]:
    """What banks of many hook names would keep of it."""
    return {kind: know(model, [*RESIDUAL, *HEADS, *OTHERS]) for kind, model in demo_models.items()}


# The right model


def test_fingerprint_is_the_cache_of_each_prompt(demo_models: dict[str, Any]) -> None:
    names = ["blocks.2.hook_resid_post", "blocks.4.hook_resid_mid"]
    for model in demo_models.values():
        prompts = [model.to_tokens(text)[0].tolist() for text in TEXTS[:2]]
        known = fingerprint(model, prompts, names)
        for name in names:
            caches = [model.run_with_cache(torch.tensor([prompt]))[1][name][0] for prompt in prompts]
            np.testing.assert_allclose(known.activations[name], torch.cat(caches).detach().numpy(), atol=1e-4)
        check_fingerprint(model, known, describe_model(model))


def test_every_class_is_accepted_by_the_bank_of_every_class(
    demo_models: dict[str, Any], demo_known: dict[str, Known], index: tll.ContextualIndex
) -> None:
    for model in demo_models.values():
        index.check_model(model, force=True)
        for known in demo_known.values():
            check(model, known)
            assert furthest(known, model) < TOLERANCES["float32"] / 100


@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_the_batch_size_of_a_bank_does_not_matter(any_model: Any, tmp_path: Path, batch_tokens: int) -> None:
    bank = tll.build_bank(
        any_model, TEXTS, tmp_path / "a.h5", hook_names=RESIDUAL[0], batch_tokens=batch_tokens, progress=False
    )
    tll.ContextualIndex(bank, device="cpu").check_model(any_model)


def test_a_padded_batch_agrees_with_each_prompt_alone(demo_models: dict[str, Any]) -> None:
    """What a reader runs is a batch, the fingerprint is prompts alone: the tolerance must cover the difference."""
    for model in demo_models.values():
        alone = know(model).fingerprint
        shape = len(alone.prompts), max(map(len, alone.prompts))
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for b, prompt in enumerate(alone.prompts):
            tokens[b, : len(prompt)], mask[b, : len(prompt)] = torch.tensor(prompt), 1
        seen: dict[str, np.ndarray] = {}

        def keep(activation: torch.Tensor, hook: Any, name: str, seen: dict = seen, mask: torch.Tensor = mask) -> None:
            seen[name] = activation[mask.bool()].detach().numpy()

        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(name, partial(keep, name=name)) for name in RESIDUAL])
        assert all(alone.agrees(Fingerprint(alone.prompts, seen), name, "float32") for name in RESIDUAL)


@pytest.mark.parametrize("kind", available_kinds())
def test_processing_that_changes_no_activation_is_accepted(demo_known: dict[str, Known], kind: str) -> None:
    check(process(tll.load_demo_model(kind), fold_ln=True, center_unembed=True), demo_known[kind])


@pytest.mark.skipif("hooked" not in available_kinds(), reason="a bridge runs ln1 once")
def test_a_hook_that_fires_for_query_key_and_value(demo_models: dict[str, Any]) -> None:
    known = know(demo_models["hooked"], ["blocks.1.ln1.hook_normalized"])
    for model in demo_models.values():
        check(model, known)


# Other weights


@pytest.mark.parametrize("kind", available_kinds())
def test_other_weights_under_the_same_name(bank: tll.Bank, kind: str) -> None:
    model = tll.load_demo_model(kind)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.5 * weight.std() * torch.randn_like(weight)
    with pytest.raises(tll.ModelMismatchError) as refused:
        tll.ContextualIndex(bank, device="cpu").check_model(model)
    one, other = (
        f"demo_model ({name}, 6 layers, d_model 256, float32)" for name in (bank.model_info.class_name, type(model).__name__)
    )
    assert str(refused.value) == (
        f"the bank is of {one}, the model is {other}, and their activations differ at "
        "blocks.0.hook_resid_post, blocks.1.hook_resid_post, blocks.2.hook_resid_post …: its weights are others under the same "
        f"name (a fine-tune, another revision or another checkpoint){OTHER_WEIGHTS}"
    )


def test_other_weights_under_another_name(tmp_path: Path) -> None:
    name = "blocks.2.hook_resid_post"
    one, other = (load_small(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("other", 2)))
    message = refusal(other, know(one, [name]))
    assert message.startswith("the bank is of one (")
    assert ", the model is other (" in message
    assert message.endswith(f"their activations differ at {name}: its weights are others{OTHER_WEIGHTS}")


@pytest.mark.parametrize(
    ("optimizer", "rate"), [(torch.optim.SGD, 1e-3), (torch.optim.AdamW, 1e-5), (torch.optim.AdamW, 1e-4)], ids=str
)
def test_one_step_of_fine_tuning_is_noticed(any_model: Any, optimizer: Any, rate: float) -> None:
    known, model = know(any_model), tll.load_demo_model()
    check(model, known)
    fine_tune(model, optimizer(model.parameters(), rate), TEXTS[4:])  # not the texts of the fingerprint
    assert "its weights are others under the same name (a fine-tune, " in refusal(model, known)


def test_a_fine_tune_is_noticed_from_half_a_percent_on() -> None:
    """Of the activation that changed most; what changes less is let through."""
    model = tll.load_demo_model()
    known, optimizer = know(model), torch.optim.AdamW(model.parameters(), 1e-6)
    noticed = []
    for _ in range(3):
        fine_tune(model, optimizer, TEXTS[:2])
        change = furthest(known, model)
        assert abs(change - 5e-3) > 1e-4, "too near to tell"
        noticed.append(change > 5e-3)
        if noticed[-1]:
            assert "a fine-tune" in refusal(model, known)
        else:
            check(model, known)
    assert noticed == [False, False, True]


def fine_tune(model: Any, optimizer: torch.optim.Optimizer, texts: list[str]) -> None:
    """One step of language modeling."""
    optimizer.zero_grad()
    model(model.to_tokens(texts), return_type="loss").backward()
    optimizer.step()


def test_fingerprint_is_not_blinded_by_one_massive_activation() -> None:
    """Real models have activations at BOS a hundred times larger than elsewhere; the other tokens must still be compared."""
    kind = available_kinds()[0]
    model = tll.load_demo_model(kind)
    with torch.no_grad():
        model.W_E[model.tokenizer.bos_token_id, 3] += 3000.0
    name = "blocks.1.hook_resid_post"
    known = fingerprint(model, [model.to_tokens(TEXTS[0])[0].tolist()], [name])
    assert np.abs(known.activations[name][0]).max() > 1000
    check_fingerprint(model, known, describe_model(model))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.shape[0] != model.cfg.d_vocab:
                weight += weight.std() * torch.randn_like(weight)
    other = fingerprint(model, known.prompts, [name])
    a, b = known.activations[name][1:], other.activations[name][1:]
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosines.max() < 0.95  # the activations of every token but BOS have changed
    with pytest.raises(tll.ModelMismatchError, match="activations differ"):
        check_fingerprint(model, known, describe_model(model))


# Another tokenizer, other sizes


@pytest.mark.parametrize("kind", available_kinds())
def test_another_tokenizer_with_the_same_weights(demo_known: dict[str, Known], tmp_path: Path, kind: str) -> None:
    """Two tokens have changed places: every size is the same, and texts would be read as other texts."""
    for file in DEMO_MODEL.glob("*token*"):
        shutil.copy(file, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġriver"], vocabulary["Ġbank"] = vocabulary["Ġbank"], vocabulary["Ġriver"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    model = tll.load_demo_model(kind)
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    message = refusal(model, demo_known[kind])
    assert message.startswith("another tokenizer: the bank is of demo_model (")
    assert "the model is demo_model (" in message
    ours, theirs = describe_model(model).tokenizer[:8], demo_known[kind].info.tokenizer[:8]
    assert message.endswith(
        f"and their vocabularies differ (sha256 {theirs}… against {ours}…); load the model with its own tokenizer, or rebuild "
        "the bank"
    )


@pytest.mark.parametrize("kind", available_kinds())
def test_a_model_without_tokenizer_is_known_by_its_weights(demo_known: dict[str, Known], kind: str) -> None:
    model = tll.load_demo_model(kind)
    model.tokenizer = None
    check(model, demo_known[kind])
    with torch.no_grad():
        model.W_E.mul_(1.1)
    assert "its weights are others" in refusal(model, demo_known[kind])


def test_a_bank_made_without_tokenizer_is_known_by_its_weights() -> None:
    """From tokens of one's own: the tokenizer that the model has when it reads cannot be another one."""
    model = tll.load_demo_model()
    known, tokenizer = know(model), model.tokenizer
    model.tokenizer = None
    known = replace(known, info=describe_model(model))
    model.tokenizer = tokenizer
    check(model, known)
    with torch.no_grad():
        model.W_E.mul_(1.1)
    assert "its weights are others" in refusal(model, known)


@pytest.mark.parametrize("changes", [{"n_embd": 16}, {"n_layer": 2}], ids=["d_model", "n_layers"])
def test_a_model_of_another_size(tmp_path: Path, changes: dict[str, int]) -> None:
    whole, less = load_small(tmp_path / "whole"), load_small(tmp_path / "less", **changes)
    message = refusal(less, know(whole, ["blocks.1.hook_resid_post"]))
    assert message.startswith("another model: the bank is of whole (")
    for model in (whole, less):
        assert f", {model.cfg.n_layers} layers, d_model {model.cfg.d_model}, float32)" in message
    assert message.endswith(OTHER_WEIGHTS)


@pytest.mark.parametrize(
    ("name", "changes", "dtype"),
    [
        ("blocks.0.attn.hook_v", {"num_key_value_heads": 2}, torch.float32),
        ("blocks.0.mlp.hook_post", {"intermediate_size": 48}, torch.bfloat16),
    ],
)
def test_activations_of_another_width(tmp_path: Path, name: str, changes: dict[str, int], dtype: torch.dtype) -> None:
    """As many layers and as wide a residual stream, but fewer key-value heads or a narrower MLP."""
    settings = {"num_key_value_heads": 4}
    known = know(load_small(tmp_path / "one", "llama", **settings), [name])
    message = refusal(load_small(tmp_path / "two", "llama", **{**settings, **changes}).to(dtype), known)
    assert message.startswith("another model: the bank is of one (")
    assert name in message
    assert message.endswith(OTHER_WEIGHTS)


def test_a_vocabulary_too_small_for_the_bank(tmp_path: Path) -> None:
    """Without a tokenizer to compare, its ids would be looked up where there is no embedding."""
    full, few = load_small(tmp_path / "full"), load_small(tmp_path / "few", vocab_size=100)
    few.tokenizer = None
    message = refusal(few, know(full, ["blocks.1.hook_resid_post"]))
    assert "the bank is of full (" in message
    assert message.endswith(OTHER_WEIGHTS)


def test_a_model_that_lacks_a_hook(demo_models: dict[str, Any], demo_known: dict[str, Known]) -> None:
    for kind, model in demo_models.items():
        known = demo_known[kind].of(RESIDUAL)
        known.fingerprint.activations["blocks.0.hook_nowhere"] = known.fingerprint.activations[RESIDUAL[0]]
        message = refusal(model, known)
        assert message.startswith("the bank is of demo_model (")
        assert ", the model is demo_model (" in message
        assert ", and the model lacks an activation of the bank: " in message
        assert "blocks.0.hook_nowhere" in message


@pytest.mark.parametrize("kind", available_kinds())
def test_a_hook_that_is_switched_off(kind: str) -> None:
    name = "blocks.0.attn.hook_result"
    model = tll.load_demo_model(kind)
    model.set_use_attn_result(True)
    known = know(model, [name])
    check(model, known)
    model.set_use_attn_result(False)
    message = refusal(model, known)
    assert "the model lacks an activation of the bank: " in message
    assert name in message
    assert "set_use_" in message


# Weights processed otherwise


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


# Other dtypes


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


# Overflow at BOS


def overflowing(model: Any) -> Any:
    """The model with inf at BOS of its last activation, as float16 models have."""

    def overflow(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([torch.full_like(activation[:, :1], torch.inf), activation[:, 1:]], 1)

    model.add_hook(RESIDUAL[-1], overflow)
    return model


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


# Reading all the same


@pytest.fixture(scope="module")
def other_bank(tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    """A bank of the embedded model with another embedding."""
    model = tll.load_demo_model()
    with torch.no_grad():
        model.W_E.mul_(1.5)
    return tll.build_bank(model, TEXTS, tmp_path_factory.mktemp("other") / "a.h5", hook_names=RESIDUAL, progress=False)


def test_a_result_is_refused_and_read_when_allowed(demo_model: Any, other_bank: tll.Bank) -> None:
    text = "The river bank"
    strict = tll.latentlens_hooks(tll.ContextualIndex(other_bank, device="cpu"))
    demo_model.run_with_hooks(text, fwd_hooks=strict)
    for _ in range(2):  # every time, not only the first
        with pytest.raises(tll.ModelMismatchError, match=r"the bank is of demo_model .* its weights are others") as refused:
            _ = strict.result
    lax = tll.latentlens_hooks(tll.ContextualIndex(other_bank, device="cpu", allow_mismatch=True))
    demo_model.run_with_hooks(text, fwd_hooks=lax)
    with pytest.warns(UserWarning, match="the bank is of demo_model") as warned:
        result = lax.result
    assert [str(w.message) for w in warned] == [str(refused.value)]
    assert len(result.cell(RESIDUAL[0], -1).neighbors) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lax.result is result  # once is enough


def test_the_command_reads_when_allowed(other_bank: tll.Bank) -> None:
    command = ["decode", str(other_bank.path), "The river bank", "--word", "bank"]
    refused = CliRunner().invoke(cli.app, command)
    assert isinstance(refused.exception, tll.ModelMismatchError)
    with pytest.warns(UserWarning, match="the bank is of demo_model") as warned:
        allowed = CliRunner().invoke(cli.app, [*command, "--allow-mismatch"])
    assert [str(w.message) for w in warned] == [str(refused.exception)]
    assert allowed.exit_code == 0
    assert "The river «bank»" in allowed.output
