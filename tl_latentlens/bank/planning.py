"""The plan of a bank: texts for a model, or a plan that was made before."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan
from tl_latentlens.corpus.plan_file import PlanOrigin, is_plan_path, load_plan
from tl_latentlens.corpus.texts import load_corpus
from tl_latentlens.errors import InvalidInputError, ModelMismatchError
from tl_latentlens.model.describe import describe_model
from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.hook_names import expand_hook_names
from tl_latentlens.model.tokenize import tokenize


def plan_corpus(
    model: Any,
    texts: Any,
    *,
    hook_names: int | str | Iterable[int | str] | Callable[[str], bool] | None = None,
    max_rows_per_token: int | None = 50,
    seed: int = 0,
    repeat: bool = False,
    keep_special_tokens: bool = False,
) -> Plan:
    """Tokenise texts for a model and choose their rows; see `build_bank` for the arguments.

    Texts that begin alike share rows, unless later tokens change an activation that is banked. `hook_names` are those of the
    bank; None: any of the model's stacks counts.

    Raises:
        ModelMismatchError: A saved plan of another tokenizer, or for another context length.
        InvalidInputError: Settings that differ from those of a plan.
    """
    names = None if hook_names is None else expand_hook_names(model, hook_names)
    is_bidirectional_there = is_bidirectional(model, names)
    settings = PlanSettings(max_rows_per_token, seed, is_bidirectional_there, repeat, keep_special_tokens=keep_special_tokens)
    if isinstance(texts, Plan):
        return _checked(texts, settings)
    if is_plan_path(texts):
        plan, origin = load_plan(texts)
        _require_origin(model, origin, str(texts))
        return _checked(plan, settings)
    corpus: Iterable[str] = load_corpus(texts)
    return make_plan(tokenize(model, corpus, repeat=repeat, keep_special_tokens=keep_special_tokens), settings)


def origin_of(model: Any) -> PlanOrigin:
    """The model, as a plan remembers it."""
    info = describe_model(model)
    return PlanOrigin(info.name, info.tokenizer, info.n_ctx)


def cut_note(model: Any, n_truncated: int, n_texts: int, repeat: bool) -> str:
    """The note to users on texts that were too long for the model."""
    twice = ", read twice," * repeat
    return f"{n_truncated} of {n_texts} texts were longer than n_ctx = {model.cfg.n_ctx} tokens{twice} and were cut"


def plan_notes(model: Any, plan: Plan) -> Iterator[str]:
    """The notes to users on a plan: texts that were cut, and texts that begin with BOS themselves, as chat templates do."""
    if plan.n_truncated:
        yield cut_note(model, plan.n_truncated, plan.n_prompts, plan.settings.repeat)
    if plan.n_own_bos:
        yield (
            f"{plan.n_own_bos} of {plan.n_prompts} texts begin with their own BOS, so none is put before them; give the model "
            "such texts with prepend_bos=False"
        )


def _checked(plan: Plan, settings: PlanSettings) -> Plan:
    """A plan that was made before, if no setting of the call says otherwise."""
    if plan.settings.bidirectional != settings.bidirectional:
        kinds = ["causal", "bidirectional"]
        raise InvalidInputError(
            f"got a plan for a {kinds[plan.settings.bidirectional]} model, and one that is {kinds[settings.bidirectional]} at "
            "these hook names; plan the corpus for this model"
        )
    default = replace(PlanSettings(), bidirectional=settings.bidirectional)
    asked = {name: value for name, value in vars(settings).items() if value != getattr(default, name)}
    differing = {name: value for name, value in asked.items() if value != getattr(plan.settings, name)}
    if differing:
        planned = {name: getattr(plan.settings, name) for name in differing}
        raise InvalidInputError(f"got {differing} with a plan that has {planned}; leave them out, or plan again")
    return plan


def _require_origin(model: Any, origin: PlanOrigin, path: str) -> None:
    own = origin_of(model)
    if (own.tokenizer, own.n_ctx) != (origin.tokenizer, origin.n_ctx):
        differing = "tokenizers" if own.tokenizer != origin.tokenizer else f"context lengths, {origin.n_ctx} and {own.n_ctx}"
        raise ModelMismatchError(
            f"the plan {path} was made for {origin.model}, the model is {own.model}: they have different {differing}; plan the "
            "corpus for this model"
        )
