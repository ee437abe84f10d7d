"""Paths that a user gives, made absolute once, so that a later change of the current folder does not matter."""

from pathlib import Path

from tl_latentlens.errors import InvalidInputError


def absolute_path(path: str | Path) -> Path:
    """The path from the root of the file system, with the home folder in place of `~`; links are kept as they are.

    Raises:
        InvalidInputError: It depends on a home folder or a current folder that does not exist.
    """
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no such user; or the current folder was deleted
        raise InvalidInputError(f"got path {str(path)!r}, which cannot be made absolute: {error}; begin it with /") from error
