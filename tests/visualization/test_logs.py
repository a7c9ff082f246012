"""Tables and pictures of what trainings logged."""

import csv
import importlib.util
import json
import shutil

import cv2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvt_mm.engine import options
from pvt_mm.visualization import logs


def write(work_dir, *entries, start='20260101_000000'):
    """A start of a training, as mmengine logs it; a text is written as it is."""
    file = work_dir / start / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    file.write_text('\n'.join(lines) + '\n')


def train(step, loss, epoch=1, **more):
    return dict(lr=1e-4, loss=loss, time=0.5, epoch=epoch, iter=step, step=step, **more)


def by_epoch(work_dir):
    write(
        work_dir,
        train(10, 2.0),
        train(20, 0.5, memory=900),
        {'coco/bbox_mAP': 0.4, 'coco/bbox_mAP_50': 0.7, 'time': 1.0, 'step': 1},
        train(40, 1.0, 2, memory=800),
        {'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.8, 'time': 1.0, 'step': 2},
    )


def test_evaluations_stand_at_their_iterations(tmp_path):
    """Those that count epochs stand at the iteration before; those that count iterations stay."""
    by_epoch(tmp_path / 'a')
    run = logs.read_run(tmp_path / 'a')
    assert run.curve('loss') == [(10, 2.0), (20, 0.5), (40, 1.0)]
    assert run.curve('coco/bbox_mAP') == [(20, 0.4), (40, 0.3)]
    write(tmp_path / 'b', dict(loss=1.0, step=80), dict(mIoU=30.0, step=100))
    assert logs.read_run(tmp_path / 'b').curve('mIoU') == [(100, 30.0)]


def test_the_figures_of_a_run(tmp_path):
    """First, last and least loss, best score and its iteration, time and memory."""
    by_epoch(tmp_path / 'a')
    assert logs.summary(logs.read_run(tmp_path / 'a')) == {
        'run': 'a', 'iterations': 40, 'epochs': 2, 'first_loss': 2.0, 'last_loss': 1.0,
        'min_loss': 0.5, 'min_loss_at': 20, 'seconds_per_iteration': 0.5, 'hours': 20 / 3600,
        'peak_memory_mb': 900.0, 'best coco/bbox_mAP': 0.4, 'best coco/bbox_mAP at': 20,
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 10)), min_size=1, max_size=5))
def test_resumed_starts_are_joined_and_the_later_wins(tmp_path_factory, starts):
    """Whatever is resumed from where, each iteration is the last start's that trained it."""
    folder = tmp_path_factory.mktemp('run')
    expected = {}
    for number, (first, count) in enumerate(starts):
        steps = [first + 1 + i for i in range(count)]
        write(folder, *(train(step, number) for step in steps), start=f'2026010{number}_000000')
        expected = {step: loss for step, loss in expected.items() if step <= first}
        expected |= dict.fromkeys(steps, float(number))
    assert dict(logs.read_run(folder).curve('loss')) == expected


def test_a_half_line_is_skipped_and_counted(run_tool, tmp_path, capsys):
    """A killed training leaves one; the rest is read, and stderr tells how many were not."""
    write(tmp_path / 'a', train(10, 2.0), 'null', train(20, 1.5), '{"lr": 1e-4, "lo')
    run_tool('analyze_logs', tmp_path / 'a')
    captured = capsys.readouterr()
    assert captured.err == 'warning: a: skipped 2 broken line(s)\n'
    assert captured.out.splitlines()[1].split()[:6] == ['a', '20', '1', '2', '1.5', '1.5']


def test_runs_of_one_name_are_told_apart(tmp_path):
    """By as much of their paths as that takes."""
    paths = [tmp_path / name for name in ('x/run', 'y/run', 'y/other')]
    assert logs.run_names(paths[1:]) == ['run', 'other']
    assert logs.run_names(paths) == ['x/run', 'y/run', 'y/other']


def test_real_trainings_in_one_table_picture_and_file(trained, run_tool, tmp_path, capsys):
    """A detector and a segmentor: a row each, a picture of pixels in two colours, and a CSV."""
    for task in ('det', 'seg'):
        shutil.copytree(trained(task).work_dir, tmp_path / task)
    capsys.readouterr()  # of the trainings
    run_tool('analyze_logs', tmp_path / 'det', tmp_path / 'seg', '-o', 'a.png', '--csv', 'a.csv')
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith('det ') and 'bbox_mAP' in lines[1]
    assert lines[2].startswith('seg ') and 'mIoU' in lines[2]
    picture = cv2.imread(str(tmp_path / 'a.png'))
    for colour in logs.COLOURS[:2]:
        bgr = [int(colour[i : i + 2], 16) for i in (5, 3, 1)]
        assert (picture == bgr).all(2).sum() > 50
    with open(tmp_path / 'a.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['det', 'seg']
    assert rows[0]['iterations'] == '3' and rows[1]['best mIoU']


@pytest.mark.parametrize(
    'arguments, text',
    [
        (('missing',), 'There is no folder missing'),
        (('empty',), 'empty holds no vis_data/scalars.json'),
        (('broken',), 'broken holds 1 file(s) without an entry'),
        (('good', '-o', 'no/a.png'), 'There is no folder no; make it first.'),
        (('good', '--csv', 'no/a.csv'), 'There is no folder no; make it first.'),
        (('good', '-o', 'a.txt'), 'end the name in .png'),
    ],
)
def test_what_cannot_be_read_or_written_is_one_sentence(arguments, text, failing, tmp_path):
    """With exit code 1, and before anything is written."""
    (tmp_path / 'empty').mkdir()
    write(tmp_path / 'broken', '{"ste')
    by_epoch(tmp_path / 'good')
    assert text in failing('analyze_logs', *arguments)
    assert not list(tmp_path.glob('a.*'))


def test_tensorboard_holds_the_losses(trained, run_tool, tmp_path):
    """Its event files come with --tensorboard, with the losses of the scalars."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = trained('det')
    run_tool('train', first.config, *first.data, '--work-dir', tmp_path / 'run', '--tensorboard')
    (file,) = (tmp_path / 'run').glob('*/vis_data/events.out.tfevents*')
    events = EventAccumulator(str(file))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars('loss')]
    assert found == [
        (step, pytest.approx(loss)) for step, loss in logs.read_run(tmp_path / 'run').curve('loss')
    ]
    assert len(found) == 3


def test_tensorboard_that_is_missing_is_told_before_training(
    trained, failing, tmp_path, monkeypatch
):
    """One sentence with what to install, and no work dir."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        options, 'find_spec', lambda name: None if name == 'tensorboard' else find(name)
    )
    first = trained('det')
    line = failing(
        'train', first.config, *first.data, '--work-dir', tmp_path / 'run', '--tensorboard'
    )
    assert line == 'error: --tensorboard needs a package: pip install tensorboard.'
    assert not (tmp_path / 'run').exists()
