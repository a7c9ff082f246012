"""What is found in the files of a data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something about one file that its owner should know."""

    file: str
    kind: str
    detail: str = ''
