"""The meaning of a word in its context as a direction, and the rows to compare it with.

`find_features`, `find_heads` and `find_neurons` look for the components that write this direction.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tl_latentlens.corpus.words import find_position
from tl_latentlens.directions.find.result import Meaning
from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.model.activations import activations_at
from tl_latentlens.model.describe import require_model
from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.token_strings import token_strings
from tl_latentlens.model.tokenize import tokenize
from tl_latentlens.search.ambient import own_arithmetic

N_NEIGHBORS = 5
MAX_STORED_ROWS = 1000  # Other uses of the token, and random rows, whose stored activations are compared.
MIN_USES = 6  # Fewer other uses of a token cannot be parted into similar and contrast uses.
_MAX_SIMILAR_USES = 10


@dataclass(frozen=True, eq=False)
class WordInContext:
    """A word in its context, the direction of its meaning there, and the rows to compare it with.

    Attributes:
        tokens: The token ids of the text up to the word, BOS included.
        token_strings: Their texts.
        is_special: True at tokens that are no text, such as BOS.
        hook_name: The activation that is read.
        activation: That activation at the word, [d].
        direction: m, [d], of length 1.
        strength: How much more of m the activation has than the mean of the rows it is compared with.
        usual: That mean, [d].
        similar_rows: Rows of the other uses of the token that are nearest to this one.
        similar_cosines: Their cosines to this use, both less the mean of the other uses.
        contrast_rows: Rows of the token's uses of another kind.
        has_contrast: True where m and `usual` come from the token's own uses; False where the bank has too few of them.
        random_rows: Rows of any token.
    """

    tokens: list[int]
    token_strings: list[str]
    is_special: Bool[np.ndarray, " pos"]
    hook_name: str
    activation: Float[Tensor, " d"]
    direction: Float[Tensor, " d"]
    strength: float
    usual: Float[Tensor, " d"]
    similar_rows: Int[np.ndarray, " similar"]
    similar_cosines: Float[np.ndarray, " similar"]
    contrast_rows: Int[np.ndarray, " contrast"]
    has_contrast: bool
    random_rows: Int[np.ndarray, " random"]

    def meaning(self, index: ContextualIndex) -> Meaning:
        """The word and its meaning, as the result of a search for components has them."""
        return Meaning(
            self.token_strings,
            self.hook_name,
            self.direction.numpy(),
            self.strength,
            self.similar_rows,
            self.similar_cosines,
            len(self.contrast_rows),
            self.has_contrast,
            index.for_directions.search(self.direction, N_NEIGHBORS, self.hook_name),
            self.is_special,
        )


@dataclass(frozen=True, eq=False)
class _Uses:
    """Other uses of the token, parted; places among all of them.

    Attributes:
        similar: The uses nearest to the word's own, nearest first.
        cosines: Their cosines to it, both less the mean of all uses.
        contrast: The uses of another kind, nearest first.
    """

    similar: Int[Tensor, " similar"]
    cosines: Float[Tensor, " similar"]
    contrast: Int[Tensor, " contrast"]


def locate_word(
    text: str, at: int | str, index: ContextualIndex, model: Any, hook_name: str, max_rows: int, seed: int
) -> WordInContext:
    """The word at a position of a text, the direction of its meaning, and at most `max_rows` contrast and random rows each.

    Raises:
        InvalidInputError: No such position or word; an encoder; a bank that was built with repeat; nothing that tells this
            use from others.
        UnknownHookError: The index lacks the hook name.
        ModelMismatchError: `model` is not the bank's.
    """
    _check_inputs(text, index, model, hook_name)
    tokens, strings, is_special = _tokens_up_to_word(model, text, at)
    activation = activations_at(model, [tokens.tolist()], [-1], [hook_name])[hook_name][0]

    rng = np.random.default_rng(seed)
    use_rows = rng.permutation(_rows_of_other_uses(index, hook_name, tokens))[:MAX_STORED_ROWS]
    hook_rows = index.bank_rows.row_ids(hook_name)
    random_rows = rng.permutation(hook_rows)[:MAX_STORED_ROWS]

    stored = stored_activations(index, hook_name, use_rows)
    has_contrast = len(use_rows) >= MIN_USES
    uses = _part_uses(stored, activation, _n_similar(stored) if has_contrast else 0)
    if has_contrast:
        usual = stored[uses.contrast].mean(0)
        added = stored[uses.similar].mean(0) - usual
    else:
        usual = stored_activations(index, hook_name, random_rows).mean(0)
        added = activation - usual
    direction = unit_direction(added, index, hook_name)
    strength = float(((activation - usual) * direction).sum())
    if not strength > 0:
        raise InvalidInputError(f"nothing tells this use of {strings[-1]!r} from the bank's others; give more text")
    return WordInContext(
        tokens.tolist(),
        strings,
        is_special,
        hook_name,
        activation,
        direction,
        strength,
        usual,
        use_rows[uses.similar.numpy()],
        uses.cosines.numpy(),
        rng.permutation(use_rows[uses.contrast.numpy()])[:max_rows],
        has_contrast,
        random_rows[:max_rows],
    )


def stored_activations(index: ContextualIndex, hook_name: str, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n d"]:
    """The activations of rows of the index as the banks store them, float32."""
    return torch.from_numpy(index.bank_rows.activations(hook_name, rows))


def _check_inputs(text: str, index: ContextualIndex, model: Any, hook_name: str) -> None:
    require_index(index)
    require_model(model)
    if not isinstance(text, str):
        raise InvalidInputError(f"got a text of type {type(text).__name__}; expected one str")
    if any(bank.plan.settings.repeat for bank in index.banks):
        raise InvalidInputError("got a bank of texts read twice (repeat); expected one of texts read once: build it without")
    if hook_name not in index.hook_names:
        raise UnknownHookError(f"the index has no hook name {hook_name!r}; it has {list(index.hook_names)}")
    if is_bidirectional(model, [hook_name]):
        raise InvalidInputError("got an encoder; expected a causal model, which has seen the text up to the word and no more")
    index.check_model(model)


def _tokens_up_to_word(
    model: Any, text: str, at: int | str
) -> tuple[Int[np.ndarray, " pos"], list[str], Bool[np.ndarray, " pos"]]:
    """Ids and texts of the tokens up to a position, or up to the last token that ends a word, and which of them are special."""
    prompt = tokenize(model, [text])
    ids = prompt.tokens.tolist()
    text_of = token_strings(model, ids)
    strings = [text_of[i] for i in ids]
    end = find_position(at, strings, prompt.special) + 1
    return prompt.tokens[:end], strings[:end], prompt.special[:end]


def _rows_of_other_uses(index: ContextualIndex, hook_name: str, tokens: Int[np.ndarray, " pos"]) -> Int[np.ndarray, " rows"]:
    """Rows of the last token, without the one that has the very same tokens before it."""
    rows_by_bank = []
    for first, bank in index.bank_rows.of(hook_name):
        plan = bank.plan
        rows = np.flatnonzero(plan.tokens[plan.row_tokens] == tokens[-1])
        places = plan.row_tokens[rows]
        is_same = places - plan.prompt_starts[plan.row_prompts[rows]] == len(tokens) - 1
        is_same[is_same] = (plan.tokens[places[is_same][:, None] + np.arange(1 - len(tokens), 1)] == tokens).all(-1)
        rows_by_bank.append(first + rows[~is_same])
    return np.concatenate(rows_by_bank)


@own_arithmetic(full_products=True)
def _part_uses(stored: Float[Tensor, "uses d"], activation: Float[Tensor, " d"], n_similar: int) -> _Uses:
    """The uses nearest to the word's own, and those of the rest that lie on the far side of the midpoint between the two.

    The rest is projected on the difference of both means. With `n_similar` 0 all uses are contrast uses.
    """
    offsets, offset = stored - stored.mean(0), activation - stored.mean(0)
    cosines = cosine_similarity(offsets, offset[None], -1)
    similar, contrast = cosines.argsort(descending=True, stable=True).tensor_split([n_similar])
    if n_similar:
        difference = stored[similar].mean(0) - stored[contrast].mean(0)
        projections = stored[contrast] @ difference
        midpoint = (projections.mean() + (stored[similar] @ difference).mean()) / 2
        contrast = contrast[projections < midpoint]
    return _Uses(similar, cosines[similar], contrast)


def difference_of_uses(stored: Float[Tensor, "uses d"], activation: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The mean of the uses that are similar to a use less the mean of its contrast uses."""
    uses = _part_uses(stored, activation, _n_similar(stored))
    return stored[uses.similar].mean(0) - stored[uses.contrast].mean(0)


def _n_similar(stored: Float[Tensor, "uses d"]) -> int:
    return min(_MAX_SIMILAR_USES, len(stored) // 3)


def unit_direction(added: Float[Tensor, "... d"], index: ContextualIndex, hook_name: str) -> Float[Tensor, "... d"]:
    """Vectors as directions of an activation, of length 1."""
    if index.removes_own_mean(hook_name):
        added = added - added.mean(-1, keepdim=True)  # The bank's vectors may have a mean over d_model; the model's do not.
    return added / added.norm(dim=-1, keepdim=True)
