"""The model of a bank, loaded again from where it was loaded when the bank was built."""

from pathlib import Path
from typing import Any

from tl_latentlens.bank.bank import Bank
from tl_latentlens.model.loading import load_recorded_model


def load_model_of(bank: Bank | str | Path, **settings: Any) -> Any:
    """The model that a bank was built with, loaded from the name or folder that the bank remembers, in the same dtype.

    >>> model = load_model_of("gpt2.h5", device_map="auto")                           # doctest: +SKIP

    Args:
        bank: A bank, or its path.
        settings: The arguments of `load_model` besides the name: kind, device, dtype, device_map, n_devices, max_memory.

    Raises:
        InvalidInputError: The bank does not say where its model came from, the folder is not there any more, or the model
            cannot be loaded.
        BankError: No finished bank at the path.
    """
    opened = bank if isinstance(bank, Bank) else Bank.open(bank)
    return load_recorded_model(opened.model_info, **settings)
