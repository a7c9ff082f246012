"""What a training tells before its first iteration."""

import io
import logging
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import forget_runs, run_main, write_config
from hypothesis import given
from hypothesis import strategies as st
from mmengine.utils import ManagerMixin
from reference import SMALL
from torch import nn

from pvt_mm import PVT
from pvt_mm.datasets.coco_file import Census
from pvt_mm.engine import training_summary

SOUND = training_summary.Facts(
    config='configs/a.py',
    model='RetinaNet, PVT small',
    weights=['PVT: loaded 10 of 10 backbone tensors'],
    per_device=2,
    devices=8,
    accumulation=1,
    base_batch=16,
    scaled=False,
    optimizer='AdamW',
    lr=1e-4,
    weight_decay=0.05,
    precision='float32',
    device='8 x GPU',
    data=[training_summary.Data('train', 'CocoDataset', 118287, 80)],
    work_dir='work_dirs/a',
    transformer=True,
)


@pytest.mark.parametrize(
    'changes, texts',
    [
        (dict(), []),
        (dict(weights=[]), ['no weights are loaded', '--load-from FILE']),
        (dict(optimizer='SGD'), ['SGD', 'AdamW']),
        (dict(optimizer='SGD', transformer=False), []),
        (dict(devices=1), ['for a batch of 16, this one is 2', '--auto-scale-lr']),
        (dict(devices=1, scaled=True), []),
        (dict(devices=1, accumulation=8), []),
        (dict(accumulation=2), ['this one is 32', 'optimizer.lr=0.0002']),
        (dict(accumulation=2, scaled=True), ['leaves accumulation out', 'optimizer.lr=0.0002']),
        (dict(devices=1, base_batch=0), []),
        (dict(per_device=1, devices=16, batch_norms=3), ['3 BatchNorm layers', 'norm_eval=True']),
        (dict(per_device=1, devices=16), []),
        (dict(batch_norms=3), []),
        (dict(slow_bf16=True), ['no instructions for bf16', 'leave out --amp']),
    ],
)
def test_each_trap_is_told_with_its_way_out(changes, texts):
    """One sentence for a trap that the training is in, and none for the others."""
    found = training_summary.warnings_of(replace(SOUND, **changes))
    assert len(found) == bool(texts)
    for text in texts:
        assert text in found[0]


OBJECTS = training_summary.Data('train', 'CocoDataset', 10, 2)


@pytest.mark.parametrize(
    'used, left_out, texts',
    [
        (dict(cat=5, dog=1), dict(), []),
        (dict(cat=5, dog=1), dict(crowd=6), []),
        (dict(cat=5, dog=1), dict(crowd=7), ['most objects of the training data are left out']),
        (dict(cat=5, dog=0), dict(), ['no object of class dog: nothing of it']),
        (dict.fromkeys('abcdefg', 0) | dict(x=1), dict(), ['of class a, b, c, d, e, ...: ']),
    ],
)
def test_what_is_not_learnt_is_told(used, left_out, texts):
    """Of the training data; the rows count the objects, also of the validation."""
    objects = Census(Counter(used), Counter(left_out))
    for split in ('train', 'val'):
        data = OBJECTS._replace(split=split, objects=objects)
        facts = replace(SOUND, data=[data])
        found = training_summary.warnings_of(facts)
        assert len(found) == (len(texts) if split == 'train' else 0)
        assert all(text in found[0] for text in texts if split == 'train')
        rows = ' '.join(training_summary.summary_lines(facts))
        assert f'{sum(used.values())} objects used' in rows
        assert ('6 left out (6 crowd)' in rows) == (left_out == dict(crowd=6))


WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=300)


@given(config=WORDS, model=WORDS, work_dir=WORDS, width=st.integers(60, 100))
def test_the_box_is_even_and_no_wider_than_asked(config, model, work_dir, width):
    """All lines are as long as each other, whatever is in them, and warnings are in the box."""
    facts = replace(SOUND, config=config, model=model, work_dir=work_dir, weights=[], devices=1)
    for ascii_only in (False, True):
        box = training_summary.summary_lines(facts, width, ascii_only)
        assert len({len(line) for line in box}) == 1
        assert len(box[0]) <= width
        assert sum('WARNING' in line for line in box) >= 2
        assert ''.join(box).isascii() is ascii_only
        inside = ''.join(line[14:].strip(' │|') for line in box)
        assert work_dir.strip('|') in inside, 'a long path is folded, and none of it lost'


