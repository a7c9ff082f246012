"""tools/model_converters/convert_checkpoint.py: any format in, any out, and a report of a file."""

import builtins
import errno
import os

import pytest
import torch
from reference import V1, official_weights

from pvt_mm import PVTv2, convert_checkpoint
from pvt_mm.archs import MIT_ARCHS
from pvt_mm.checkpoint.convert import bare_backbone
from pvt_mm.checkpoint.safe_load import read_checkpoint

FORMATS = ('official', 'timm', 'huggingface', 'mmdet', 'pvt_mm')
PAIRS = [
    (arch, fmt) for arch in ('tiny', 'b0') for fmt in FORMATS if not (fmt == 'timm' and arch in V1)
]


@pytest.fixture
def convert(run_tool):
    """Run the tool: convert(IN, OUT, '--to', FORMAT)."""
    return lambda *arguments: run_tool('convert_checkpoint', *arguments)


@pytest.fixture
def fails(convert, capsys):
    """Run the tool, expect exit code 1, and return the one sentence that it printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            convert(*arguments)
        assert stopped.value.code == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line.removeprefix('error: ')

    return run


@pytest.fixture
def weights(tmp_path):
    """Write the classification weights of an arch: weights('b0') -> path and tensors."""

    def write(arch):
        tensors = official_weights(arch, classification=True)
        path = tmp_path / f'{arch}.pth'
        torch.save(tensors, path)
        return path, tensors

    return write


@pytest.fixture
def detector(tmp_path):
    """A detector's checkpoint as mmdet 2.x wrote it: meta, optimiser, backbone, neck and head."""
    backbone = {f'backbone.{k}': v for k, v in official_weights('b0').items()}
    others = {'neck.a': torch.ones(2), 'neck.b': torch.ones(3), 'bbox_head.c': torch.ones(4)}
    path = tmp_path / 'detector.pth'
    meta = {'CLASSES': ('cat', 'dog')}
    torch.save({'meta': meta, 'state_dict': backbone | others, 'optimizer': {}}, path)
    return path


def equal(tensors, others):
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[key], others[key]) for key in tensors
    )


def without_classifier(tensors):
    return convert_checkpoint(bare_backbone(tensors), to='official')


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize(('arch', 'fmt'), PAIRS)
def test_there_and_back(arch, fmt, suffix, weights, convert, tmp_path):
    """Files in every format, of both kinds, turn back into the same tensors, bit for bit."""
    if suffix == 'safetensors':
        pytest.importorskip('safetensors')
    path, tensors = weights(arch)
    there, back = tmp_path / f'there.{suffix}', tmp_path / 'back.pth'
    convert(path, there, '--to', fmt, '--arch', arch)
    assert equal(read_checkpoint(there), convert_checkpoint(tensors, to=fmt))
    convert(there, back, '--to', 'official')
    expected = without_classifier(tensors) if fmt == 'mmdet' else tensors  # it has none
    assert equal(read_checkpoint(back), expected)
    assert sorted(os.listdir(tmp_path)) == sorted({path.name, there.name, back.name})


def test_a_detector_keeps_its_head_and_meta_data(detector, convert, tmp_path):
    """A whole model's other parts stay as they are; the training state is left out."""
    convert(detector, tmp_path / 'out.pth', '--to', 'mmdet')
    out = read_checkpoint(tmp_path / 'out.pth')
    assert set(out) == {'meta', 'state_dict'} and out['meta'] == {'CLASSES': ('cat', 'dog')}
    whole = read_checkpoint(detector)
    assert equal(out['state_dict'], convert_checkpoint(whole, to='mmdet'))


def test_backbone_only(detector, weights, convert, tmp_path):
    """Heads, necks, prefix and classifier go; what is left loads as a backbone's own weights."""
    plain = convert_checkpoint(official_weights('b0'))
    for path, fmt in ((detector, 'mmdet'), (detector, 'pvt_mm'), (weights('b0')[0], 'timm')):
        convert(path, tmp_path / 'out.pth', '--to', fmt, '--backbone-only')
        assert equal(read_checkpoint(tmp_path / 'out.pth'), convert_checkpoint(plain, to=fmt))


