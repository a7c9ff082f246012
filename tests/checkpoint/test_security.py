"""Bad and malicious files: every kind, loaded in every way; nothing run, one sentence, code 1."""

import argparse
import functools
import io
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from conftest import run_main, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.fileio import register_handler
from mmengine.fileio.handlers import PickleHandler, YamlHandler
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.structures import InstanceData
from reference import REPO, small
from yapf.yapflib import yapf_api

from pvt_mm import CheckpointMismatchError
from pvt_mm.checkpoint import loaders, safe_load
from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.engine import checkpoint_hook, runtime
from pvt_mm.errors import UserError


class Runs:
    """Pickles as a call of a function; by default one that leaves a file behind."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(folder):
    return Runs(os.system, f'touch {folder / "ran"}')


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path):
    """Whatever a test reads, no file of it may have left its mark."""
    runtime.setup()
    yield
    assert not (tmp_path / 'ran').exists()


@pytest.fixture
def unguarded():
    """Put mmengine's own readers back for a test, and ours after it."""
    register_handler(['pkl', 'pickle'])(PickleHandler)
    register_handler(['yaml', 'yml'])(YamlHandler)
    yield
    runtime.setup()


def test_the_mark_is_left_where_nothing_guards(unguarded, tmp_path):
    """The files of these tests do run code in a plain reader, so that a mark would tell."""
    (tmp_path / 'x.yaml').write_text(yaml_call(tmp_path))
    for name, read in (
        ('x.pth', lambda path: torch.load(path, weights_only=False)),
        ('x.pkl', mmengine.load),
        ('x.yaml', mmengine.load),
    ):
        if name == 'x.pth':
            torch.save(evil(tmp_path), tmp_path / name)
        elif name == 'x.pkl':
            (tmp_path / name).write_bytes(pickle.dumps(evil(tmp_path)))
        read(str(tmp_path / name))
        (tmp_path / 'ran').unlink()


def yaml_call(folder):
    return f'x: !!python/object/apply:os.system ["touch {folder / "ran"}"]\n'


# Every kind of bad checkpoint, in every way to load


@pytest.fixture(scope='module')
def detector(tmp_path_factory, demo_data):
    """A flat config of a small detector, and the file of its weights."""
    folder = tmp_path_factory.mktemp('detector')
    cfg = Config.fromfile(write_config(folder, 'det'))
    cfg.dump(folder / 'flat.py')
    init_default_scope('mmdet')
    weights = MODELS.build(cfg.model).state_dict()
    torch.save({'meta': {}, 'state_dict': weights}, folder / 'good.pth')
    return folder / 'flat.py', folder / 'good.pth'


@pytest.fixture
def quick(monkeypatch):
    """Leave out what asks compilers for their versions, and what lays out the config's text."""
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    for module in (yapf_api, mmengine.config.config):  # the fork imports it when it calls it
        monkeypatch.setattr(module, 'FormatCode', lambda text, **_: (text, True), raising=False)


def weights_of(good):
    return dict(torch.load(good, weights_only=True)['state_dict'])


def cut(part):
    def write(path, good):
        content = good.read_bytes()
        path.write_bytes(content[: int(part * len(content))])

    return write


def flip(part):
    def write(path, good):
        content = bytearray(good.read_bytes())
        place = int(part * len(content))
        content[place : place + 64] = bytes(64)
        path.write_bytes(content)

    return write


def write_zip(path, good):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('readme.txt', 'hello')


def write_foreign(path, good):
    """ResNet's weights, as torchvision names them."""
    names = ('conv1.weight', 'bn1.weight', 'layer1.0.conv1.weight', 'fc.bias')
    torch.save({name: torch.ones(4) for name in names}, path)


def write_other_widths(path, good):
    torch.save({key: torch.cat([value, value]) for key, value in weights_of(good).items()}, path)


def write_other_ranks(path, good):
    torch.save({key: value.new_zeros(7) for key, value in weights_of(good).items()}, path)


def write_nan(path, good):
    weights = weights_of(good)
    weights['backbone.stages.0.norm.bias'] = torch.tensor([0.0, float('nan')])
    torch.save(weights, path)


def write_evil(path, good):
    torch.save({'state_dict': weights_of(good), 'x': evil(path.parent)}, path)


def write_script(path, good):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


