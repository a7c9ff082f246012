"""How far a tool is and how long the rest takes, on stderr: tables on stdout stay whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Seconds between two lines where stderr is no terminal.
PAUSE = 10.0

T = TypeVar('T')


def track(items: Iterable[T], total: int, description: str, bar: bool | None = None) -> Iterator[T]:
    """Yield items, and show on stderr how many are done and when the rest will be.

    On a terminal that is a bar, elsewhere a line about every ten seconds.

    Args:
        items: What is worked on; each counts when the next is asked for.
        total: How many there are.
        description: What they are, such as ``'images'``.
        bar: Draw a bar (default: on a terminal). Lines suit work that prints much itself.
    """
    draw = sys.stderr.isatty() if bar is None else bar
    return _bar(items, total, description) if draw else _lines(items, total, description)


def _bar(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    console = Console(stderr=True)
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn('left'),
    )
    # What is printed beside a bar goes above it, unless stdout leads elsewhere. The estimate must
    # outlast steps of minutes.
    with Progress(
        *columns,
        console=console,
        redirect_stdout=sys.stdout.isatty(),
        speed_estimate_period=3600,
    ) as progress:
        yield from progress.track(items, total, description=description)


def _lines(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    start = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= PAUSE or (done == total and said > start):
            said = now
            left = readable((now - start) / done * (total - done))
            print(f'{description}: {done} of {total}, {left} left', file=sys.stderr, flush=True)


def readable(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    if seconds < 60:
        return f'{seconds:.0f} s'
    if seconds < 3600:
        return f'{seconds / 60:.1f} min'
    return f'{seconds / 3600:.1f} h'
