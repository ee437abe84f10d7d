"""The hook names of an index that a request stands for."""

from collections.abc import Iterable, Sequence

from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.rows import BankRows
from tl_latentlens.model.heads import head_of, hook_point
from tl_latentlens.model.layers import ALL_LAYERS, expand_layers, is_layer_hook_name


def hook_names_to_load(hook_names: int | str | Iterable[int | str] | None, bank_rows: BankRows) -> tuple[str, ...]:
    """The hook names that an index loads; None stands for those of all banks.

    Raises:
        InvalidInputError: An empty choice.
        UnknownHookError: A hook name that no bank has.
    """
    available = bank_rows.hook_names
    requested = available if hook_names is None else requested_hook_names(hook_names, bank_rows, available)
    if not requested:
        raise InvalidInputError(f"got no hook names; expected some of {available}, or None for all")
    return tuple(expand_heads(requested, bank_rows))


def requested_hook_names(
    hook_names: int | str | Iterable[int | str], bank_rows: BankRows, available: Sequence[str]
) -> list[str]:
    """The hook names of a user's choice; layers stand for their `hook_resid_post`, "all" for those that are available.

    Raises:
        UnknownHookError: A layer that the banks' model does not have; "all" where no `hook_resid_post` is available.
        InvalidInputError: Something that is neither a hook name nor a layer.
    """
    every_layer = [name for name in available if is_layer_hook_name(name)]
    names = expand_layers(hook_names, bank_rows.banks[0].model_info.n_layers, every_layer)
    if hook_names == ALL_LAYERS and not names:
        raise UnknownHookError(f"got 'all', which stands for every hook_resid_post; the index has only {list(available)}")
    return names


def expand_heads(hook_names: Sequence[str], bank_rows: BankRows) -> list[str]:
    """The hook names, each once, with the names of all heads in place of one that ends with [:].

    Raises:
        UnknownHookError: A hook name that no bank has.
    """
    require_hook_names([hook_point(name) for name in hook_names], bank_rows.hook_names)
    names = (name for requested in hook_names for name in bank_rows.of(requested)[0].bank.head_names(requested))
    return list(dict.fromkeys(names))


def require_hook_names(hook_names: Sequence[str], available: Sequence[str]) -> None:
    """Check that an index has hook names.

    Raises:
        UnknownHookError: It does not.
    """
    for name in hook_names:
        if name not in available:
            raise UnknownHookError(f"the index has no hook name {name!r}; it has {list(available)}")


def default_hook_names(fitting: list[str], query_hook_name: str | None) -> list[str]:
    """The hook names to search where the user leaves them open.

    Each head has a space of its own, so a head's vectors are searched among those of that head alone.

    Args:
        fitting: The loaded hook names of the queries' width.
        query_hook_name: The hook name that the queries come from.

    Raises:
        InvalidInputError: It cannot be told which of several heads to search.
    """
    heads = [name for name in fitting if head_of(name) is not None]
    if query_hook_name in heads:
        return [query_hook_name]
    if query_hook_name in fitting:
        return [name for name in fitting if name not in heads]
    is_of_other_head = query_hook_name is not None and head_of(query_hook_name) is not None
    if heads and (is_of_other_head or len(fitting) > 1):
        raise InvalidInputError(
            f"got vectors of {query_hook_name or 'no hook name'} for an index of {', '.join(fitting[:3])}"
            f"{' …' if len(fitting) > 3 else ''}: each head has a space of its own, so cosines across heads mean nothing; say "
            f"whose vectors they are (query_hook_name={heads[0]!r}) or where to look (hook_names=)"
        )
    return fitting
