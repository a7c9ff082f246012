"""What the tools print for --help: a purpose, an example that they take, and the defaults."""

import argparse
import re

import pytest
from commands import check, is_command, parser_of, split
from reference import REPO

TOOLS = sorted(
    file.stem
    for file in [*REPO.glob('tools/**/*.py'), *REPO.glob('tests/stress/*.py')]
    if '\ndef main(' in file.read_text()
)


@pytest.fixture(params=TOOLS)
def parser(request):
    return parser_of(request.param)


def test_tools_are_found():
    """The list holds tools, and no module that they share."""
    assert {'train', 'test', 'infer'} < set(TOOLS)
    assert 'demo_report' not in TOOLS


def test_purpose(parser):
    """The first line says what a tool is for, in one sentence."""
    first = parser.description.splitlines()[0]
    assert 20 < len(first) <= 100
    assert first[0].isupper() and first.endswith('.')


def test_examples(parser):
    """There are examples, and the tool itself takes each."""
    text = parser.format_help()
    _, title, examples = re.split(r'^(Examples?:)$', parser.description, flags=re.MULTILINE)
    assert examples.strip() in text, 'printed as it is, not filled'
    commands = split('\n'.join(line.strip() for line in examples.splitlines()))
    assert commands and (len(commands) > 1) == (title == 'Examples:')
    for words in commands:
        assert is_command(' '.join(words))
        check(words)


def test_arguments(parser):
    """Every argument is explained, and shows its default where that is not obvious."""
    text = parser.format_help()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == 'help':
            continue
        name = '/'.join(action.option_strings) or action.dest
        assert action.help, f'{name} has no help'
        if action.default in (None, False, [], ()):
            continue
        shown = action.help % {'default': action.default, 'prog': parser.prog}
        assert '(default: ' in shown, f'{name}={action.default!r} shows no default'
    assert text.isascii()
