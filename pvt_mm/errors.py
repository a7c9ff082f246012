"""Every error that a user may see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class ArchError(ValueError):
    """An architecture that is unknown or does not fit together."""


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, and what to do."""


class ArgumentError(UserError, TypeError):
    """An argument that a backbone does not have; the message says what to write instead."""


class CheckpointMismatchError(RuntimeError):
    """Weights do not fit the model that they are loaded into.

    Attributes:
        file: Where the weights are from; None where only tensors were given.
    """

    file: str | None = None

    def __str__(self) -> str:
        """Return the message, after the file if it is known."""
        message = super().__str__()
        return f'{self.file}: {message}' if self.file else message


@contextlib.contextmanager
def naming_file(file: str | Path) -> Iterator[None]:
    """Put the file into a CheckpointMismatchError that its load raises."""
    try:
        yield
    except CheckpointMismatchError as error:
        error.file = error.file or str(file)
        raise


def is_unknown_name(error: Exception) -> bool:
    """Tell whether a registry of mmengine's does not know a name of the config."""
    return 'is not in the' in str(error)


class DataError(UserError):
    """A file of the data set that a model cannot be trained with.

    Args:
        message: A sentence that names the file. PyTorch rebuilds the error of a worker from its
            traceback, whose last line is the message.
        file: The file that is named.
        kind: What is wrong, as ``tools/analysis_tools/check_dataset.py`` calls it.
        detail: What was found in the file.
    """

    def __init__(self, message: str, file: str = '', kind: str = '', detail: str = '') -> None:
        super().__init__(message.rstrip().rpartition('DataError: ')[2])
        self.file = file
        self.kind = kind
        self.detail = detail