#: kind -> (what writes the file, what the message says)
KINDS = {
    'missing': (lambda path, good: None, 'There is no checkpoint'),
    'empty': (lambda path, good: path.touch(), 'is empty'),
    'folder': (lambda path, good: path.mkdir(), 'is a folder'),
    'one byte': (lambda path, good: path.write_bytes(b'\x80'), 'is damaged'),
    'cut at 1%': (cut(0.01), 'is damaged'),
    'cut at 50%': (cut(0.5), 'is damaged'),
    'cut at 99.9%': (cut(0.999), 'is damaged'),
    'zeros in its head': (flip(0), 'is damaged'),
    'zeros in its index': (flip(0.999), 'is damaged'),
    'random bytes': (
        lambda path, good: path.write_bytes(np.random.RandomState(1).bytes(5000)), 'is damaged'
    ),
    'text': (lambda path, good: path.write_text('epoch_12.pth\n'), 'is damaged'),
    'web page': (lambda path, good: path.write_text('\n<!DOCTYPE html><html>'), 'is a web page'),
    'LFS pointer': (
        lambda path, good: path.write_text('version https://git-lfs.github.com/spec/v1\n'),
        'git lfs pull',
    ),
    'zip': (write_zip, 'is damaged'),
    'NumPy archive': (lambda path, good: np.savez(path.open('wb'), x=np.ones(2)), 'is damaged'),
    'TorchScript': (write_script, 'is damaged|holds a RecursiveScriptModule'),
    'plain pickle': (lambda path, good: path.write_bytes(pickle.dumps({'x': 1})), 'is damaged'),
    'list': (lambda path, good: torch.save([1, 2], path), 'holds a list'),
    'tensor': (lambda path, good: torch.save(torch.ones(2), path), 'holds a Tensor'),
    'whole module': (lambda path, good: torch.save(torch.nn.ReLU(), path), 'was refused'),
    'no tensors': (lambda path, good: torch.save({'state_dict': {}}, path), 'holds no weights'),
    'numbered keys': (lambda path, good: torch.save({0: {1: 2}}, path), 'holds no weights'),
    'NaN': (write_nan, 'NaN in 1 of'),
    'malicious': (write_evil, r'was refused: it asks for \w+.system'),
    'foreign': (write_foreign, 'no PVT backbone|state of a training'),
    'other widths': (write_other_widths, "do not fit PVT|not of 'tiny'|state of a training"),
    'other ranks': (write_other_ranks, 'does not fit any PVT|state of a training'),
}  # fmt: skip


WAYS = {
    'load_from': lambda config, data, bad: ('train', config, *data, '--load-from', bad),
    'resume': lambda config, data, bad: ('train', config, *data, '--resume', bad),
    'init_cfg': lambda config, data, bad: ('train', config, *data, '--cfg-options', *start(bad)),
    'test': lambda config, data, bad: ('test', config, bad, *data),
    'infer': lambda config, data, bad: ('infer', config, bad, 'x.jpg'),
    'inspect': lambda config, data, bad: ('convert_checkpoint', bad, *TINY, '--inspect'),
    'convert': lambda config, data, bad: ('convert_checkpoint', bad, 'out.pth', *TINY, *TO),
}
TINY, TO = ('--arch', 'tiny'), ('--to', 'official')


def start(checkpoint):
    place = 'model.backbone.init_cfg'
    return f'{place}.type=Pretrained', f'{place}.checkpoint={checkpoint}'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('way', WAYS)
def test_bad_checkpoints_are_refused_in_one_sentence(
    kind, way, detector, demo_data, failing, quick, tmp_path
):
    """The sentence names the file and the reason; nothing is run, nothing is written."""
    config, good = detector
    write, message = KINDS[kind]
    write(tmp_path / 'bad.pth', good)
    line = failing(*WAYS[way](config, ('--data-root', demo_data / 'coco'), tmp_path / 'bad.pth'))
    assert 'bad.pth' in line
    assert re.search(message, line)
    assert not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('way', ['infer', 'convert'])
