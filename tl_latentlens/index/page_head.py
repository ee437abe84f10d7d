"""The head of a page that shows what was found in an index."""

from collections.abc import Sequence

from tl_latentlens.index.search_result import SearchedIndex
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.views.page_head import PageHead

_MAX_BANKS = 3  # That are named.


def index_head(index: SearchedIndex, title: str, lead: str, *, call: str = "", notes: Sequence[str] = ()) -> PageHead:
    """The head, with the model, banks and hook names of an index; the other arguments are those of `PageHead`."""
    names = [bank.path.name for bank in index.bank_rows.banks]
    bank = f"{named_banks(names)}, {index.bank_rows.n_rows:,} rows"
    return PageHead(title, lead, model_line(index.model_info), bank, index.hook_names, call, notes)


def index_call(index: SearchedIndex) -> str:
    """The call that makes an index like this one, such as `ContextualIndex("demo.h5", transform="center")`."""
    names = [f'"{bank.path.name}"' for bank in index.bank_rows.banks]
    banks = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
    transform = f', transform="{index.transform}"' if index.transform != "raw" else ""
    return f"ContextualIndex({banks}{transform})"


def model_line(info: ModelInfo) -> str:
    """The model in a few words: its name, layers and width."""
    return f"{info.name}, {info.n_layers} layers, d_model {info.d_model}"


def named_banks(names: Sequence[str]) -> str:
    """The names of banks; many are counted."""
    more = f" and {len(names) - _MAX_BANKS} more" if len(names) > _MAX_BANKS else ""
    return ", ".join(names[:_MAX_BANKS]) + more
