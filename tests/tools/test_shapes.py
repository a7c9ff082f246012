"""Random backbones on random images: the documented features or the documented error."""

import dataclasses
import importlib.util
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ARCHS, REPO, SMALL, small

from pvt_mm import PVT
from pvt_mm.models.fast import cpu

spec = importlib.util.spec_from_file_location('check_shapes', REPO / 'tests/stress/check_shapes.py')
tool = importlib.util.module_from_spec(spec)
sys.modules['check_shapes'] = tool  # where dataclasses look for the module of a class
spec.loader.exec_module(tool)

each_of_four = {'min_size': 4, 'max_size': 4}


@st.composite
def archs(draw, linear):
    """A custom architecture of one or two blocks per stage, as pairs that can be hashed."""
    heads = draw(st.lists(st.integers(1, 3), **each_of_four))
    widths = draw(st.lists(st.sampled_from([4, 8, 12]), **each_of_four))
    arch = {
        'dims': tuple(width * count for width, count in zip(widths, heads)),
        'num_heads': tuple(heads),
        'depths': tuple(draw(st.lists(st.integers(1, 2), **each_of_four))),
        'mlp_ratios': tuple(draw(st.lists(st.sampled_from([0.5, 1, 2]), **each_of_four))),
        'sr_ratios': tuple(draw(st.lists(st.sampled_from([1, 2, 4, 8]), **each_of_four))),
    }
    return tuple({**arch, 'linear': True}.items() if linear else arch.items())


@st.composite
def cases(draw):
    """Anything that tests/stress/check_shapes.py draws, with a custom architecture."""
    backbone, sr_mode, linear = draw(
        st.sampled_from(
            [
                ('PVT', 'conv', False),
                ('PVT', 'avg', False),
                ('PVT', 'max', False),
                ('PVTv2', 'conv', False),
                ('PVTv2', 'conv', True),
            ]
        )
    )
    return tool.Case(
        backbone=backbone,
        arch=draw(archs(linear)),
        out_indices=draw(st.sampled_from(tool.STAGES)),
        batch=draw(st.integers(1, 3)),
        height=draw(st.integers(1, 100)),
        width=draw(st.integers(1, 100)),
        precision=draw(st.sampled_from(list(tool.PRECISIONS))),
        training=draw(st.booleans()),
        layout=draw(st.sampled_from(tool.LAYOUTS)),
        values=draw(st.sampled_from(tool.VALUES)),
        channels=draw(st.sampled_from([3, 3, 3, 3, 3, 3, 3, 4])),
        sr_mode=sr_mode,
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=120, deadline=None)
@given(cases())
def test_features_or_the_documented_error(case):
    """Shapes, contiguity, finite features and gradients, or the error; nothing else ever."""
    _, fault = tool.run(case)
    assert not fault


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(32, 160), st.integers(32, 160))
def test_an_image_is_alone(case, height, width):
    """The rest of the batch and the size of the kernels' chunks change no feature."""
    case = dataclasses.replace(
        case, precision='fp32', training=False, channels=3, height=height, width=width, batch=3
    )
    assert tool.run(case) in [(tool.RIGHT, ''), (tool.SMALL, '')]


@pytest.mark.parametrize('variant', ['v1', 'v1_avg', 'v2', 'v2_li'])
@pytest.mark.parametrize('grad', [False, True])
def test_an_empty_batch_gives_empty_features(variant, grad):
    """No image is no error."""
    with torch.set_grad_enabled(grad):
        outs = small(variant)(torch.zeros(0, 3, 64, 96))
    assert [tuple(out.shape) for out in outs] == [
        (0, dim, 16 >> i, 24 >> i) for i, dim in enumerate(SMALL['dims'])
    ]


# What the check must notice

CASE = tool.Case('PVT', tuple(SMALL.items()), (0, 2), 2, 64, 96, seed=1)


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        (lambda outs: outs[:1], 'shapes'),
        (lambda outs: [out.double() for out in outs], 'features of'),
        (lambda outs: [out.mT.contiguous().mT for out in outs], 'not contiguous'),
        (lambda outs: [out / 0 for out in outs], 'not finite'),
        (lambda outs: [out + len(out) for out in outs], 'depends on the rest of the batch'),
        (lambda outs: [out + cpu.traits().chunk for out in outs], 'depends on the size of chunks'),
    ],
)
def test_wrong_features_are_noticed(monkeypatch, change, fault):
    """Each kind of wrong features has its own words, and the case counts as undocumented."""
    forward = PVT.forward
    monkeypatch.setattr(PVT, 'forward', lambda model, x: change(forward(model, x)))
    outcome, words = tool.run(CASE)
    assert outcome == tool.WRONG and fault in words


@pytest.mark.parametrize(
    ('changes', 'error', 'fault'),
    [
        ({}, RuntimeError('sizes do not match'), 'RuntimeError: sizes do not match'),
        ({'height': 31}, IndexError('needs images of at least'), 'IndexError'),
        ({'height': 31}, ValueError('something else'), 'ValueError: something else'),
        ({'height': 31}, None, 'accepted, though it should be refused: too small'),
    ],
)
def test_wrong_errors_are_noticed(monkeypatch, changes, error, fault):
    """An error of another class or with other words does not pass, nor does none at all."""

    def forward(model, x):
        if error:
            raise error
        return [torch.zeros(2, 16, 7, 24), torch.zeros(2, 40, 1, 6)]

    monkeypatch.setattr(PVT, 'forward', forward)
    outcome, words = tool.run(dataclasses.replace(CASE, **changes))
    assert outcome == tool.WRONG and fault in words


def test_the_table_counts_every_case(monkeypatch, capsys):
    """One row an architecture and precision, and exit code 1 where a case is undocumented."""
    drawn = [CASE, CASE, dataclasses.replace(CASE, height=8)]
    monkeypatch.setattr(sys, 'argv', ['check_shapes.py', '--cases', '3'])
    monkeypatch.setattr(tool, 'draw_cases', lambda count, seed: drawn[:count])
    for outs, code in ((PVT.forward, 0), (lambda model, x: [x], 1)):
        monkeypatch.setattr(PVT, 'forward', outs)
        with pytest.raises(SystemExit) as stop:
            tool.main()
        assert stop.value.code == code
        total = next(line for line in capsys.readouterr().out.splitlines() if line[:3] == 'all')
        assert total.split()[1:] == (['2', '1', '0', '0', '0'] if not code else ['0'] * 4 + ['3'])


def test_cases_are_drawn_for_every_arch_and_precision():
    """The seed decides; each published architecture gets its share, and most are accepted."""
    drawn = tool.draw_cases(1100, 0)
    assert drawn == tool.draw_cases(1100, 0) != tool.draw_cases(1100, 1)
    assert Counter(case.arch for case in drawn) == dict.fromkeys(ARCHS, 100)
    assert {case.precision for case in drawn} == set(tool.PRECISIONS)
    assert sum(tool.expected(case) == tool.RIGHT for case in drawn) > 700