@pytest.mark.parametrize('content', [b'', b'hello', 9 * b'\xff', b'\x08' + bytes(7) + b'{}'])
def test_bad_safetensors_are_refused(way, content, detector, failing, tmp_path):
    """The other file format, likewise."""
    (tmp_path / 'bad.safetensors').write_bytes(content)
    line = failing(*WAYS[way](detector[0], (), tmp_path / 'bad.safetensors'))
    assert re.search(r'bad\.safetensors (is empty|is damaged|holds no weights)', line)


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    """Even root is nobody for a moment."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, 'secret.pth')
        torch.save({'x': torch.ones(1)}, file)
        file.chmod(0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r'secret\.pth cannot be read: Permission'):
                read_checkpoint(file)
        finally:
            os.seteuid(before)
    with pytest.raises(UserError, match='cannot be read: File name too long'):
        read_checkpoint(tmp_path / ('x' * 300))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_file_gives_a_dict_or_a_sentence(data, detector_bytes):
    """Bytes overwritten anywhere, or a file cut anywhere: never another error."""
    content, file = bytearray(detector_bytes[0]), detector_bytes[1]
    place = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.binary(max_size=40))
    content[place : place + len(new)] = new
    file.write_bytes(content[: data.draw(st.sampled_from([None, place]))])
    try:
        assert isinstance(read_checkpoint(file), dict)
    except UserError as error:
        assert '\n' not in str(error) and str(file) in str(error)


@pytest.fixture(scope='module')
def detector_bytes(tmp_path_factory):
    """A training checkpoint in little: tensors, an order, a log buffer, NumPy numbers."""
    file = tmp_path_factory.mktemp('damaged') / 'small.pth'
    torch.save(training_checkpoint(), file)
    return file.read_bytes(), file


def training_checkpoint():
    hub = MessageHub('security')
    for value in (1.0, 2.0, 6.0):
        hub.update_scalar('train/loss', value)
    weights = OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.bfloat16))
    return {
        'state_dict': weights,
        'parameter': torch.nn.Parameter(torch.ones(2)),
        'message_hub': hub.state_dict(),
        'number': np.float64(3),
        'array': np.arange(3),
        'args': argparse.Namespace(lr=0.1, sizes=(1, 2)),
        'milestones': Counter([8, 11]),
        'shape': torch.Size([1, 2]),
        'dtype': torch.float16,
    }


# Malicious files, wherever one is read


@pytest.fixture
def old_torch(monkeypatch):
    """A PyTorch whose list of what is safe takes no names, and is empty."""
    if not safe_load.takes_safe_globals():
        yield
        return
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.fixture(params=['new', 'old'])
def torch_version(request):
    """Both ways of reading a checkpoint."""
    if request.param == 'new' and not safe_load.takes_safe_globals():
        pytest.skip('this PyTorch has the old way alone')
    if request.param == 'old':
        request.getfixturevalue('old_torch')
        runtime.setup()
        assert not getattr(torch.serialization, 'get_safe_globals', list)()
    return request.param


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, HistoryBuffer):
        return all(np.array_equal(*pair) for pair in zip(one.data, other.data))
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return type(one) is type(other) and one.dtype == other.dtype and (one == other).all()
    return one == other


def test_a_training_checkpoint_is_read_whole_on_any_torch(torch_version, tmp_path):
    """Log buffers, NumPy numbers and argparse's namespace come back, whichever reader it takes."""
    expected = training_checkpoint()
    torch.save(expected, tmp_path / 'x.pth')
    torch.save(expected, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    for name in ('x.pth', 'old.pth'):
        found = read_checkpoint(tmp_path / name)
        assert same(found, expected)
        buffer = found['message_hub']['log_scalars']['train/loss']
        assert buffer.statistics('mean') == 3 and buffer.max() == 6


@pytest.mark.skipif(not safe_load.takes_safe_globals(), reason='this PyTorch has no such list')
def test_a_list_that_others_cleared_is_filled_again(tmp_path):
    """The fork's own loader takes its classes off torch's list when it is done, and ours."""
    torch.save(training_checkpoint(), tmp_path / 'x.pth')
    torch.serialization.clear_safe_globals()
    assert same(read_checkpoint(tmp_path / 'x.pth'), training_checkpoint())


def as_checkpoint(path, content):
    """Write a pickle the way torch.save does."""
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('x/data.pkl', content)
        file.writestr('x/version', '3\n')
        file.writestr('x/byteorder', 'little')


def test_numpy_of_either_version_is_understood(torch_version, tmp_path):
    """Version 1 writes numpy.core where version 2 writes numpy._core."""
    written = pickle.dumps({'x': np.arange(3)}, 2)
    for name in (b'numpy.core.', b'numpy._core.'):
        content = re.sub(rb'numpy\._?core\.', name, written)
        assert name in content
        as_checkpoint(tmp_path / 'x.pth', content)
        (tmp_path / 'x.pkl').write_bytes(content)
        found = read_checkpoint(tmp_path / 'x.pth'), mmengine.load(tmp_path / 'x.pkl')
        assert all((each['x'] == np.arange(3)).all() for each in found)


def getter(owner, name):
    return Runs(getattr, owner, name)


def raw(content):
    """A pickle of protocol 2, written by hand."""
    return b'\x80\x02' + content


def nested(folder):
    """A pickled tensor holds a checkpoint of its own."""
    inner = io.BytesIO()
    torch.save(evil(folder), inner)
    return pickle.dumps(Runs(torch.storage._load_from_bytes, inner.getvalue()), 2)


#: What a pickle may try, by name: folder -> its bytes.
TRICKS = {
    'call': lambda folder: pickle.dumps(evil(folder), 2),
    'call in protocol 4': lambda folder: pickle.dumps([{'x': evil(folder)}], 4),
    'eval': lambda folder: pickle.dumps(Runs(eval, '1+1'), 2),
    'exec': lambda folder: pickle.dumps(Runs(exec, 'import os'), 2),
    'import': lambda folder: pickle.dumps(Runs(__import__, 'os'), 2),
    'partial': lambda folder: pickle.dumps(functools.partial(os.system, 'x'), 2),
    'torch.load': lambda folder: pickle.dumps(Runs(torch.load, 'x'), 2),
    'torch.hub': lambda folder: pickle.dumps(Runs(torch.hub.load, 'x', 'y'), 2),
    'numpy.load': lambda folder: pickle.dumps(Runs(np.load, 'x', None, True), 2),
    'nested checkpoint': nested,
    'getattr': lambda folder: pickle.dumps(getter(HistoryBuffer, '__init__'), 2),
    'getattr twice': lambda folder: pickle.dumps(
        getter(getter(HistoryBuffer, 'mean'), '__globals__'), 2
    ),
    'getattr of a tensor': lambda folder: pickle.dumps(getter(torch.Size([1]), 'count'), 2),
    'method by its dotted name': lambda folder: pickle.dumps(HistoryBuffer.mean, 4),
    'module by its dotted name': lambda folder: raw(
        b'cmmengine.logging\nhistory_buffer.np.load\n.'
    ),
    'attribute of a class': lambda folder: raw(
        b'cmmengine.logging.history_buffer\nHistoryBuffer\nN}X\x03\0\0\0minK\x01s\x86b.'
    ),
    'attribute of a function': lambda folder: raw(
        b'ctorch._utils\n_rebuild_tensor\nN}X\x0c\0\0\0__defaults__)s\x86b.'
    ),
    'name of Python 2': lambda folder: raw(b'c__builtin__\neval\n.'),
    'instance of Python 2': lambda folder: raw(b'(X\x03\0\0\x001+1i__builtin__\neval\n.'),
}


@pytest.mark.parametrize('trick', TRICKS)
def test_tricks_in_checkpoints_are_refused(trick, torch_version, tmp_path):
    """Nothing but data comes out of a file, whatever it names and however."""
    content = TRICKS[trick](tmp_path)
    as_checkpoint(tmp_path / 'x.pth', content)
    # PyTorch's own reader stops at the first byte of another protocol, or of Python 2's.
    other = torch_version == 'new' and (content[1] != 2 or trick == 'instance of Python 2')
    with pytest.raises(UserError, match='is damaged' if other else 'was refused: it'):
        read_checkpoint(tmp_path / 'x.pth')


@pytest.mark.parametrize('trick', TRICKS)
def test_tricks_in_pickled_annotations_are_refused(trick, tmp_path):
    """mmengine.load, which every data set and metric calls, reads pickles as data."""
    (tmp_path / 'x.pkl').write_bytes(TRICKS[trick](tmp_path))
    with pytest.raises(UserError, match='pickle among the annotations was refused'):
        mmengine.load(tmp_path / 'x.pkl')
    assert HistoryBuffer.min is not None and callable(HistoryBuffer.min)
    assert torch._utils._rebuild_tensor.__defaults__ is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(2, 5))
