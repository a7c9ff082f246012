"""Every error that a user may see."""

from __future__ import annotations


class ArchError(ValueError):
    """An architecture that is unknown or does not fit together."""


class CheckpointMismatchError(RuntimeError):
    """Weights do not fit the backbone that they are loaded into."""


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and the way out."""


class DataError(UserError):
    """A file of the data set with which a model cannot be trained.

    Args:
        message: A sentence that names the file. PyTorch hands on a worker's error by building
            another one from its traceback, whose last line is the message.
        file: The file that is named.
        kind: What is wrong, in the words of the table that ``tools/check_dataset.py`` prints.
        detail: What was seen.
    """

    def __init__(self, message: str, file: str = '', kind: str = '', detail: str = '') -> None:
        super().__init__(message.rstrip().rpartition('DataError: ')[2])
        self.file = file
        self.kind = kind
        self.detail = detail
