"""The measuring tools: what they count, compare, judge and print. No speed is tested here."""

import contextlib
import csv
import itertools
import math
import subprocess
import sys

import pytest
import torch
from conftest import forget_runs, load_tool
from mmengine.utils import ManagerMixin
from reference import ARCHS, REPO, backbone_class

from pvt_mm.apis.complexity import build_on_meta, multiply_adds
from pvt_mm.errors import UserError

sys.path.insert(0, str(REPO / 'tools' / 'benchmark'))  # as for a script in it
import benchmark
import benchmark_e2e
import benchmark_machine as machine
import benchmark_peers as peers
import benchmark_report as figures

sys.path.pop(0)
get_flops = load_tool('get_flops')


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a tool's main on arguments; returns its exit code, output and errors."""

    def main(module, *arguments):
        monkeypatch.setattr(sys, 'argv', ['tool', *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield main
    forget_runs(ManagerMixin)  # with the logger that benchmark_e2e keeps quiet


@pytest.fixture
def same_memory(monkeypatch):
    """Take 8 MiB for every side, which saves a process each."""
    monkeypatch.setattr(benchmark, 'peak_mib', lambda side, case, device: 8.0)


# Complexity


def test_multiply_adds_are_the_published():
    """All archs give the papers' figures within their rounding, but b5: 11.7 here, 11.8 there."""
    counts = {a: multiply_adds(build_on_meta(a), (224, 224)) / 1e9 for a in ARCHS}
    off = {a for a in ARCHS if abs(counts[a] - get_flops.PUBLISHED[a]) > 0.052}
    assert off == {'b5'}
    assert counts['small'] == pytest.approx(3.8, abs=0.05)
    assert counts['b5'] == pytest.approx(11.8, abs=0.1)


@pytest.mark.parametrize('size', [(224, 224), (256, 448)])
def test_every_matmul_is_counted(size):
    """The count is that of linear layers, convolutions and both matmuls of the attention."""
    arch = backbone_class('small').ARCHS['small']
    expected, tokens, before = 0, size[0] * size[1], 3
    for stage, (dim, depth) in enumerate(zip(arch['dims'], arch['depths'])):
        stride = 4 if stage == 0 else 2
        tokens //= stride**2
        expected += tokens * dim * before * stride**2
        keys, hidden = tokens // arch['sr_ratios'][stage] ** 2, dim * arch['mlp_ratios'][stage]
        reduction = tokens * dim**2 if arch['sr_ratios'][stage] > 1 else 0
        projections = 2 * tokens * dim**2 + 2 * keys * dim**2
        block = reduction + projections + 2 * tokens * keys * dim + 2 * tokens * dim * hidden
        expected += depth * block
        before = dim
    assert multiply_adds(build_on_meta('small'), size) == expected


def test_complexity_tool(run, tmp_path, monkeypatch):
    """The table has PVT and the others, in print, in a file and as a picture."""
    monkeypatch.setattr(get_flops, 'PLOTTED', ('b0', 'ResNet-50'))
    files = ('--csv', tmp_path / 'c.csv', '--plot', tmp_path / 'images' / 'c.png')
    names = ('b0', 'ResNet-50', 'Swin-T', 'ViT-S/16')
    code, out, _ = run(get_flops, '--names', *names, '--sizes', '224', '64x96', *files)
    assert code == 0 and '64x96' in out
    rows = {row[0]: row for row in csv.reader((tmp_path / 'c.csv').open())}
    assert rows['b0'][1:4] == ['3.4', '0.6', '0.57']
    assert float(rows['ResNet-50'][3]) == pytest.approx(4.1, abs=0.05)
    assert float(rows['ViT-S/16'][3]) == pytest.approx(4.6, abs=0.05), 'DeiT-S, attention included'
    assert (tmp_path / 'images' / 'c.png').read_bytes()[:4] == b'\x89PNG'


# Measuring


def test_table_csv_and_plot(run, tmp_path):
    """A small run prints a finite ratio and memory of processes of their own, and keeps them."""
    files = ('--csv', tmp_path / 'f' / 'b.csv', '--plot', tmp_path / 'b.png')
    small = ('--archs', 'b0', '--sizes', '32', '--runs', '2', '--anyway')
    code, out, _ = run(benchmark, *small, *files)
    assert code == 0 and 'forward b0 1x32x32 float32' in out
    (row,) = figures.read_csv(tmp_path / 'f' / 'b.csv')
    assert row.case == figures.Case('b0', '32x32') and (row.peer, row.runs) == ('mmdet', 2)
    measured = (row.ratio, row.memory, row.gemm_share)
    assert all(math.isfinite(figure) and figure > 0 for figure in measured)
    assert row.ours_ms_low <= row.ours_ms <= row.ours_ms_high
    assert (tmp_path / 'b.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
    ('arch', 'peer', 'work'),
    [
        ('tiny', 'mmdet', ('train', 'float32')),
        ('b0', 'mmdet', ('train', 'bfloat16')),
        ('b0', 'huggingface', ('train', 'float32')),
        ('b2_li', 'huggingface', ('forward', 'bfloat16')),
    ],
)
def test_every_kind_of_work_and_peer(run, same_memory, tmp_path, arch, peer, work):
    """Peers hold the same weights, so that their outputs pass the comparison before the timing."""
    if not peers.is_installed(peer):
        pytest.skip(f'{peer} is optional')
    arguments = ('--archs', arch, '--peers', peer, '--mode', work[0], '--dtype', work[1])
    more = ('--sizes', '64', '--runs', '1', '--anyway', '--csv', tmp_path / 'b.csv')
    assert run(benchmark, *arguments, *more)[0] == 0
    (row,) = figures.read_csv(tmp_path / 'b.csv')
    assert (row.mode, row.dtype, row.peer, row.memory) == (*work, peer, 1.0)
    assert row.ratio > 0


def test_a_wrong_model_is_not_timed(run, monkeypatch):
    """Where one row of the features is off, nothing is timed and the stage is named."""
    honest = peers.Side.ask

    def ask(side, request):
        assert request == 'outputs', 'timed all the same'
        *outs, last = honest(side, request)
        if side.name == peers.OURS:
            last[..., -1, :] += 0.1 * last.std()
        return [*outs, last]

    monkeypatch.setattr(peers.Side, 'ask', ask)
    code, _, err = run(benchmark, '--archs', 'b0', '--sizes', '64', '--anyway')
    assert code == 1 and 'stage 3 differs from that of mmdet' in err


@pytest.mark.parametrize('peer', ['mmdet', 'huggingface', 'timm'])
def test_a_peer_runs_without_pvt_mm(peer):
    """Neither what the process of a side starts with nor building the peer loads any of it."""
    if not peers.is_installed(peer):
        pytest.skip(f'{peer} is optional')
    code = 'import sys, benchmark_side as side\n'
    code += f'side.BUILDERS[{peer!r}]({peers.settings_of(peer, "b0")!r})\n'
    code += "print([name for name in sys.modules if name.startswith('pvt_mm')])"
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=REPO / 'tools' / 'benchmark',
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == '[]'


def test_a_process_that_breaks_off(capfd):
    """One sentence names the side; the reason stands above it."""
    sentence = 'The process of pvt_mm broke off; see above'
    side = benchmark.start(peers.OURS, figures.Case('b0', '8x8'), 'cpu')
    with side, pytest.raises(UserError, match=sentence):
        side.ask('seconds')
    assert 'needs images of at least 29 x 29 pixels' in capfd.readouterr().err


def test_a_process_that_does_not_start(monkeypatch):
    """Nor does one that ends before it has heard what to build leave a traceback."""
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    with pytest.raises(UserError, match='The process of pvt_mm broke off'):
        benchmark.start(peers.OURS, figures.Case('b0', '32x32'), 'cpu')


def test_memory_is_the_peak_over_the_model():
    """Training saves more than a forward pass does, and what was there before is not counted."""
    case = figures.Case('b0', '128x128')
    forward = benchmark.peak_mib(peers.OURS, case, 'cpu')
    train = benchmark.peak_mib(peers.OURS, case._replace(mode='train'), 'cpu')
    assert 1 < forward < train < 200
    held = torch.zeros(2**23)  # 32 MiB
    # The system counts pages in batches.
    assert 31 <= machine.peak_mib(held.clone, 'cpu') < 40


def test_memory_is_the_median_of_processes(monkeypatch):
    """One that fares worse than others does not decide."""
    peaks = iter([9.0, 5.0, 6.0])

    class Fake(contextlib.nullcontext):
        def ask(self, request):
            return next(peaks)

        def __enter__(self):
            return self

    monkeypatch.setattr(benchmark, 'start', lambda side, case, device: Fake())
    assert benchmark.peak_mib(peers.OURS, figures.Case('b0', '128x128'), 'cpu') == 6


def test_busy_machine_is_refused(run, monkeypatch):
    """One sentence says what is wrong and what to do; --anyway measures all the same."""
    monkeypatch.setattr(machine.OtherLoad, 'cores', lambda self: 1.0)
    monkeypatch.setattr(benchmark, 'measure', lambda *_: [])
    code, _, err = run(benchmark)
    assert code == 1 and err.count('\n') == 1
    assert 'Other processes use 1.0 of' in err and '--anyway' in err
    assert run(benchmark, '--anyway')[0] == 0


@pytest.mark.skipif(sys.platform != 'linux', reason='read from /proc')
def test_another_process_is_seen():
    """A process that only loops counts as a busy core, or as much of one as it gets."""
    with subprocess.Popen([sys.executable, '-c', 'while True: pass']) as other:
        try:
            with pytest.raises(UserError, match='Other processes use'):
                machine.check_idle()
        finally:
            other.kill()


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (('--archs', 'b9'), '--archs: there is no b9; choose of tiny, small'),
        (('--peers', 'torch'), '--peers: there is no torch; choose of mmdet, huggingface'),
        (('--sizes', '4x'), '4x is no image size'),
        (('--check', '--archs', 'b5'), 'No row to be reached is left'),
        (('--from-csv', 'none.csv'), 'There is no file none.csv'),
    ],
)
def test_bad_arguments(run, arguments, sentence):
    """Each ends in one sentence and exit code 1, before anything is measured."""
    code, _, err = run(benchmark, *arguments)
    assert code == 1 and sentence in err and err.count('\n') == 1