def test_damaged_pickles_give_data_or_a_sentence(new, place, protocol):
    """A pickle of annotations with bytes overwritten anywhere: never another error."""
    content = bytearray(pickle.dumps(annotations(), protocol))
    content[place : place + len(new)] = new
    try:
        mmengine.load(io.BytesIO(bytes(content)), file_format='pkl')
    except UserError as error:
        assert '\n' not in str(error)


def annotations():
    boxes = InstanceData(bboxes=np.ones((2, 4), 'f4'), scores=torch.ones(2), labels=[1, 2])
    return {'val/a.jpg': boxes, 'sizes': [(480, 640, 3)], 'id': np.int64(3), 'name': 'é'}


@pytest.mark.parametrize('protocol', range(2, 6))
def test_pickled_annotations_are_read(protocol, tmp_path):
    """Proposals, image sizes and predictions, as mmdet writes them, in protocols of Python 3."""
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(annotations(), protocol))
    found = mmengine.load(tmp_path / 'x.pkl')
    boxes = found.pop('val/a.jpg')
    assert isinstance(boxes, InstanceData) and len(boxes) == 2
    assert (boxes.bboxes == 1).all() and torch.equal(boxes.scores, torch.ones(2))
    assert found == {'sizes': [(480, 640, 3)], 'id': 3, 'name': 'é'}


def test_yaml_is_data(tmp_path):
    """mmengine's reader would call what a YAML file names; tuples, which it writes, stay."""
    (tmp_path / 'x.yaml').write_text(yaml_call(tmp_path))
    with pytest.raises(UserError, match='YAML file was refused: could not determine'):
        mmengine.load(tmp_path / 'x.yaml')
    (tmp_path / 'x.yml').write_text('[')
    with pytest.raises(UserError, match='YAML file was refused'):
        mmengine.load(tmp_path / 'x.yml')
    value = {'scale': (1333, 800), 'names': ['a', 'b']}
    mmengine.dump(value, tmp_path / 'y.yaml')
    assert mmengine.load(tmp_path / 'y.yaml') == value


# What a checkpoint carries beside its weights


@pytest.fixture
def evil_config(detector, tmp_path):
    """A good checkpoint whose embedded configs are Python that leaves a mark."""
    text = f'open({str(tmp_path / "ran")!r}, "w").close()\nmodel = dict(type="X")\n'
    checkpoint = torch.load(detector[1], weights_only=True)
    checkpoint['meta'] = {'config': text, 'cfg': text, 'epoch': 0, 'iter': 0}
    info = {'cfg': text}
    checkpoint['message_hub'] = dict(log_scalars={}, runtime_info=info, resumed_keys={})
    torch.save(checkpoint, tmp_path / 'x.pth')
    return tmp_path / 'x.pth'


