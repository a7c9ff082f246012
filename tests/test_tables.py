"""Tables: aligned columns, as plain text and as Markdown, with the cells as they are."""

from pvt_mm import cli
from pvt_mm.tables import text_table

HEAD = ('name', 'value')
ROWS = [('a [bold]b[/bold]', '1'), ('', '12345678'), (':smile:', 'x' * 300)]


def test_cells_stay_as_they_are(monkeypatch):
    """Neither cut to a terminal's width, nor taken for markup, emoji or colours."""
    monkeypatch.setenv('COLUMNS', '20')
    monkeypatch.setenv('FORCE_COLOR', '1')
    assert text_table(HEAD, ROWS).splitlines() == [
        'name              value',
        'a [bold]b[/bold]  1',
        '                  12345678',
        f':smile:           {"x" * 300}',
    ]


def test_a_markdown_table(capsys):
    """A line of dashes below the names, and bars around the cells, for docs and reports."""
    cli.print_table(HEAD, iter(ROWS[:2]))
    assert capsys.readouterr().out.splitlines() == [
        '| name             | value    |',
        '|------------------|----------|',
        '| a [bold]b[/bold] | 1        |',
        '|                  | 12345678 |',
    ]