# Whole models


def test_whole_models(run, tmp_path):
    """A segmentor trains on both backbones, whose features are compared first."""
    config = REPO / 'configs' / 'fpn_pvt_t_ade20k_40k.py'
    work = ('--size', '64', '--runs', '1', '--anyway', '--works', 'train')
    code, out, err = run(benchmark_e2e, '--configs', config, *work, '--csv', tmp_path / 'e.csv')
    assert code == 0, err
    head, *rows = csv.reader((tmp_path / 'e.csv').open())
    assert [row[1] for row in rows] == ['train 1x64'] and rows[0][4] in out
    assert all(float(figure) > 0 for row in rows for figure in row[2:7])
    assert all(row[7].endswith('%') for row in rows)


@pytest.mark.parametrize('side', benchmark_e2e.SIDES)
def test_a_detector_makes_its_first_step(run, side):
    """What `start` times in a process of its own; its images have boxes and masks."""
    config = REPO / 'configs' / 'mask_rcnn_pvt_v2_b0_fpn_1x_coco.py'
    code, _, err = run(benchmark_e2e, '--configs', config, '--size', '64', '--first-step', side)
    assert code == 0, err


def test_only_published_archs_have_a_peer(run, small_config):
    """A custom arch ends in one sentence."""
    code, _, err = run(benchmark_e2e, '--configs', small_config('det'), '--anyway')
    assert code == 1 and 'choose another config' in err