def test_no_tool_runs_a_config_in_a_checkpoint(
    evil_config, detector, demo_data, quick, tmp_path, monkeypatch
):
    """Train, resume, test, infer and convert take such a file, and leave its text alone."""
    monkeypatch.setattr(Runner, 'call_hook', stop_before_iterations(Runner.call_hook))
    data = ('--data-root', demo_data / 'coco')
    for way in ('load_from', 'resume', 'test'):
        with pytest.raises(StoppedError):
            run_main(tmp_path, *WAYS[way](detector[0], data, evil_config))
    (image, *_) = (demo_data / 'coco/val2017').iterdir()
    run_main(tmp_path, 'infer', detector[0], evil_config, image)
    run_main(tmp_path, 'convert_checkpoint', evil_config, 'out.pth', *TO)


class StoppedError(Exception):
    pass


def stop_before_iterations(call_hook):
    def call(runner, name, **kwargs):
        if name in ('before_train_epoch', 'before_test_epoch'):
            raise StoppedError
        call_hook(runner, name, **kwargs)

    return call


def test_inferencers_do_not_run_it_either(evil_config):
    """mmdet's inferencer without a config would run the checkpoint's; it finds none."""
    with pytest.raises(ValueError, match='Cannot find the config'):
        DetInferencer(weights=str(evil_config), device='cpu')


def test_a_resumed_run_does_not_pass_a_foreign_config_on(evil_config):
    """What mmengine takes over from the file would stand in the next checkpoint as its own."""
    loaded = CheckpointLoader.load_checkpoint(str(evil_config))
    assert 'cfg' not in loaded['message_hub']['runtime_info'] and 'cfg' not in loaded['meta']


@pytest.mark.parametrize(
    ('info', 'stays'),
    [
        ({'best_ckpt': '{work}/best_x_epoch_1.pth'}, True),
        ({'best_ckpt': '{work}/../best_other.pth'}, False),
        ({'best_ckpt_coco/bbox_mAP': '{work}'}, False),
        ({'best_ckpt': '{work}/epoch_1.pth'}, False),
        ({'best_ckpt': None}, False),
        ({'keep_ckpt_ids': [1, 2]}, True),
        ({'keep_ckpt_ids': ['../../other']}, False),
        ({'keep_ckpt_ids': 'all'}, False),
    ],
)
def test_a_checkpoint_cannot_name_files_to_delete(info, stays, tmp_path):
    """mmengine deletes the files that it is told were the best so far, and the older ones."""
    info = {
        key: value.format(work=tmp_path) if isinstance(value, str) else value
        for key, value in info.items()
    }
    state = training_state(runtime_info=info)
    checkpoint_hook.PVTCheckpointHook().after_load_checkpoint(resuming(tmp_path), state)
    assert bool(state['message_hub']['runtime_info']) is stays


def training_state(**hub):
    empty = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    weights = {'bias': torch.ones(4), 'weight': torch.ones(4, 4)}
    meta = dict(epoch=1, iter=2)
    return {'state_dict': weights, 'meta': meta, 'message_hub': {**empty, **hub}}


def resuming(work_dir):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = dict(model=model, work_dir=str(work_dir), _resume=True, optim_wrapper=optimizer)
    return type('Runner', (), state)()


@pytest.mark.parametrize(
    'state',
    [
        {'meta': {}},
        {'meta': {'epoch': 1}},
        {'meta': None},
        {'message_hub': {}},
        {'message_hub': {'log_scalars': [], 'runtime_info': {}, 'resumed_keys': {}}},
    ],
)
def test_weights_are_no_state_to_resume_from(state, tmp_path):
    """A file that mmengine would stumble over while resuming is refused with the way out."""
    checkpoint = training_state() | state
    with pytest.raises(CheckpointMismatchError, match='start one with --load-from'):
        checkpoint_hook.PVTCheckpointHook().after_load_checkpoint(resuming(tmp_path), checkpoint)


def test_another_optimizer_is_not_resumed(tmp_path):
    """Groups of other parameters are counted out; the own ones pass."""
    runner = resuming(tmp_path)
    own = training_state() | {'optimizer': runner.optim_wrapper.state_dict()}
    checkpoint_hook.PVTCheckpointHook().after_load_checkpoint(runner, own)
    own['optimizer']['param_groups'] = [{'params': [0]}, {'params': [1]}]
    with pytest.raises(CheckpointMismatchError, match=r'2 parameters in 2 .* 2 in 1;'):
        checkpoint_hook.PVTCheckpointHook().after_load_checkpoint(runner, own)


