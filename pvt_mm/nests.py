"""Walks nests of dicts, lists and tuples, as configs are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def dicts(node: Any) -> Iterator[dict]:
    """Yield every dict in a nest of dicts, lists and tuples, once even where it is shared."""
    seen: dict[int, dict] = {}  # holds them, so that no number is given again

    def walk(node: Any) -> Iterator[dict]:
        if isinstance(node, dict):
            if id(node) in seen:
                return
            seen[id(node)] = node
            yield node
            node = list(node.values())
        if isinstance(node, (list, tuple)):
            for child in node:
                yield from walk(child)

    return walk(node)
