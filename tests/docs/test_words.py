"""The field's words are used everywhere, in short sentences; older ones do not come back."""

import re
import subprocess

import pytest
from reference import REPO

#: A pattern that must not stand anywhere, and what to write instead.
WORDS = {
    r'perceptrons?': 'MLP',
    r'roads?': 'way to load, or code path',
    r'drawn anew|draws? anew': 're-initialised',
    r'loud no': 'error',
    r'pieced?': 'chunk or tile',
    r'made again|makes? again|making again': 'recompute',
    r'starts? anew|started anew': 'start again, or are initialised',
    r'went astray|goes astray': 'diverged',
    r'that never was|that was never': 'say what it is',
    r'keeps to itself': 'say what it is',
    r'write_whole|newest_whole|leave_together': 'atomic_write, latest_valid, shutdown_distributed',
    r'spread_attention|longest vector': 'split_fused_attention, max norm',
}
TEXTS = ('.py', '.md', '.sh', '.html', '.yml', '.toml')


def texts():
    """The project's own texts; the changelog quotes what was."""
    listed = subprocess.run(['git', 'ls-files'], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('no checkout of git')
    names = [name for name in listed.stdout.splitlines() if name.endswith(TEXTS)]
    assert 'pvt_mm/models/layers.py' in names
    own = ('CHANGELOG.md', 'tests/docs/test_words.py')
    return [REPO / name for name in names if name not in own and (REPO / name).is_file()]


@pytest.mark.parametrize('pattern', WORDS)
def test_older_words_do_not_come_back(pattern):
    """In code, docstrings, messages, docs and names of tests alike."""
    word = re.compile(rf'(?<![a-z])(?:{pattern})(?![a-z])', re.IGNORECASE)
    found = [
        f'{path.relative_to(REPO)}:{number}: {line.strip()}'
        for path in texts()
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
        if word.search(line)
    ]
    assert not found, f'write {WORDS[pattern]}:\n' + '\n'.join(found)
