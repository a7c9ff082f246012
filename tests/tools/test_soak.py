"""The soak: what it measures, a slice of it, and growth that it must notice."""

import importlib.util
import mmap
import os
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import REPO

spec = importlib.util.spec_from_file_location('soak', REPO / 'tests/stress/soak.py')
tool = importlib.util.module_from_spec(spec)
sys.modules['soak'] = tool  # where dataclasses look for the module of a class
spec.loader.exec_module(tool)

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='there is no /proc')

#: Megabytes that are written to, and how much else may come and go in a process that has run
#: other tests: its threads let memory go when they please.
WRITTEN, SLACK = 1024, 64


@given(
    st.floats(-0.01, 0.5),
    st.floats(0, 300),
    st.lists(st.floats(-2, 2), min_size=100, max_size=100),
)
def test_the_line_rises_as_the_memory_does(slope, start, noise):
    """The warm-up does not count, and noise of 2 MB moves the rise by less than 4 MB."""
    counts = list(range(5, 505, 5))
    sizes = [900 + slope * count - start * (count < 250) for count in counts]
    series = tool.Series('made up', counts, list(np.add(sizes, noise)))
    assert abs(series.rise() - slope * 250) < 4


def test_resident_memory_is_measured():
    """What is written to counts."""
    before = tool.resident()
    with written():
        assert abs(tool.resident() - before - WRITTEN) < SLACK


def written():
    """Memory of which every page is written to, and which none that was freed before can serve."""
    memory = mmap.mmap(-1, WRITTEN * 2**20)
    for page in range(0, len(memory), mmap.PAGESIZE):
        memory[page] = 1
    return memory


def hold(ready):
    with written():
        ready.set()
        time.sleep(60)


def test_workers_count_and_shared_pages_count_once():
    """What a forked worker writes to is added; what it has of its parent's is not."""
    context = tool.multiprocessing.get_context('fork')
    alone, ready = tool.resident(), context.Event()
    worker = context.Process(target=hold, args=(ready,))
    worker.start()
    ready.wait(60)
    both = tool.resident()
    worker.kill()
    worker.join()
    assert abs(both - alone - WRITTEN) < SLACK < alone


def test_a_slice_of_the_soak(small_config, demo_data, tmp_path):
    """Training and testing leave a sample every few iterations and images; a row each."""
    config = str(small_config('det'))
    rows = tool.watch('det', config, str(demo_data / 'coco'), 12, str(tmp_path / 'run'))
    assert [row.name for row in rows] == ['det, training', 'det, testing']
    assert rows[0].counts == [1, 6, 11] and rows[1].counts == [1]
    assert all(size > 100 for row in rows for size in row.sizes)
    assert 'det, training' in tool.memory_table(rows[:1])


@pytest.mark.parametrize(('slope', 'code', 'says'), [(0.001, 0, 'none'), (0.2, 1, 'det, training')])
def test_growth_ends_with_1(monkeypatch, capsys, slope, code, says):
    """100 kB an iteration are noticed, 1 kB is noise."""
    counts = list(range(5, 505, 5))
    series = tool.Series('det, training', counts, [900 + slope * count for count in counts])
    monkeypatch.setattr(tool, 'soak', lambda iterations: [series])
    monkeypatch.setattr(sys, 'argv', ['soak.py'])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == code
    assert f'grown: {says}' in capsys.readouterr().out


def test_too_short_a_soak_is_refused(run_tool, capsys):
    """A line through a few samples says nothing."""
    with pytest.raises(SystemExit):
        run_tool('soak', '--iterations', 10)
    assert 'error: --iterations 10: a line needs 50 or more' in capsys.readouterr().err
