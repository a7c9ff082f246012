"""Tables as text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = False) -> str:
    """Return a table as lines of text with aligned columns.

    Args:
        head: Names of the columns.
        rows: Cells.
        markdown: Draw the lines of a Markdown table.
    """
    table = Table(*head, box=box.MARKDOWN if markdown else None, pad_edge=markdown)
    for row in rows:
        table.add_row(*row)
    lines = (line.rstrip() for line in as_text(table).splitlines())
    return '\n'.join(line for line in lines if line)


def as_text(drawing: RenderableType, width: int = 10_000) -> str:
    """Return what rich would draw on a console, without colours."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, color_system=None, markup=False, emoji=False, highlight=False
    )
    console.print(drawing)
    return file.getvalue()
