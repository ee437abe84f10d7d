"""Files that views write."""

from pathlib import Path

from tl_latentlens.errors import InvalidInputError


def output_path(path: str | Path) -> Path:
    """The path of a file to write.

    Raises:
        InvalidInputError: It is a folder, or its folder does not exist.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir() or path.is_dir():
        problem = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InvalidInputError(f"cannot write {path}: {problem}; expected the name of a file in a folder that exists")
    return path
