"""How far a tool is, on terminals and elsewhere."""

import io
import itertools
from types import SimpleNamespace

import pytest
from mmengine.hooks import LoggerHook

from pvt_mm import progress
from pvt_mm.engine.runner import fit_log_interval


@pytest.fixture
def clock(monkeypatch):
    """Let each look at the clock take four seconds."""
    ticks = itertools.count(0, 4)
    monkeypatch.setattr(progress.time, 'monotonic', lambda: float(next(ticks)))


def test_lines_every_ten_seconds_where_stderr_is_no_terminal(clock, capsys):
    """All items come, with a line about each ten seconds and one at the end, none on stdout."""
    assert list(progress.track('abcdefgh', 8, 'images')) == list('abcdefgh')
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.splitlines() == [
        'images: 3 of 8, 20 s left', 'images: 6 of 8, 8 s left', 'images: 8 of 8, 0 s left',
    ]  # fmt: skip


def test_work_of_a_moment_says_nothing(capsys):
    """Under ten seconds there is nothing to wait for."""
    assert list(progress.track(range(3), 3, 'images')) == [0, 1, 2]
    assert capsys.readouterr() == ('', '')


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_leaves_a_piped_stdout_alone(monkeypatch):
    """The bar goes to stderr; what is printed meanwhile goes where stdout leads."""
    out, err = io.StringIO(), Terminal()
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr('sys.stdout', out)
    monkeypatch.setattr('sys.stderr', err)
    for item in progress.track(range(3), 3, 'images'):
        print('row', item)
    assert out.getvalue() == 'row 0\nrow 1\nrow 2\n'
    assert 'images' in err.getvalue() and '3/3' in err.getvalue()
    assert 'row' not in err.getvalue()


@pytest.mark.parametrize(
    'seconds, text', [(9.4, '9 s'), (90, '1.5 min'), (3599, '60.0 min'), (7200, '2.0 h')]
)
def test_durations_are_in_the_unit_that_suits(seconds, text):
    """Seconds, minutes or hours."""
    assert progress.readable(seconds) == text


@pytest.mark.parametrize(
    'iterations, interval', [(3, 1), (20, 2), (499, 49), (500, 50), (90000, 50)]
)
def test_a_short_run_logs_about_ten_times(iterations, interval):
    """A run of 20 iterations is not hidden by an interval of 50; a long one keeps it."""
    hook = LoggerHook(interval=50)
    fit_log_interval(SimpleNamespace(hooks=[hook]), iterations)
    assert hook.interval == interval
