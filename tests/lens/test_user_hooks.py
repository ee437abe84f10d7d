"""The hooks that a user has on the model outlive a reading of the result."""

from typing import Any

import tl_latentlens as tll


def test_a_users_hooks_outlive_the_model_check(demo_model: Any, bank: tll.Bank) -> None:
    calls: list[int] = []
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"))

    def count(activation: Any, hook: Any) -> None:
        calls.append(1)

    with demo_model.hooks(fwd_hooks=[*hooks, ("blocks.2.hook_resid_post", count)]):
        demo_model("The river ran over its bank.")
        first = hooks.result
        assert len(calls) == 1, "replaying the fingerprint must not call the user's hooks"
        demo_model("She put the money in the bank.")
        assert len(calls) == 2
        assert hooks.result.tokens != first.tokens
    demo_model("Nothing is hooked any more.")
    assert len(calls) == 2