def test_other_shapes_are_not_resumed(tmp_path):
    """Another class count: the optimizer's state would not fit at its first step."""
    state = training_state()
    state['state_dict']['bias'] = torch.ones(9)
    with pytest.raises(
        CheckpointMismatchError, match=r'bias of this training is \(9,\), .* \(4,\)'
    ):
        checkpoint_hook.PVTCheckpointHook().after_load_checkpoint(resuming(tmp_path), state)


# Weights that fit nothing, or the backbone alone


def part_of(good, keep):
    weights = weights_of(good)
    return {key.removeprefix('backbone.'): v for key, v in weights.items() if keep(key)}


@pytest.mark.parametrize('way', ['test', 'infer'])
def test_a_bare_backbone_is_not_tested(way, detector, demo_data, failing, quick, tmp_path):
    """Random heads would give scores that mean nothing."""
    backbone = part_of(detector[1], lambda key: key.startswith('backbone.'))
    prefixed = {f'backbone.{key}': value for key, value in backbone.items()}
    torch.save(backbone if way == 'test' else prefixed, tmp_path / 'bare.pth')
    data = ('--data-root', demo_data / 'coco')
    line = failing(*WAYS[way](detector[0], data, tmp_path / 'bare.pth'))
    assert 'bare.pth: These weights are of a backbone alone, without neck' in line