def test_inspect_a_published_file(weights, convert, capsys):
    """Format, arch, size, what would load and what would be dropped."""
    convert(weights('tiny')[0], '--inspect')
    report = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    titles = ['format', 'arch', 'backbone', 'prefix', 'would load', 'others', 'unknown']
    assert list(report) == titles
    assert report['format'] == 'official'
    assert report['arch'].startswith('PVT tiny (depths (2, 2, 2, 2)')
    assert report['backbone'] == '156 tensors, 12.71 M parameters'
    assert '156 of 156' in report['would load'] and 'cls_token' in report['would load']
    assert report['others'] == report['unknown'] == report['prefix'] == 'none'


def test_inspect_a_detector(detector, convert, capsys):
    """Other parts are counted."""
    convert(detector, '--inspect', '--arch', 'b0')
    out = capsys.readouterr().out
    assert '176 of 176' in out and '2 in neck, 1 in bbox_head' in out


def test_inspect_weights_that_would_not_load(tmp_path, convert, capsys):
    """A missing tensor and a key of no format are both named."""
    tensors = convert_checkpoint(official_weights('b0'))
    del tensors['stages.2.blocks.1.mlp.fc2.bias']
    torch.save(tensors | {'stages.0.extra': torch.ones(1)}, tmp_path / 'cut.pth')
    convert(tmp_path / 'cut.pth', '--inspect')
    out = capsys.readouterr().out
    assert '175 of 176 tensors fit; stages.2.blocks.1.mlp.fc2.bias is missing' in out
    assert '1 keys, such as stages.0.extra' in out


def test_inspect_other_inputs_and_no_published_arch(tmp_path, convert, capsys):
    """Weights of four input channels, and of a custom arch, are told as well."""
    tensors = official_weights('b0')
    tensors['patch_embed1.proj.weight'] = torch.zeros(32, 4, 7, 7)
    torch.save(tensors, tmp_path / 'rgbd.pth')
    convert(tmp_path / 'rgbd.pth', '--inspect')
    assert '176 of 176' in capsys.readouterr().out
    fewer = {key: value for key, value in tensors.items() if 'block4.1' not in key}
    torch.save(fewer, tmp_path / 'custom.pth')
    convert(tmp_path / 'custom.pth', '--inspect')
    assert 'PVTv2 of no published arch (depths (2, 2, 2, 1)' in capsys.readouterr().out


def test_inspect_of_what_people_bring(weights, tmp_path, convert, fails, capsys):
    """Prefixes, dicts, averages, SegFormer's encoder: named as what they are, or asked about."""
    tensors = official_weights('b0')
    students = {f'student.net.{key}': value for key, value in tensors.items()}
    teachers = {f'teacher.net.{key}': value for key, value in tensors.items()}
    streams = {key.replace('student', 'rgb'): value for key, value in students.items()}
    streams |= {key.replace('teacher', 'depth'): value for key, value in teachers.items()}
    with torch.device('meta'):
        shapes = convert_checkpoint(PVTv2(MIT_ARCHS['mit_b0']).state_dict(), to='official')
    mit = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    for name, file, words in (
        ('net', {'net': {f'_orig_mod.{k}': v for k, v in tensors.items()}}, ['prefix      net.']),
        ('smp', {f'encoder.{k}': v for k, v in tensors.items()}, ['prefix      encoder.']),
        (
            'ema',
            students | teachers,
            ['teacher.net.: averaged weights', 'there  student.net. (PVT'],
        ),
        ('mit', mit, ["arch        SegFormer's mit_b0 (", 'PVTv2 with arch=dict(', '176 of 176']),
    ):
        torch.save(file, tmp_path / f'{name}.pth')
        convert(tmp_path / f'{name}.pth', '--inspect')
        out = capsys.readouterr().out
        assert all(word in out for word in words), out
        assert '176 of 176 backbone tensors' in out
    torch.save(streams, tmp_path / 'two.pth')
    for arguments in (('--inspect',), (tmp_path / 'out.pth', '--to', 'timm', '--backbone-only')):
        assert '--prefix' in fails(tmp_path / 'two.pth', *arguments)
        convert(tmp_path / 'two.pth', *arguments, '--prefix', 'depth.net.')
        out = capsys.readouterr().out
        assert "depth.net.: 'depth.net.' is asked for" in out or '176 tensors in timm format' in out
    assert equal(read_checkpoint(tmp_path / 'out.pth'), convert_checkpoint(tensors, to='timm'))
    assert 'not of' in fails(tmp_path / 'mit.pth', '--inspect', '--arch', 'b0')


