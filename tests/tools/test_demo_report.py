"""The demo's page, pictures and exit code, from scores made up here."""

import base64
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from reference import REPO

pytest.importorskip('matplotlib')
pytest.importorskip('sklearn')

DEMO = str(REPO / 'tools' / 'demo')


@pytest.fixture(scope='module', autouse=True)
def tools_on_path():
    """Make tools/demo/ importable, as it is for a script in it."""
    sys.path.insert(0, DEMO)
    yield
    sys.path.remove(DEMO)


@pytest.fixture
def demo():
    import demo

    return demo


@pytest.fixture
def report():
    import demo_report

    return demo_report


def outcome_of(report, score, target=0.6):
    return report.Outcome(
        'det', 'Detection', 'A <model>', 'box AP', target, score, train_seconds=125, test_seconds=9
    )


def picture_size(path):
    return cv2.imread(str(path)).shape[:2]


def test_time_left_is_that_of_the_whole_demo(demo, monkeypatch, capsys):
    """The training's own time left, and the later steps at the speed that it has here."""
    task = demo.TASKS['det']
    # Half done after 2 * seconds / 2: this machine takes twice as long.
    clock = iter([0.0, 1.0, task.seconds, task.seconds])
    monkeypatch.setattr(demo.time, 'monotonic', lambda: next(clock))
    minutes, seconds = divmod(task.seconds, 60)
    eta = f'eta: 0:{minutes:02}:{seconds:02}  loss: 1'
    demo.show([f'{eta}\n', f'{eta}\n', 'no time\n'], task, later=60)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('---')]
    whole = -(-(task.seconds + 2 * 60) // 60)
    assert said == [f'--- about {whole} min left of the whole demo']


def test_a_score_below_its_target_fails_the_demo(demo, report):
    """The exit code is 1 where any score falls short or is not a number, and 0 otherwise."""
    good, exact, low, nan = (outcome_of(report, score) for score in (0.7, 0.6, 0.59, float('nan')))
    assert demo.exit_code([good, exact], quick=False) == 0
    assert demo.exit_code([good, low], quick=False) == 1
    assert demo.exit_code([nan], quick=False) == 1
    assert demo.exit_code([low, nan], quick=True) == 0


def test_the_table_says_what_became_of_each_score(report):
    """The table has score, target and times, and says reached, missed or not compared."""
    outcomes = [outcome_of(report, 0.7), outcome_of(report, 0.1234)]
    header, rule, first, second = report.format_table(outcomes, quick=False).splitlines()
    assert header.split() == ['task', 'model', 'metric', 'score', 'target', 'training', 'test']
    assert set(rule) == {'-'}
    assert first.split()[-5:] == ['0.700', '0.60', '2:05', '0:09', 'reached']
    assert second.split()[-5:] == ['0.123', '0.60', '2:05', '0:09', 'MISSED']
    quick = report.format_table(outcomes, quick=True)
    assert quick.count('quick run, not compared') == 2
    assert 'MISSED' not in quick and 'reached' not in quick


def test_the_page_is_self_contained(report, tmp_path):
    """The page embeds its pictures, refers to nothing outside and escapes its text."""
    outcome = outcome_of(report, 0.3)
    curves = tmp_path / 'curves.png'
    report.plot_curves(curves, [(10, 2.0), (40, 0.5)], [(20, 0.4), (40, 0.8)], outcome)
    assert min(picture_size(curves)) > 300
    page = tmp_path / 'report.html'
    report.write_page(page, [outcome], [('One', 'a < b', [('Loss', curves)])], quick=False)
    text = page.read_text()
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(picture) == curves.read_bytes()
    assert 'http' not in text and '<script' not in text and 'href' not in text
    assert 'A &lt;model&gt;' in text and 'a &lt; b' in text
    assert '>MISSED<' in text and '>0.300<' in text


def test_annotated_images_are_drawn(report, tmp_path):
    """A COCO file's images become a picture in which the boxes' colours appear."""
    cv2.imwrite(str(tmp_path / '1.jpg'), np.full((60, 80, 3), 128, dtype=np.uint8))
    square = [10, 10, 40, 10, 40, 40, 10, 40]
    annotations = tmp_path / 'instances.json'
    annotations.write_text(
        json.dumps(
            {
                'images': [{'id': 7, 'file_name': '1.jpg', 'height': 60, 'width': 80}],
                'annotations': [
                    {
                        'image_id': 7,
                        'category_id': 5,
                        'bbox': [10, 10, 30, 30],
                        'segmentation': [square],
                    }
                ],
                'categories': [{'id': 3, 'name': 'a'}, {'id': 5, 'name': 'b'}],
            }
        )
    )
    images, things = report.read_coco(annotations)
    (thing,) = things[images[0]['id']]
    assert thing.label == 1 and thing.box == (10, 10, 40, 40) and thing.mask.sum() == 900
    out = tmp_path / 'data.png'
    meta = {'classes': ('a', 'b'), 'palette': [(0, 255, 0), (255, 0, 0)]}
    report.plot_data(out, tmp_path, annotations, meta)
    blue, green, red = np.moveaxis(cv2.imread(str(out)).astype(int), 2, 0)
    assert ((red > 150) & (green < 100) & (blue < 100)).sum() > 1000
    assert not ((green > 150) & (red < 100) & (blue < 100)).any()


def test_features_are_drawn(report, tmp_path):
    """Features of (C, H, W) become a picture beside the image."""
    feature = np.zeros((8, 6, 10), dtype=np.float32)
    feature[:4, :, 5:] = 1
    out = tmp_path / 'features.png'
    report.plot_features(out, np.zeros((60, 80, 3), dtype=np.uint8), [feature, feature])
    assert min(picture_size(out)) > 200


@pytest.fixture
def staged(demo, report, monkeypatch, tmp_path):
    """The demo with training, testing and drawing replaced by their results."""

    class Staged:
        score = 0.9
        commands = []

        def run(self, *args):
            monkeypatch.setattr(sys, 'argv', ['demo.py', '--work-dir', str(tmp_path), *args])
            with pytest.raises(SystemExit) as stop:
                demo.main()
            return stop.value.code

    state = Staged()
    state.commands = []

    def run_tool(name, config, *args, **told):
        state.commands.append((name, config, *map(str, args)))
        work_dir = Path(args[args.index('--work-dir') + 1])
        key = next(task.key for task in demo.TASKS.values() if config.endswith(task.config))
        if name == 'train.py':
            work_dir.mkdir(parents=True, exist_ok=True)
            (work_dir / 'last_checkpoint').write_text(str(work_dir / 'last.pth'))
        else:
            result = work_dir / '20260101_000000' / '20260101_000000.json'
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps({key: state.score, 'time': 0.1}))
        return 61.0

    monkeypatch.setattr(demo, 'run_tool', run_tool)
    monkeypatch.setattr(demo, 'make_demo_data', lambda out: True)
    monkeypatch.setattr(demo, 'draw_data', lambda out: ('The data', 'text', []))
    monkeypatch.setattr(demo, 'draw', lambda name, *args: (name, 'text', []))
    return state