class Net(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Linear(4, 4)


@pytest.mark.parametrize('backbone', [
    torch.nn.Linear(2, 2), small('v2', allow_partial=True), small('v1', allow_partial=True),
], ids=['ResNet', 'v2', 'v1'])  # fmt: skip
def test_weights_that_fit_nothing_are_never_passed_over(backbone, tmp_path):
    """Neither by a model without any PVT, nor by a PVT that takes weights in part."""
    model = Net(backbone)
    runner = type('Runner', (), {'model': model})()
    for weights in ({'conv1.weight': torch.ones(1)}, {'backbone.conv1.weight': torch.ones(1)}):
        hook, checkpoint = checkpoint_hook.PVTCheckpointHook(), {'state_dict': weights}
        hook.after_load_checkpoint(runner, checkpoint)
        with pytest.raises(CheckpointMismatchError, match='none of them fits|no PVT backbone'):
            mmengine_checkpoint._load_checkpoint_to_model(model, checkpoint)
        hook.before_train(runner)
        assert not model._load_state_dict_post_hooks, 'the check goes with the load'
    hook, checkpoint = (
        checkpoint_hook.PVTCheckpointHook(),
        {'state_dict': {'head.bias': torch.ones(4)}},
    )
    hook.after_load_checkpoint(runner, checkpoint)
    mmengine_checkpoint._load_checkpoint_to_model(model, checkpoint)
    assert (model.head.bias == 1).all(), 'a part that fits is taken'


# Where checkpoints come from


def test_every_scheme_of_mmengine_is_read_here():
    """None is left to a loader that would run code, on any stack."""
    runtime.setup()
    for prefix, loader in CheckpointLoader._schemes.items():
        assert loader.__module__ == 'pvt_mm.checkpoint.loaders', prefix


@pytest.mark.parametrize('kind', ['good', 'malicious'])
@pytest.mark.parametrize('scheme', ['torchvision', 'modelzoo', 'open-mmlab', 'openmmlab'])
def test_names_of_models_lead_to_safe_reading(scheme, kind, site, tmp_path, monkeypatch):
    """A catalogue's name becomes a URL, or for OpenMMLab a file in mmengine's folder."""
    monkeypatch.setattr(mmengine_checkpoint, '_get_mmengine_home', lambda: str(site.folder))
    place = 'x.pth' if scheme == 'openmmlab' else f'{site.address}/x.pth'
    monkeypatch.setitem(loaders._CATALOGUES, scheme, lambda: {'resnet_tiny': place})
    content = {'x': torch.ones(1)}
    torch.save(content | ({'y': evil(tmp_path)} if kind != 'good' else {}), site.folder / 'x.pth')
    if kind == 'good':
        found = CheckpointLoader.load_checkpoint(f'{scheme}://resnet_tiny')
        assert found.get('state_dict', found)['x'] == 1
        with pytest.raises(UserError, match="no model 'resnet_tin' .*did you mean resnet_tiny"):
            CheckpointLoader.load_checkpoint(f'{scheme}://resnet_tin')
    else:
        with pytest.raises(UserError, match=r'x\.pth was refused: it asks for \w+\.system'):
            CheckpointLoader.load_checkpoint(f'{scheme}://resnet_tiny')


def test_a_catalogue_of_an_absent_package_says_so(monkeypatch):
    def absent():
        raise ImportError

    monkeypatch.setitem(loaders._CATALOGUES, 'torchvision', absent)
    with pytest.raises(UserError, match='pip install torchvision'):
        CheckpointLoader.load_checkpoint('torchvision://resnet50')


@pytest.mark.parametrize(
    'address',
    ['s3://bucket/x.pth', 'cluster:s3://b/x.pth', 'petrel://b/x.pth', 'pavi://x', 'mmcls://x'],
)
def test_other_schemes_of_mmengine_are_refused(address):
    """Their loaders, which need clients that are not public, would run code in a file."""
    scheme = address.partition('://')[0]
    with pytest.raises(UserError, match=f'{address}: {scheme}:// is an unsupported scheme; copy'):
        CheckpointLoader.load_checkpoint(address)


def test_a_loader_of_ones_own_stays():
    """Who registers a scheme answers for it; only mmengine's loaders are replaced."""

    def load(filename, map_location=None):
        return {'x': filename}

    before = dict(CheckpointLoader._schemes)
    try:
        CheckpointLoader.register_scheme('mine://', load)
        runtime.setup()
        assert CheckpointLoader.load_checkpoint('mine://y') == {'x': 'mine://y'}
    finally:
        CheckpointLoader._schemes = before


def write_half(path, good):
    path.write_bytes(good[:300])


#: What a server may answer with; of cut-x.pth it sends half of what it announces.
DOWNLOADS = {
    'malicious': ('x.pth', lambda path, good: torch.save(evil(path.parents[1]), path)),
    'web page': ('x.pth', lambda path, good: path.write_text('<html>log in</html>')),
    'half a file': ('x.pth', write_half),
    'broken connection': ('cut-x.pth', lambda path, good: path.write_bytes(good)),
    'not found': ('x.pth', lambda path, good: None),
    'wrong hash': ('x-0123456789.pth', lambda path, good: path.write_bytes(good)),
}


@pytest.mark.parametrize('kind', DOWNLOADS)
def test_a_bad_download_is_not_kept(kind, site, tmp_path):
    """What was refused, wrong or cut short leaves no file; the next run fetches again."""
    torch.save({'x': torch.ones(9)}, tmp_path / 'good.pth')
    name, write = DOWNLOADS[kind]
    write(site.folder / name, (tmp_path / 'good.pth').read_bytes())
    with pytest.raises(UserError) as refusal:
        CheckpointLoader.load_checkpoint(f'{site.address}/{name}')
    assert f'{site.address}/{name}' in str(refusal.value) and '\n' not in str(refusal.value)
    assert not list(site.cache.iterdir())
    if name == 'x.pth':
        shutil.copy(tmp_path / 'good.pth', site.folder / name)
        assert CheckpointLoader.load_checkpoint(f'{site.address}/{name}')['x'].sum() == 9


def test_a_cached_file_is_checked_against_its_hash_each_time(site):
    """A file put into the cache, or spoilt there, is not what its name says."""
    site.cache.mkdir(parents=True)
    torch.save({'x': torch.ones(1)}, site.cache / 'x-0123456789ab.pth')
    with pytest.raises(UserError, match='remove it, and it is fetched again'):
        CheckpointLoader.load_checkpoint(f'{site.address}/x-0123456789ab.pth')


@pytest.mark.parametrize('path', ['', '/', '/..', '/a/..', '/x/', '/..?x.pth'])
def test_an_address_without_a_file_is_refused(path, site):
    """And none leads out of the cache."""
    with pytest.raises(UserError):
        CheckpointLoader.load_checkpoint(f'{site.address}{path}')
    assert not site.cache.exists() or not list(site.cache.iterdir())


def test_what_follows_a_file_in_an_address_is_no_part_of_its_name(site):
    torch.save({'x': torch.ones(1)}, site.folder / 'x.pth')
    CheckpointLoader.load_checkpoint(f'{site.address}/x.pth?download=1#top')
    assert [file.name for file in site.cache.iterdir()] == ['x.pth']


# Data sets


def test_malicious_proposals_are_refused(detector, demo_data, failing, quick, tmp_path):
    """Training on a data set whose proposal file is a pickle that runs code."""
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps(evil(tmp_path)))
    proposals = f'train_dataloader.dataset.proposal_file={tmp_path / "p.pkl"}'
    data = ('--data-root', demo_data / 'coco')
    line = failing('train', detector[0], *data, '--cfg-options', proposals)
    assert re.search(r'was refused: it asks for \w+\.system', line)


def test_images_by_pickle_are_refused(detector, demo_data, failing):
    """mmseg's medical images may be pickles, read in the workers by mmseg itself."""
    line = failing(
        'train', detector[0], '--data-root', demo_data / 'coco', '--cfg-options',
        'train_dataloader.dataset.pipeline.0.decode_backend=pickle',
    )  # fmt: skip
    assert "decode_backend='numpy'" in line


@pytest.mark.parametrize('kind', ['malicious', 'good', 'missing', 'elsewhere'])
def test_open_images_hierarchies_are_numbers(kind, tmp_path):
    """mmdet reads this array with pickles allowed; it is looked at before."""
    data = dict(type='OpenImagesChallengeDataset', data_root=str(tmp_path), hierarchy_file='t.npy')
    if kind == 'malicious':
        np.save(tmp_path / 't.npy', np.array([evil(tmp_path)]), allow_pickle=True)
    elif kind == 'good':
        np.save(tmp_path / 't.npy', np.eye(3))
    elif kind == 'elsewhere':
        data['data_root'] = 'https://example.org/'
    cfg = Config(dict(train_dataloader=dict(dataset=data)))
    if kind in ('malicious', 'elsewhere'):
        with pytest.raises(UserError, match=r't\.npy may run code'):
            runtime.setup(cfg)
    else:
        runtime.setup(cfg)


