"""Threads that share a model: what another thread ran is never shown, and lost activations are an error."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock, Thread, get_ident
from typing import Any

import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll


@pytest.fixture
def hooks(index: tll.ContextualIndex) -> Any:
    return tll.latentlens_hooks(index, top_k=1, logit_lens=False)


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a thread that then ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def text_of(result: tll.LensResult) -> str:
    assert result.tokens is not None
    return "".join(result.tokens[0][1:])


def test_made_here_run_there_read_here(any_model: Any, hooks: Any) -> None:
    """As a server does, or `generate` in a thread that streams its tokens."""
    for text in TEXTS[:2]:
        in_thread(lambda text=text: any_model.run_with_hooks(text, fwd_hooks=hooks))
        assert text_of(hooks.result) == text
        assert hooks.result.hook_names == tuple(hooks.hook_names)


def test_made_there_run_and_read_there(any_model: Any, index: tll.ContextualIndex) -> None:
    def work(text: str) -> str:
        hooks = tll.latentlens_hooks(index, top_k=1)
        with lock:
            any_model.run_with_hooks(text, fwd_hooks=hooks)
            return text_of(hooks.result)

    lock = Lock()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, TEXTS * 2)) == TEXTS * 2


def test_a_run_of_another_thread_is_left_out(any_model: Any, hooks: Any) -> None:
    with any_model.hooks(fwd_hooks=hooks):
        any_model(TEXTS[0])
        in_thread(lambda: any_model(TEXTS[1]))
        assert text_of(hooks.result) == TEXTS[0]
        any_model(TEXTS[2])
        assert text_of(hooks.result) == TEXTS[2]


def test_a_run_of_another_thread_between_two_layers_is_left_out(any_model: Any, hooks: Any) -> None:
    """The other thread runs the whole model while this one is at layer 2."""
    here = get_ident()

    def interrupt(activation: torch.Tensor, hook: Any) -> None:
        if get_ident() == here:
            in_thread(lambda: any_model(TEXTS[1]))

    any_model.run_with_hooks(TEXTS[0], fwd_hooks=[*hooks, ("blocks.2.hook_resid_post", interrupt)])
    assert text_of(hooks.result) == TEXTS[0]
    assert hooks.result.hook_names == tuple(hooks.hook_names)
    hooks.clear()
    with pytest.raises(tll.InvalidInputError, match="nothing was captured"):
        _ = hooks.result


def test_two_other_threads_are_an_error_until_cleared(any_model: Any, hooks: Any) -> None:
    with ThreadPoolExecutor(2) as pool, any_model.hooks(fwd_hooks=hooks):
        both_run = Barrier(2)

        def work(text: str) -> None:
            both_run.wait(timeout=60)  # so that each of the two threads takes one text
            with lock:
                any_model(text)

        lock = Lock()
        list(pool.map(work, TEXTS[:2]))
        with pytest.raises(tll.InvalidInputError, match="2 other threads ran the model with these hooks on it"):
            _ = hooks.result
        hooks.clear()
        pool.submit(any_model, TEXTS[2]).result()
        assert text_of(hooks.result) == TEXTS[2]


def test_hooks_that_another_thread_took_off_are_an_error(any_model: Any, index: tll.ContextualIndex, hooks: Any) -> None:
    """Leaving `hooks` or `run_with_hooks`, TransformerLens takes off the hooks that other threads added since."""
    others = tll.latentlens_hooks(index, top_k=1, logit_lens=False)
    is_running, may_end = Barrier(2), Barrier(2)

    def work() -> None:
        any_model.run_with_hooks(TEXTS[1], fwd_hooks=others)
        is_running.wait(timeout=60)
        may_end.wait(timeout=60)

    def take_off(activation: torch.Tensor, hook: Any) -> None:
        any_model.reset_hooks()

    other = Thread(target=work)
    other.start()
    is_running.wait(timeout=60)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=[*hooks, ("blocks.2.hook_resid_post", take_off)])
    with pytest.raises(tll.InvalidInputError, match=r"other threads ran this model with hooks on it.*a lock"):
        _ = hooks.result
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks, stop_at_layer=2, return_type=None)
    assert hooks.result.hook_names == tuple(hooks.hook_names[:2]), "a run that was to stop lost nothing"
    may_end.wait(timeout=60)
    other.join()


def test_many_threads_show_their_own_text_or_an_error(any_model: Any, index: tll.ContextualIndex) -> None:
    index.check_model(any_model)
    shown: list[tuple[str, str]] = []
    foreign: list[BaseException] = []

    def work(text: str) -> None:
        for _ in range(5):
            hooks = tll.latentlens_hooks(index, top_k=1, logit_lens=False)
            try:
                any_model.run_with_hooks(text, fwd_hooks=hooks)
            except Exception:  # TransformerLens' own lists of hooks are not made for threads
                continue
            try:
                result = hooks.result
                shown.append((text, text_of(result)))
                assert result.hook_names == tuple(hooks.hook_names)
            except tll.LatentLensError:
                pass
            except Exception as error:
                foreign.append(error)

    threads = [Thread(target=work, args=(text,)) for text in TEXTS[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    any_model.reset_hooks()
    assert [pair for pair in shown if pair[0] != pair[1]] == []
    assert not foreign