def test_the_demo_tests_the_saved_checkpoint_and_exits_by_its_score(staged, tmp_path, capsys):
    """The score is the test run's; the demo exits with 0 where it reaches its target, else 1."""
    assert staged.run('--task', 'det') == 0
    assert [command[0] for command in staged.commands] == ['train.py', 'test.py']
    assert staged.commands[1][2] == str(tmp_path / 'det' / 'last.pth')
    assert 'reached' in capsys.readouterr().out
    staged.score = 0.1
    assert staged.run('--task', 'det') == 1
    assert 'MISSED' in capsys.readouterr().out
    assert '>MISSED<' in (tmp_path / 'report.html').read_text()


def test_a_quick_demo_compares_nothing(staged, capsys):
    """With --quick the training is cut and a low score is no failure, for all three tasks."""
    staged.score = 0.0
    assert staged.run('--task', 'all', '--quick') == 0
    trained = [command for command in staged.commands if command[0] == 'train.py']
    assert len(trained) == 3 and all('--cfg-options' in command for command in trained)
    assert capsys.readouterr().out.count('quick run, not compared') == 3


def test_quick_options_fit_the_configs(demo):
    """The options of a quick run name keys that the configs have."""
    from mmengine.config import Config

    for task in demo.TASKS.values():
        cfg = Config.fromfile(REPO / 'configs' / task.config)
        for option in task.quick:
            key = option.partition('=')[0]
            *parents, last = key.split('.')
            node = cfg
            for parent in parents:
                node = node[parent]
            assert last in node or last == 'indices', key


def test_a_failing_tool_ends_the_demo_in_a_sentence(demo, monkeypatch, tmp_path, capsys):
    """A training that fails is named, with its exit code, and the demo exits with 1."""
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--work-dir', str(tmp_path)])
    monkeypatch.setattr(demo, 'make_demo_data', lambda out: True)
    monkeypatch.setattr(demo, 'draw_data', lambda out: ('The data', 'text', []))
    monkeypatch.setattr(demo.sys, 'executable', 'false')
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert re.search(r'error: .*train\.py .* failed with exit code 1', error)
    assert 'Traceback' not in error


def test_a_test_without_a_score_is_not_taken_for_one(demo, report, tmp_path):
    """Without a test run there is an error; one that found nothing has no score and fails."""
    from pvt_mm.errors import UserError

    with pytest.raises(UserError, match='There is no'):
        demo.read_score(tmp_path, 'mIoU')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run.json').write_text('{"time": 1}')
    score = demo.read_score(tmp_path, 'mIoU')
    assert demo.exit_code([outcome_of(report, score)], quick=False) == 1
    assert ' -  ' in report.format_table([outcome_of(report, score)], quick=True)
