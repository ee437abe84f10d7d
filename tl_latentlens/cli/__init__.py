"""The command line, `tl-latentlens COMMAND`; `commands` lists the commands, each a function in a file of its name.

Nothing here imports torch, so that settings of its threads can be made before it is loaded.
"""

import os
import sys
import warnings
from importlib import import_module
from typing import Any

from tl_latentlens.cli.output import console as console
from tl_latentlens.cli.output import note
from tl_latentlens.errors import LatentLensError

_SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""What tells the OpenMP libraries that torch comes with (GNU's, LLVM's and Intel's) to let waiting threads sleep."""
_OWN_CHOICE = (*_SLEEPING_THREADS, "GOMP_SPINCOUNT")


def __getattr__(name: str) -> Any:
    if name == "app":
        return import_module("tl_latentlens.cli.commands").app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def let_threads_sleep() -> None:
    """Let torch's threads sleep while they wait for each other, unless the user has set how they wait.

    By default they wait at full speed. On a machine that others use too, such a wait may take as long as the work. It must be
    set before torch is loaded.
    """
    if not any(name in os.environ for name in _OWN_CHOICE):
        os.environ.update(_SLEEPING_THREADS)


def main() -> None:
    """Run the command line; an error of this package, or a warning, is a line on stderr, without a traceback."""
    let_threads_sleep()
    app = import_module("tl_latentlens.cli.commands").app
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: note(str(message), "warning", "bold yellow")
        try:
            app()
        except LatentLensError as error:
            note(
                " ".join([f"{error}.", *error.__notes__] if getattr(error, "__notes__", None) else [str(error)]),
                "error",
                "bold red",
            )
            sys.exit(1)