@pytest.mark.parametrize(
    'terminal, file, lines',
    [('utf-8', 'utf-8', True), ('ascii', 'utf-8', False), ('utf-8', 'latin-1', False)],
)
def test_box_characters_only_where_they_can_be_written(terminal, file, lines, monkeypatch):
    """Neither the terminal nor the log file is given a character that it cannot hold."""
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding=terminal))
    monkeypatch.setattr(training_summary.locale, 'getpreferredencoding', lambda _: file)
    assert training_summary.can_draw_lines() is lines


def test_batch_norms_that_train_are_counted():
    """Those in eval mode see no batch; LayerNorm never does."""
    layers = [nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval(), nn.LayerNorm(2)]
    assert [training_summary._sees_its_batch(layer) for layer in layers] == [True, False, False]


def pretend_bf16_is_slow(monkeypatch, slow):
    monkeypatch.setattr(training_summary, 'bf16_is_slow_on_cpu', lambda: slow)


@pytest.mark.parametrize('slow', [False, True])
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_bf16_is_slow_on_some_cpus(slow, dtype, device, monkeypatch):
    """The warning is for a backbone in bf16, on a CPU, and one that lacks it."""
    pretend_bf16_is_slow(monkeypatch, slow)
    backbone = PVT(arch=SMALL, compute_dtype=dtype).to(device)
    expected = slow and dtype == 'bfloat16' and device == 'cpu'
    assert training_summary._has_slow_bf16(backbone) is expected


def box_of(work_dir):
    """The lines of the box in the newest log of a training."""
    logging.shutdown()
    log = max(work_dir.glob('*/*.log')).read_text(encoding='utf-8').splitlines()
    start = next(i for i, line in enumerate(log) if line[:3] == '┌─ ')
    end = next(i for i, line in enumerate(log) if line.startswith('└'))
    assert not any('Epoch(train)' in line or 'Iter(train)' in line for line in log[:start])
    return ' '.join(line.strip('│ ') for line in log[start:end])


def test_a_training_logs_what_it_is_given(trained, demo_data, tmp_path, monkeypatch):
    """From nothing it warns; from a checkpoint it counts the tensors that were really written."""
    first = trained('det')
    box = box_of(first.work_dir)
    assert 'no weights are loaded' in box and 'weights     none' in box
    assert 'bf16' not in box
    assert 'train       6 images, 5 classes (CocoDataset)' in box
    assert '2 per device x 1 device(s) x 1 iteration(s)' in box
    assert 'for a batch of 16; not scaled' in box
    # The head of another number of classes keeps its own tensors, and the box says so.
    weights = torch.load(first.checkpoint, weights_only=False)['state_dict']
    rest = [key for key in weights if not key.startswith('backbone.')]
    own = len(weights) - len(rest)
    head = ['bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias']
    for key in head:
        weights[key] = weights[key][:9]
    torch.save({'state_dict': weights}, tmp_path / 'other.pth')
    forget_runs(ManagerMixin)
    pretend_bf16_is_slow(monkeypatch, True)
    run_main(
        tmp_path, 'train', first.config, *first.data, '--work-dir', tmp_path / 'run',
        '--load-from', tmp_path / 'other.pth', '--auto-scale-lr', '--amp',
    )  # fmt: skip
    box = box_of(tmp_path / 'run')
    assert 'bfloat16 in the backbone' in box and 'no instructions for bf16' in box
    assert f'loaded {own} of {own} backbone tensors' in box
    assert f'the rest of the model: loaded {len(rest) - 2} of {len(rest)} tensors' in box
    assert 'load_from: ' in box and 'no weights' not in box
    assert 'scaled by --auto-scale-lr from 0.00015 for a batch of 16' in box


def test_a_segmentor_and_its_pretrained_backbone(trained, tmp_path, demo_data):
    """The file of init_cfg is named, and a resumed training says from what it goes on."""
    first = trained('seg')
    assert 'FPN' in box_of(first.work_dir) or 'EncoderDecoder' in box_of(first.work_dir)
    init = 'model["backbone"]["init_cfg"] = dict(type="Pretrained", checkpoint="b.pth")'
    weights = torch.load(first.checkpoint, weights_only=False)['state_dict']
    bare = {k[9:]: v for k, v in weights.items() if k.startswith('backbone.')}
    torch.save(bare, tmp_path / 'b.pth')
    config = write_config(tmp_path, 'seg', init)
    run_main(tmp_path, 'train', config, *first.data, '--work-dir', tmp_path / 'run')
    box = box_of(tmp_path / 'run')
    assert f'loaded {len(bare)} of {len(bare)} backbone tensors' in box and 'b.pth' in box
    assert 'no weights' not in box
    run_main(tmp_path, 'train', config, *first.data, '--work-dir', tmp_path / 'run', '--resume')
    box = box_of(tmp_path / 'run')
    assert 'resumed: ' in box and 'b.pth' not in box and f'loaded {len(bare)} of' in box
