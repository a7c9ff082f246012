"""Files that are never half written."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

#: What a file is called while it is written: a dot, its name, and this.
PARTIAL = '.partial'


# Checkpoint files


def atomic_write(content: bytes, path: str | Path) -> None:
    """Write a file aside, flush it and rename it: others find the old one or the new one, whole.

    Raises:
        OSError: Where that fails; the old file is as it was then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}{PARTIAL}')
    try:
        with open(aside, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        # write() itself does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _flush_folder(folder: Path) -> None:
    """Flush a folder's names, without which a rename may not outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no such thing
            raise
    finally:
        os.close(descriptor)
