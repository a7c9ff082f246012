"""Files that are never half written."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

#: What a file is called while it is written: a dot, its name, and this.
PARTIAL = '.partial'
#: Endings of image files, in lower case.
IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


def atomic_write(content: bytes, path: str | Path) -> None:
    """Write a temporary file, flush it and rename it: readers see the old file or the new one.

    Raises:
        OSError: Where that fails; the old file is unchanged then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}{PARTIAL}')
    try:
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        # write() itself does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder: without that, a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it
            raise
    finally:
        os.close(descriptor)
