"""Reads command lines as the documentation shows them, and has the tools parse them."""

import argparse
import contextlib
import functools
import io
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import conftest
from reference import REPO

from pvt_mm.config import find_config

load_tool = functools.cache(conftest.load_tool)
#: What a launcher's arguments are to the tool that it starts: how many come before them, and those
#: that it hands on.
LAUNCHERS = {
    'dist_train.sh': ('train', lambda config, number, *rest: (config, *rest)),
    'dist_test.sh': ('test', lambda config, checkpoint, number, *rest: (config, checkpoint, *rest)),
    'slurm_train.sh': ('train', lambda partition, job, config, *rest: (config, *rest)),
    'slurm_test.sh': (
        'test',
        lambda partition, job, config, checkpoint, *rest: (config, checkpoint, *rest),
    ),
}
PYTHON = re.compile(r'(\.venv/bin/)?python(3(\.\d+)?)?')
VARIABLE = re.compile(r'[A-Z_]+=')
FIRST_WORDS = (
    'python',
    '.venv/bin/python',
    'bash',
    'make',
    'pip',
    'pip-audit',
    'mim',
    'tensorboard',
    '. ',
)
#: Folders whose files are in the repository.
KEPT = ('configs/', 'tools/', 'tests/', 'requirements/', 'pvt_mm/')


class Parsed(BaseException):
    """Carries a tool's parser and arguments out of its main."""

    def __init__(self, parser, arguments):
        super().__init__()
        self.parser = parser
        self.arguments = arguments


def is_command(line):
    """Tell whether a line begins like a command."""
    words = line.split()
    while words and VARIABLE.match(words[0]):
        words.pop(0)
    return ' '.join(words).startswith(FIRST_WORDS)


def split(text):
    """Split a block into commands of words, comments left out and continued lines joined."""
    lines = text.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse_with_tool(name, arguments):
    """Have a tool parse arguments, and return its parser with what came of them."""
    plain = argparse.ArgumentParser.parse_args

    def stop(parser, *args):
        raise Parsed(parser, plain(parser, *args))

    said = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, 'parse_args', stop),
        mock.patch.object(sys, 'argv', [f'{name}.py', *arguments]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        try:
            load_tool(name).main()
        except Parsed as parsed:
            return parsed
        except SystemExit as end:
            raise AssertionError(said.getvalue()) from end
    raise AssertionError(f'{name}.py parses no arguments')


def parser_of(name):
    """Return the parser of a tool, whatever it needs."""
    found = []

    def stop(parser, *args):
        found.append(parser)
        raise Parsed(parser, None)

    with (
        mock.patch.object(argparse.ArgumentParser, 'parse_args', stop),
        contextlib.suppress(Parsed),
    ):
        load_tool(name).main()
    return found[0]


def check(words, made=()):
    """Check that a command could be typed in a clone.

    Args:
        words: The command.
        made: Files that do not lie in the repository but are made on the page.
    """
    while VARIABLE.match(words[0]):
        words = words[1:]
    first, *rest = words
    if PYTHON.fullmatch(first):
        if rest[:2] == ['-m', 'pytest']:
            assert all((REPO / word).exists() for word in rest if word.startswith('tests/')), rest
            return
        script, *arguments = rest
        assert (REPO / script).is_file(), f'there is no {script}'
        assert script.startswith(('tools/', 'tests/stress/')), f'{script} is not a tool'
        parse_with_tool(Path(script).stem, arguments)
    elif first == 'bash':
        script, *arguments = rest
        assert (REPO / script).is_file(), f'there is no {script}'
        tool, handed_on = LAUNCHERS[script.removeprefix('tools/')]
        parse_with_tool(tool, handed_on(*arguments))
    elif first == 'make':
        check_make(rest)
    elif first == 'pip':
        check_pip(rest)
    else:
        assert first in ('.', 'pip-audit', 'mim', 'tensorboard', 'conda', 'docker', 'uv'), (
            f'{first} is a command that no test knows'
        )
    for word in rest:
        check_place(word, made)


def check_make(words):
    text = (REPO / 'Makefile').read_text()
    targets = re.search(r'^\.PHONY: (.*)$', text, re.MULTILINE)[1].split()
    for word in words:
        name, is_set, _ = word.partition('=')
        known = re.search(rf'^{name} +\?=', text, re.MULTILINE) if is_set else name in targets
        assert known, f'make {word}: the Makefile has no {name}'


def check_pip(words):
    extras = re.findall(r"^    '([a-z-]+)': \[", (REPO / 'setup.py').read_text(), re.MULTILINE)
    extras += ['openmmlab', 'onedl']  # the two stacks
    assert words[0] in ('install', 'uninstall', 'wheel')
    for extra in re.findall(r'^(?:pvt-mm|\.)\[(.+)\]$', '\n'.join(words), re.MULTILINE):
        assert extra in extras, f'setup.py has no extra {extra}'


def check_place(word, made):
    """Check that a word which names a file or config of ours names one that is there."""
    if word in made or '*' in word:
        return
    if word.startswith(KEPT):
        assert (REPO / word).exists(), f'there is no {word}'
    elif re.match(r'mm(det|seg)::', word):
        find_config(word)
