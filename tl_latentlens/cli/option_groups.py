"""Options that several commands share as groups: a command asks for a group by one parameter, and shows all of its options.

A group is a dataclass, under `OptionGroup`, whose fields are annotated as the parameters of a command are.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature
from typing import Any, get_type_hints

from tl_latentlens.errors import LatentLensError


@dataclass
class OptionGroup:
    """The values of options that belong together."""

    def advice(self, error: LatentLensError) -> str | None:
        """What these options can do about an error of the command; None where they can do nothing."""
        return None


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of each group in place of the parameter that the group is given by."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, OptionGroup)}
    parameters: list[Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _options_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group) if field.init})
        try:
            command(**values)
        except LatentLensError as error:
            # `add_note` came with Python 3.11.
            error.__notes__ = [advice for name in groups if (advice := values[name].advice(error))]
            raise

    expanded.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _options_of(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(group)
        if field.init
    ]
