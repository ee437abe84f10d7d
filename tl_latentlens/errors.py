"""Every error the package raises on purpose; each message says what was got, what was expected, and the fix."""


class LatentLensError(Exception):
    """Root of all errors of this package."""


class InvalidInputError(LatentLensError, ValueError):
    """Vectors, tokens or settings of a wrong shape, width, range or kind."""


class CorpusError(LatentLensError, ValueError):
    """A corpus that cannot be read, or holds nothing to bank."""


class UnknownHookError(LatentLensError, KeyError):
    """A hook name that the model or the bank does not have."""

    def __str__(self) -> str:
        """The message itself; a plain KeyError would show its repr."""
        return str(self.args[0])


class ModelMismatchError(LatentLensError, ValueError):
    """A model that is not the one a bank was made with."""


class BankError(LatentLensError, OSError):
    """A bank file that cannot be created, opened or written."""


class BankCorruptError(BankError):
    """A bank file whose bytes are not the ones that were written."""


class MissingExtraError(LatentLensError, ImportError):
    """A feature whose optional dependency is not installed."""
