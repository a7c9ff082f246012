"""What Linux tells of the processor; elsewhere, and where a file is missing, nothing is known."""

from __future__ import annotations

import re

CPUINFO = '/proc/cpuinfo'
CACHE_SIZE = '/sys/devices/system/cpu/cpu0/cache/index3/size'


def vendor_and_family(path: str = CPUINFO) -> tuple[str, int]:
    """Return who made the processor, as ``'GenuineIntel'``, and its family; or '' and 0."""
    text = _start(path)
    vendor = re.search(r'^vendor_id\s*: (\w+)$', text, re.MULTILINE)
    family = re.search(r'^cpu family\s*: (\d+)$', text, re.MULTILINE)
    return vendor[1] if vendor else '', int(family[1]) if family else 0


def last_level_cache(path: str = CACHE_SIZE) -> int:
    """Return the bytes of the cache that cores share, or 0."""
    size = re.fullmatch(r'(\d+)K\s*', _start(path))
    return 1024 * int(size[1]) if size else 0


def _start(path: str) -> str:
    """Return a file's beginning, where the first core is; hundreds of them take long to list."""
    try:
        with open(path) as file:
            return file.read(512)
    except OSError:
        return ''