def test_errors_are_one_sentence(weights, fails, tmp_path):
    """Bad arguments and files are refused, each with the way out; nothing is written."""
    path, _ = weights('tiny')
    out = tmp_path / 'out.pth'
    (tmp_path / 'foreign.pth').write_bytes(b'no checkpoint')
    torch.save({'conv1.weight': torch.ones(1)}, tmp_path / 'resnet.pth')
    before = sorted(os.listdir(tmp_path))
    for arguments, message in (
        ((path, out, '--to', 'timm'), 'timm has only PVTv2'),
        ((path, out, '--to', 'keras'), "no format 'keras'; choose one of"),
        ((path, out, '--to', 'mmdet', '--arch', 'b1'), "not of 'b1'"),
        ((path, out), 'Give OUT and --to FORMAT'),
        ((path, '--to', 'mmdet'), 'Give OUT and --to FORMAT'),
        ((path, out, '--inspect'), '--inspect writes nothing'),
        ((path, tmp_path / 'out.onnx', '--to', 'mmdet'), 'must end in .pth or .safetensors'),
        ((path, tmp_path / 'no' / 'out.pth', '--to', 'mmdet'), 'There is no folder'),
        ((path, path, '--to', 'mmdet'), 'OUT is IN'),
        ((tmp_path / 'none.pth', '--inspect'), 'There is no checkpoint'),
        ((tmp_path / 'foreign.pth', '--inspect'), 'foreign.pth'),
        ((tmp_path / 'resnet.pth', '--inspect'), 'no PVT backbone'),
    ):
        assert message in fails(*arguments)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_failed_write_leaves_the_old_file(weights, fails, tmp_path, monkeypatch):
    """A disk that fills up costs neither the old output nor leaves half a file."""
    path, _ = weights('b0')
    out = tmp_path / 'out.pth'
    out.write_bytes(b'old')

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', fail)
    assert 'No space left' in fails(path, out, '--to', 'mmdet')
    assert out.read_bytes() == b'old'
    assert sorted(os.listdir(tmp_path)) == ['b0.pth', 'out.pth']


def test_damaged_safetensors(fails, tmp_path):
    """A file cut short is named as damaged."""
    save = pytest.importorskip('safetensors.torch').save
    whole = save(convert_checkpoint(official_weights('b0')))
    (tmp_path / 'cut.safetensors').write_bytes(whole[:1000])
    assert 'cut.safetensors is damaged' in fails(tmp_path / 'cut.safetensors', '--inspect')


def test_safetensors_is_optional(weights, fails, tmp_path, monkeypatch):
    """Without the package both directions say how to get it."""
    path, _ = weights('b0')
    (tmp_path / 'in.safetensors').write_bytes(b'x')
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith('safetensors'):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    for arguments in (
        (path, tmp_path / 'out.safetensors', '--to', 'timm'),
        (tmp_path / 'in.safetensors', '--inspect'),
    ):
        assert 'pip install safetensors' in fails(*arguments)
