"""How far a tool is, on terminals and elsewhere."""

import io
from types import SimpleNamespace

import pytest
from mmengine.hooks import LoggerHook

from pvt_mm.cli import track
from pvt_mm.engine.runner import fit_log_interval


def test_one_line_on_stderr_where_it_is_no_terminal(capsys):
    """All items come, and how many they were stands on stderr, for stdout is for results."""
    assert list(track('abc', 3, 'images')) == ['a', 'b', 'c']
    captured = capsys.readouterr()
    assert captured.out == ''
    (line,) = captured.err.splitlines()
    assert line.startswith('images ') and '100%' in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_leaves_a_piped_stdout_alone(monkeypatch):
    """The bar goes to stderr; what is printed meanwhile goes where stdout leads."""
    out, err = io.StringIO(), Terminal()
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr('sys.stdout', out)
    monkeypatch.setattr('sys.stderr', err)
    for item in track(range(3), 3, 'images'):
        print('row', item)
    assert out.getvalue() == 'row 0\nrow 1\nrow 2\n'
    assert 'images' in err.getvalue() and '100%' in err.getvalue()
    assert 'row' not in err.getvalue()


@pytest.mark.parametrize(
    'iterations, interval', [(3, 1), (20, 2), (499, 49), (500, 50), (90000, 50)]
)
def test_a_short_run_logs_about_ten_times(iterations, interval):
    """A run of 20 iterations is not hidden by an interval of 50; a long one keeps it."""
    hook = LoggerHook(interval=50)
    fit_log_interval(SimpleNamespace(hooks=[hook]), iterations)
    assert hook.interval == interval