# Names of images


def listing(folder):
    return {path for path in folder.rglob('*') if path.is_file()}


def stray_data(demo_data, tmp_path, task, name):
    """A copy of the data whose only image lies elsewhere, under a name that leads there."""
    root = shutil.copytree(demo_data, tmp_path / 'data' / 'demo')
    kind = {'det': 'coco/val2017', 'seg': 'ade/images/validation'}[task]
    image = sorted((root / kind).iterdir())[0]
    stray = tmp_path / 'data' / f'stray{image.suffix}'
    image.rename(stray)
    way = os.path.relpath(stray, image.parent) if name == 'relative' else str(stray)
    if task == 'det':
        file = root / 'coco/annotations/instances_val2017.json'
        content = json.loads(file.read_text())
        content['images'] = [one for one in content['images'] if one['file_name'] == image.name]
        content['images'][0]['file_name'] = way
        ids = [one['id'] for one in content['images']]
        content['annotations'] = [x for x in content['annotations'] if x['image_id'] in ids]
        file.write_text(json.dumps(content))
        return root / 'coco', ()
    labels = root / 'ade/annotations/validation' / f'{image.stem}.png'
    labels.rename(stray.with_suffix('.png') if stray.suffix != '.png' else labels)
    (root / 'list.txt').write_text(way.removesuffix(image.suffix) + '\n')
    return root / 'ade', (f'test_dataloader.dataset.ann_file={root / "list.txt"}',)


@pytest.mark.parametrize('name', ['relative', 'absolute'])
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_results_stay_in_their_folders(task, name, demo_data, quick, tmp_path):
    """Pictures and label maps of images named ../../x or /x stand where they were asked for."""
    config = write_config(tmp_path, task)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save(MODELS.build(cfg.model).state_dict(), tmp_path / 'good.pth')
    root, options = stray_data(demo_data, tmp_path, task, name)
    before = listing(tmp_path)
    out = tmp_path / 'out' / ('labels' if task == 'seg' else 'out.pkl')
    run_main(
        tmp_path, 'test', config, 'good.pth', '--data-root', root, '--out', out,
        '--show-dir', 'shown', '--work-dir', 'work',
        *(('--cfg-options', *options) if options else ()),
    )  # fmt: skip
    new = {path.relative_to(tmp_path) for path in listing(tmp_path) - before}
    assert {path.parts[0] for path in new} == {'out', 'shown', 'work'}
    assert any('stray' in path.name for path in new if path.parts[0] == 'shown')


@pytest.mark.parametrize('name', ['../../x.png', '{there}/x.png', '..png', 'a b/../../x.png'])
def test_inferred_pictures_stay_in_their_folder(name, detector, demo_data, tmp_path):
    """Whatever path an image has, its results are named by its last part."""
    deep = tmp_path / 'there' / 'a' / 'b'
    (deep / 'a b').mkdir(parents=True)
    image = deep / name.format(there=tmp_path / 'there')
    shutil.copy(sorted((demo_data / 'coco/val2017').iterdir())[0], image)
    before = listing(tmp_path)
    run_main(deep, 'infer', *detector, os.path.relpath(image, deep), '--out-dir', tmp_path / 'out')
    new = listing(tmp_path) - before
    assert len(new) == 2 and {path.parent for path in new} == {tmp_path / 'out'}


# --debug


@pytest.mark.parametrize('debug', [False, True])
def test_debug_shows_the_traceback(debug, run_tool, capsys, tmp_path):
    """With it the traceback comes before the sentence; without it the sentence alone."""
    with pytest.raises(SystemExit) as stop:
        run_tool('convert_checkpoint', 'x.pth', *(['--debug'] if debug else []), '--inspect')
    assert stop.value.code == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert last == 'error: There is no checkpoint x.pth; check the path.'
    assert bool(trace) is debug and ('Traceback (most recent call last):' in trace) is debug


@pytest.mark.parametrize('tool', sorted(
    path.stem for path in [*REPO.glob('tools/**/*.py'), *REPO.glob('tests/stress/*.py')]
    if 'main_errors' in path.read_text()
))  # fmt: skip
def test_every_tool_takes_debug(tool, run_tool, capsys, monkeypatch):
    """One place serves them all, and their help says so."""
    monkeypatch.syspath_prepend(REPO / 'tools')
    with pytest.raises(SystemExit) as stop:
        run_tool(tool, '--debug', '--help')
    assert stop.value.code == 0
    assert '  --debug ' in capsys.readouterr().out