# Judging


def made_up(target, **changes):
    """A row that reaches its target's aim, but for the changes."""
    aim = target.aim or target.least
    row = figures.Row(*target.case, target.peer, 5, *(10.0,) * 6, ratio=aim)
    row.ours_mib, row.peer_mib, row.gemm_share = 100 * (target.memory or 1), 100.0, 0.8
    for name, value in changes.items():
        setattr(row, name, value)
    return row


MMDET = [target for target in figures.check_targets() if target.peer == 'mmdet']


def test_verdicts():
    """Least and aim are included; too much memory falls short however fast the row is."""
    target = MMDET[0]
    assert (target.least, target.aim, target.memory) == (3.1, 3.6, 0.18)
    assert figures.judge(target, made_up(target)) == 'aim'
    assert figures.judge(target, made_up(target, ratio=3.59)) == 'least'
    assert figures.judge(target, made_up(target, ratio=3.09)) == 'SHORT'
    assert figures.judge(target, made_up(target, ours_mib=18.1)) == 'SHORT'
    assert figures.judge(target, made_up(target, peer_mib=None)) == 'not measured'
    assert figures.judge(target, None) == 'not measured'
    (gemm, *_) = [target for target in MMDET if target.figure == 'gemm_share']
    assert figures.judge(gemm, made_up(gemm, gemm_share=0.54, ratio=9.0)) == 'SHORT'


def test_check_from_a_file(run, tmp_path):
    """All reached: 0. One short: 1, named. The last of several measurements counts."""
    path, check = tmp_path / 'b.csv', ('--check', '--peers', 'mmdet', '--from-csv')
    figures.append_csv(path, [made_up(target) for target in MMDET if target.figure == 'ratio'])
    code, out, _ = run(benchmark, *check, path)
    assert code == 0 and '14 rows: 14 reach the aim, 0 the least, 0 fall short' in out
    figures.append_csv(path, [made_up(MMDET[2], ratio=1.9)])
    code, out, _ = run(benchmark, *check, path)
    assert code == 1 and 'falls short: forward small 1x512x512 float32 against mmdet\n' in out
    figures.append_csv(path, [made_up(MMDET[2], ratio=2.0)])
    code, out, _ = run(benchmark, *check, path)
    assert code == 0 and '1 the least' in out
    assert run(benchmark, *check, path, '--peers', 'huggingface')[0] == 1, 'rows are missing'
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    assert 'its columns differ' in run(benchmark, *check, tmp_path / 'other.csv')[2]


def test_sweep_covers_what_is_promised(run, tmp_path):
    """Every arch, size and batch is a row; only those slower than the peer are printed."""
    targets = list(figures.sweep_targets())
    cases = {target.case for target in targets}
    sizes, batches = ('64x64', '224x224', '512x512'), (1, 2, 8)
    assert len(cases) == 11 * 10 + 2
    assert cases >= {figures.Case(*c) for c in itertools.product(ARCHS, sizes, batches)}
    figures.append_csv(tmp_path / 'b.csv', [made_up(target) for target in targets])
    figures.append_csv(tmp_path / 'b.csv', [made_up(targets[3], ratio=0.9)])
    code, out, _ = run(benchmark, '--sweep', '--archs', 'tiny', '--from-csv', tmp_path / 'b.csv')
    assert code == 1 and 'falls short: forward tiny 1x224x224 float32 against mmdet' in out
    assert out.count('against') == 2 and '11 rows: 10 reach the aim' in out
