"""Every kind of hook: banked and read again on every architecture, heads one by one, outputs of heads, and what never fires."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS, available_kinds, load_any
from support.vectors import unit

import tl_latentlens as tll
from tl_latentlens.lens.lenses import logit_lens
from tl_latentlens.model.loading import DEMO_MODEL

BLOCK = "blocks.1."
HEADS = [f"{BLOCK}attn.hook_{part}" for part in "zqkv"]
NAMES = [
    *(f"{BLOCK}hook_{part}" for part in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")),
    *HEADS,
    f"{BLOCK}mlp.hook_pre",
    f"{BLOCK}mlp.hook_post",
    "ln_final.hook_normalized",
]
TEXT = TEXTS[1]
NEIGHBORS_ALONE: dict[str, Any] = {"calibrate": False, "words": 0}


@pytest.fixture(scope="module")
def filled(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, tll.Bank]]:
    """A small model of one architecture as each available class, and a bank of all its kinds of activations."""
    made = {}
    for kind in available_kinds():
        model = load_any(model_folder, kind)
        path = tmp_path_factory.mktemp("any") / f"{kind}.h5"
        made[kind] = model, tll.build_bank(model, TEXTS, path, hook_names=NAMES, dtype="float32", progress=False)
    return made


def activations(model: Any, text: str, name: str) -> np.ndarray:
    """[pos, ...] in float64, BOS left out where the tokenizer has the model start with it."""
    start = int(model.to_tokens(text)[0, 0] == model.tokenizer.bos_token_id)
    return model.run_with_cache(text)[1][name][0, start:].detach().double().numpy()


def check_found(found: Any, queries: np.ndarray, rows: np.ndarray, k: int = 5) -> None:
    """Against a brute force over rows that are brought to unit length."""
    scores = unit(queries) @ unit(rows).T
    best = -np.sort(-scores, axis=-1)[:, :k]
    np.testing.assert_allclose(found.similarities, best, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(scores, found.rows.numpy(), -1), best, atol=2e-6)


# Every kind of hook


def test_the_nearest_neighbor_of_a_banked_token_is_its_own_row(filled: dict[str, tuple[Any, tll.Bank]]) -> None:
    for model, bank in filled.values():
        index = tll.ContextualIndex(bank, device="cpu")
        own = {(row.prompt_index, row.position): row.row for row in map(bank.row, range(bank.n_rows))}
        hooks = tll.latentlens_hooks(index, top_k=1, **NEIGHBORS_ALONE)
        seen = set()
        for prompt, text in enumerate(TEXTS):
            model.run_with_hooks(text, fwd_hooks=hooks)
            for name in NAMES:
                for cell, (_, pos) in enumerate(hooks.result.positions.tolist()):
                    if (prompt, pos) in own:
                        found = hooks.result.found[name]
                        nearest = found.rows[cell, 0].item(), index.hook_names[found.hook_ids[cell, 0]]
                        assert nearest == (own[prompt, pos], name)
                        assert found.similarities[cell, 0] > 1 - 1e-5
                        seen.add((prompt, pos))
        assert seen == set(own)


def test_head_counts(filled: dict[str, tuple[Any, tll.Bank]]) -> None:
    for model, bank in filled.values():
        few = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
        heads = [model.cfg.n_heads] * 2 + [few] * 2
        assert [bank.n_heads(name) for name in HEADS] == heads
        assert {bank.n_heads(name) for name in NAMES if name not in HEADS} == {1}
        assert [bank.d(f"{name}[1]") for name in HEADS] == [model.cfg.d_head] * 4
        assert bank.d(HEADS[2]) == few * model.cfg.d_head


# Heads, one by one


@pytest.mark.parametrize("transform", ["raw", "center", "standardize", "remove_top"])
def test_heads_are_read_among_their_own_rows(filled: dict[str, tuple[Any, tll.Bank]], transform: str) -> None:
    for model, bank in filled.values():
        index = tll.ContextualIndex(bank, [f"{name}[:]" for name in HEADS], device="cpu", transform=transform)
        hooks = tll.latentlens_hooks(index, **NEIGHBORS_ALONE)
        assert {name for name, _ in hooks} == set(HEADS)
        for text in (TEXTS[0], TEXT):
            model.run_with_hooks(text, fwd_hooks=hooks)
        assert set(hooks.result.hook_names) == set(index.hook_names)
        assert not hooks.result.logit_lens
        for name in HEADS:
            queries = activations(model, TEXT, name)
            rows = bank.vectors(name).astype(np.float64).reshape(bank.n_rows, -1, model.cfg.d_head)
            assert queries.shape[1:] == rows.shape[1:]
            for head in range(rows.shape[1]):
                units, asked = unit(rows[:, head]), unit(queries[:, head])
                mean, std = units.mean(0), units.std(0)
                np.testing.assert_allclose(bank.mean(f"{name}[{head}]"), mean, atol=1e-12)
                np.testing.assert_allclose(bank.std(f"{name}[{head}]"), std, atol=1e-9)
                if transform != "raw":
                    units, asked = units - mean, asked - mean
                if transform == "standardize":
                    units, asked = units / std, asked / std
                if transform == "remove_top":
                    top = np.linalg.svd(units)[2][:1]
                    units, asked = units - units @ top.T @ top, asked - asked @ top.T @ top
                found = hooks.result.found[f"{name}[{head}]"]
                assert {index.hook_names[i] for i in found.hook_ids.flatten().tolist()} == {f"{name}[{head}]"}
                check_found(found, asked, units)


def test_one_head(filled: dict[str, tuple[Any, tll.Bank]]) -> None:
    name = f"{BLOCK}attn.hook_v[1]"
    for model, bank in filled.values():
        index = tll.ContextualIndex(bank, name, device="cpu")
        assert (index.hook_names, index.d(name)) == ((name,), model.cfg.d_head)
        hooks = tll.latentlens_hooks(index)
        assert repr(hooks) == f"LensHooks(['{name}'])"
        model.run_with_hooks(TEXT, fwd_hooks=hooks)
        d_head = model.cfg.d_head
        check_found(
            hooks.result.found[name],
            activations(model, TEXT, name[:-3])[:, 1],
            bank.vectors(name[:-3])[:, d_head : 2 * d_head].astype(np.float64),
        )
        neighbor = hooks.result.cell(name, -1).neighbors[0]
        assert neighbor.hook_name == name


def test_a_search_over_several_heads_asks_which(filled: dict[str, tuple[Any, tll.Bank]]) -> None:
    _, bank = next(iter(filled.values()))
    z = f"{BLOCK}attn.hook_z"
    index = tll.ContextualIndex(bank, [f"{z}[:]", f"{BLOCK}hook_resid_post"], device="cpu")
    vectors = torch.randn(3, index.d(f"{z}[0]"), generator=torch.Generator().manual_seed(0))
    with pytest.raises(tll.InvalidInputError, match=re.escape(f"query_hook_name='{z}[0]'") + r".*hook_names="):
        index.search(vectors)
    with pytest.raises(tll.InvalidInputError, match=r"got vectors of blocks.0.attn.hook_z"):
        index.search(vectors, query_hook_name="blocks.0.attn.hook_z[1]")
    with pytest.raises(tll.InvalidInputError, match=rf"got vectors of {re.escape(z)}\[1\] for an index of {re.escape(z)}\[0\]"):
        tll.ContextualIndex(bank, f"{z}[0]", device="cpu").search(vectors, query_hook_name=f"{z}[1]")
    named = index.search(vectors, hook_names=f"{z}[2]")
    as_head = index.search(vectors, query_hook_name=f"{z}[2]")
    assert torch.equal(named.rows, as_head.rows)
    assert set(named.hook_ids.flatten().tolist()) == set(as_head.hook_ids.flatten().tolist()) == {2}
    together = index.search(vectors, top_k=index.n_rows, hook_names=f"{z}[:]")
    assert set(together.hook_ids.flatten().tolist()) == set(range(bank.n_heads(z)))
    assert index.search(torch.randn(2, index.d(f"{BLOCK}hook_resid_post"))).rows.shape == (2, 5)


def test_heads_that_are_not_there(filled: dict[str, tuple[Any, tll.Bank]], tmp_path: Path) -> None:
    model, bank = next(iter(filled.values()))
    z, post = f"{BLOCK}attn.hook_z", f"{BLOCK}hook_resid_post"
    with pytest.raises(tll.UnknownHookError, match=rf"'{z}' has heads 0 to 3 in the bank .*, got '{re.escape(z)}\[4\]'"):
        tll.ContextualIndex(bank, f"{z}[4]")
    with pytest.raises(tll.UnknownHookError, match=rf"knows no heads of '{post}'.*; use '{post}', or rebuild the bank"):
        tll.ContextualIndex(bank, f"{post}[0]")
    with pytest.raises(tll.UnknownHookError, match=r"the index has no hook name 'blocks.0.attn.hook_z'"):
        tll.ContextualIndex(bank, "blocks.0.attn.hook_z[:]")
    index = tll.ContextualIndex(bank, f"{z}[0]", device="cpu")
    with pytest.raises(tll.UnknownHookError, match=r"does not hold 'blocks.1.attn.hook_z\[1\]', and a head has a space of its"):
        tll.latentlens_hooks(index, f"{z}[1]", model=model)
    with pytest.raises(tll.InvalidInputError, match=rf"bank '{z}', and choose heads when it is loaded"):
        tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names=f"{z}[1]", progress=False)
    with pytest.raises(tll.InvalidInputError, match=r"expected \[batch, pos, head, d_head\] with that head"):
        tll.LatentLensHook(index)(torch.zeros(1, 2, 4, 8), None, f"{z}[4]")


# The outputs of heads, in the residual stream


def test_outputs_of_heads_are_read_in_the_residual_bank(filled: dict[str, tuple[Any, tll.Bank]]) -> None:
    result = f"{BLOCK}attn.hook_result"
    for model, bank in filled.values():
        index = tll.ContextualIndex(bank, f"{BLOCK}hook_resid_post", device="cpu")
        some = tll.latentlens_hooks(index, [f"{result}[2]", f"{BLOCK}hook_resid_post", f"{result}[0]"])
        all_heads = tll.latentlens_hooks(index, [f"{result}[1]", f"{result}[:]"], model=model)
        for hooks in (some, all_heads):
            model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
            model.run_with_hooks(TEXT, fwd_hooks=hooks)
        assert set(some.result.hook_names) == {f"{result}[2]", f"{BLOCK}hook_resid_post", f"{result}[0]"}
        assert all_heads.result.hook_names == tuple(f"{result}[{head}]" for head in range(model.cfg.n_heads))
        weight = model.blocks[1].attn.W_O.detach().double().numpy()
        z = activations(model, TEXT, f"{BLOCK}attn.hook_z")
        rows = bank.vectors(f"{BLOCK}hook_resid_post").astype(np.float64)
        for head in range(model.cfg.n_heads):
            output = z[:, head] @ weight[head]
            check_found(all_heads.result.found[f"{result}[{head}]"], output, rows)
            lens = logit_lens(model, torch.from_numpy(output).float())
            np.testing.assert_allclose(all_heads.result.logit_lens[f"{result}[{head}]"].scores, lens.scores, atol=1e-5)
        check_found(some.result.found[f"{result}[2]"], z[:, 2] @ weight[2], rows)


@pytest.mark.parametrize("kind", available_kinds())
def test_outputs_of_heads_are_hook_result(kind: str, index: tll.ContextualIndex) -> None:
    model = tll.load_demo_model(kind)
    model.set_use_attn_result(True)
    name = "blocks.3.attn.hook_result"
    hooks = tll.latentlens_hooks(index, f"{name}[:]")
    fired = []
    model.run_with_hooks(TEXT, fwd_hooks=[*hooks, (name, lambda activation, hook: fired.append(activation.detach()))])
    for head in range(model.cfg.n_heads):
        found = index.search(fired[0][0, 1:, head], distinct=True)
        torch.testing.assert_close(hooks.result.found[f"{name}[{head}]"].similarities, found.similarities, atol=1e-5, rtol=0)


def test_generated_tokens_join_their_prompt(demo_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, "blocks.3.attn.hook_result[:]")
    with demo_model.hooks(fwd_hooks=hooks):
        demo_model.generate(TEXT, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert len(hooks.result.hook_names) == demo_model.cfg.n_heads
    assert hooks.result.decoded.shape == (1, demo_model.to_tokens(TEXT).shape[1] + 2)


# What never fires


@pytest.mark.parametrize("kind", available_kinds())
def test_switched_off_hooks_are_named(kind: str, index: tll.ContextualIndex, tmp_path: Path) -> None:
    model = tll.load_demo_model(kind)
    for name, flag in {
        "attn.hook_result": "attn_result",
        "hook_mlp_in": "hook_mlp_in",
        "hook_q_input": "split_qkv_input",
    }.items():
        message = rf"'blocks.1.{name}' never fires on this {type(model).__name__} as it is set: model.set_use_{flag}\(True\)"
        with pytest.raises(tll.InvalidInputError, match=message):
            tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names=f"blocks.1.{name}", progress=False)
    with pytest.raises(
        tll.InvalidInputError, match=r"; or use blocks.1.attn.hook_z, from which .* blocks.1.attn.hook_result\[head\]"
    ):
        tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names="blocks.1.attn.hook_result", progress=False)
    hooks = tll.latentlens_hooks(index, [index.hook_names[0], "blocks.1.hook_mlp_in"], model=model)

    def run() -> None:
        model.run_with_hooks(TEXT, fwd_hooks=hooks)
        _ = hooks.result

    with pytest.raises((tll.InvalidInputError, ValueError, AssertionError), match="use_hook_mlp_in"):
        run()


def test_a_hook_point_that_the_model_does_not_use(filled: dict[str, tuple[Any, tll.Bank]], tmp_path: Path) -> None:
    for model, bank in filled.values():
        if "hook_pos_embed" not in model.hook_dict or "rotary_emb.hook_in" not in model.hook_dict:
            continue
        with pytest.raises(
            tll.InvalidInputError, match=r"\['hook_pos_embed'\] did not fire .* does not use them; leave them out"
        ):
            tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names="hook_pos_embed", progress=False)
        hooks = tll.latentlens_hooks(tll.ContextualIndex(bank), ["hook_pos_embed", f"{BLOCK}hook_resid_post"], model=model)
        model.run_with_hooks(TEXT, fwd_hooks=hooks)
        with pytest.warns(UserWarning, match=r"\['hook_pos_embed'\] did not fire in this run, though later hooks did"):
            assert hooks.result.hook_names == (f"{BLOCK}hook_resid_post",)
        assert hooks.result.hook_names == (f"{BLOCK}hook_resid_post",)


def test_hooks_behind_the_end_of_a_run_are_left_out(demo_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index)
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks, stop_at_layer=3)
    assert hooks.result.hook_names == tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))


def test_an_unknown_hook_name_is_named_after_the_run(demo_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, [index.hook_names[0], "blocks.9.attn.hook_result[0]"])

    def run() -> None:
        demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
        _ = hooks.result

    with pytest.raises(KeyError, match=r"blocks.9.attn.hook_z"):
        run()


# SAEs that are attached


def with_sae(kind: str, name: str, error_term: bool) -> Any:
    """The embedded model with an SAE attached."""
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    demo = tll.load_demo_model("hooked")
    if kind == "hooked":
        model = sae_lens.HookedSAETransformer(demo.cfg, demo.tokenizer)
        model.load_state_dict(demo.state_dict())
        model.eval()
    else:
        model = sae_lens.SAETransformerBridge.boot_transformers(str(DEMO_MODEL)).eval()
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=name)
    torch.manual_seed(0)
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=256, d_sae=64, device="cpu", metadata=metadata))
    torch.nn.init.normal_(sae.W_dec)
    model.add_sae(sae, use_error_term=error_term)
    return model


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_models_with_an_sae(kind: str, error_term: bool, index: tll.ContextualIndex, tmp_path: Path) -> None:
    plain = "blocks.3.hook_resid_post"
    model = with_sae(kind, plain, error_term)
    name = f"{plain if kind == 'hooked' else 'blocks.3.hook_out'}.hook_sae_input"
    with pytest.raises(tll.UnknownHookError, match=rf"no hook name '{plain}' while an SAE is attached there: use '{name}'"):
        tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names=plain, progress=False)
    names = [name, name.replace("input", "recons"), name.replace("input", "output")]
    own = tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names=names, progress=False)
    for searched, least in ((tll.ContextualIndex(own, device="cpu"), 1 - 1e-4), (index, 1 - 1e-4)):
        hooks = tll.latentlens_hooks(searched, name, model=model)
        model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
        found = hooks.result.cell(name, -1)
        assert found.neighbors[0].similarity > least
        assert found.neighbors[0].hook_name == (name if searched is not index else plain)
        assert found.logit_lens
    hooks = tll.latentlens_hooks(index, name.replace("input", "error"), model=model)
    if error_term:
        model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
        assert hooks.result.logit_lens
    if kind == "hooked":  # a bridge's hook point stays silent once an SAE was there
        model.reset_saes()
        index.check_model(model, force=True)


def test_a_bank_of_what_an_sae_changes_is_refused(any_model: Any, tmp_path: Path) -> None:
    model = with_sae("hooked", "blocks.3.hook_resid_post", False)
    bank = tll.build_bank(any_model, TEXTS, tmp_path / "bank.h5", hook_names="blocks.5.hook_resid_post", progress=False)
    with pytest.raises(tll.ModelMismatchError, match=r"SAEs are attached from layer 3 on, .* without \(model.reset_saes"):
        tll.ContextualIndex(bank).check_model(model)


def test_another_model_with_an_sae_is_refused(index: tll.ContextualIndex) -> None:
    model = with_sae("hooked", "blocks.3.hook_resid_post", False)
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(1.5)
    with pytest.raises(tll.ModelMismatchError, match=r"differ at blocks.1.hook_resid_post"):
        index.check_model(model)
