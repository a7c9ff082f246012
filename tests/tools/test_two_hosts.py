"""tests/stress/check_two_hosts.py notices what it is there for; it runs only as root."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import load_tool

from pvt_mm.errors import UserError

tool = load_tool('check_two_hosts')
linux = pytest.mark.skipif(sys.platform != 'linux', reason="namespaces are Linux's")


class Ended:
    """A launch that is over."""

    def __init__(self, codes, outputs=('', '')):
        self.codes, self.outputs = codes, outputs
        self.started = [type('Process', (), {'poll': lambda self: None})()] * 2

    def wait(self, seconds=0):
        return self.codes

    def says(self):
        return list(self.outputs)


@pytest.fixture
def ended(monkeypatch, tmp_path):
    """Have the next launch end so: ended(codes, outputs, digests of each host)."""
    (tmp_path / 'run').mkdir()
    monkeypatch.setattr(tool, 'ip', lambda *words: None)
    monkeypatch.setattr(tool, 'kill', lambda host: None)
    monkeypatch.setattr(tool, 'processes', lambda host: [])

    def end(codes, outputs=('', ''), digests=('', '')):
        for rank, own in enumerate(digests):
            lines = [json.dumps({'digest': digest}) for digest in own]
            (tmp_path / 'run' / f'rank_{rank}.jsonl').write_text('\n'.join(lines))
        monkeypatch.setattr(tool, 'start', lambda *arguments: Ended(codes, outputs))
        return tmp_path, tmp_path / 'run'

    return end


@pytest.mark.parametrize(
    ('codes', 'digests', 'output', 'fault'),
    [
        ([0, 0], ('abcd', 'abcd'), 'mIoU', None),
        ([0, -9], ('abcd', 'abcd'), 'mIoU', r'ended with \[0, -9\]'),
        ([0, 0], ('abcd', 'abxd'), 'mIoU', 'weights differ'),
        ([0, 0], ('aaaa', 'aaaa'), 'mIoU', 'weights differ'),
        ([0, 0], ('abc', 'abc'), 'mIoU', 'weights differ'),
        ([0, 0], ('abcd', 'abcd'), '', 'not validated'),
    ],
)
def test_trainings_that_part(codes, digests, output, fault, ended):
    """A host that fails, hosts apart, weights that stand still, no validation."""
    arguments = ended(codes, (output, ''), digests)
    if fault is None:
        assert tool.check_training(*arguments).startswith('4 iterations')
        return
    with pytest.raises(UserError, match=fault):
        tool.check_training(*arguments)


@pytest.mark.parametrize(
    ('codes', 'outputs', 'fault'),
    [
        ([1, 1], (tool.LOST, tool.LOST), None),
        ([1, -9], (tool.LOST, tool.LOST), 'host 1 ended with -9'),
        ([1, 1], (tool.LOST, 'Traceback'), 'host 1 does not say why'),
    ],
)
def test_cuts_that_end_badly(codes, outputs, fault, ended):
    """A host that goes on until it is ended, or ends without the sentence."""
    arguments = ended(codes, outputs, ('abc', 'abc'))
    if fault is None:
        assert tool.check_cut(*arguments, 'cable cut').startswith('both end after')
        return
    with pytest.raises(UserError, match=fault):
        tool.check_cut(*arguments, 'cable cut')


def test_a_killed_host_need_not_speak(ended):
    """It has no last words; the other has."""
    arguments = ended([1, -9], (tool.LOST, ''), ('abc', 'abc'))
    assert tool.check_cut(*arguments, 'host 1 killed').startswith('the other ends after')
    with pytest.raises(UserError, match='host 1 ended with -9'):
        tool.check_cut(*arguments, 'host 0 killed')


def test_a_resume_on_half_the_hosts(ended):
    """Both must refuse, and nobody may train on."""
    words = 'error: The processes would not resume from the same checkpoint: a, b.'
    arguments = ended([1, 1], (words, words), ('abcdefgh', 'abcdefgh'))
    assert tool.check_apart(*arguments) == words.removeprefix('error: ')
    for codes, outputs in (([1, 1], (words, '')), ([1, 0], (words, words))):
        with pytest.raises(UserError, match='ended with'):
            tool.check_apart(*ended(codes, outputs, ('abcdefgh', 'abcdefgh')))
    with pytest.raises(UserError, match='trained on'):
        tool.check_apart(*ended([1, 1], (words, words), ('abcdefghi', 'abcdefghi')))


@linux
def test_without_root_or_ip_it_says_so(failing, monkeypatch):
    """One sentence, before anything is touched."""
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)
    assert 'need Linux and root' in failing('check_two_hosts')
    monkeypatch.setattr(os, 'geteuid', lambda: 0)
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert 'apt-get install iproute2' in failing('check_two_hosts')


@linux
@pytest.mark.skipif(os.name != 'posix' or os.geteuid() != 0, reason='needs root')
@pytest.mark.skipif(shutil.which('ip') is None, reason='needs iproute2')
def test_the_cable_joins_the_hosts(monkeypatch):
    """Each has its address and interface, and sees the other until the cable is cut."""
    monkeypatch.setattr(tool, 'HOSTS', ('pvt_test_a', 'pvt_test_b'))
    monkeypatch.setattr(tool, 'CABLE', ('pvt_t0', 'pvt_t1'))
    tool.disconnect()
    try:
        tool.connect()
    except subprocess.CalledProcessError:
        pytest.skip('this root may not make network namespaces')
    asks = 'import socket, sys; s = socket.create_connection((sys.argv[1], 9), 5)'
    try:
        for host, end, other in zip(tool.HOSTS, tool.CABLE, tool.ADDRESSES[::-1]):
            words = ['ip', 'netns', 'exec', host, sys.executable, '-c', asks, other]
            told = subprocess.run(words, capture_output=True, text=True).stderr
            assert 'Connection refused' in told, 'it is there, and listens at no port'
            tool.ip('-n', host, 'link', 'set', end, 'down')
            told = subprocess.run(words, capture_output=True, text=True).stderr
            assert 'Network is unreachable' in told
            tool.ip('-n', host, 'link', 'set', end, 'up')
    finally:
        tool.disconnect()
    listed = subprocess.run(['ip', 'netns', 'list'], capture_output=True, text=True, check=True)
    assert 'pvt_test' not in listed.stdout
