"""Configs of an older generation, and modules beside a config that do not import."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

import pvt_mm
from pvt_mm.config import (
    CODEBASES,
    config_folder,
    find_config,
    load_config,
    old_keys,
    read_config,
    refuse_old_config,
)
from pvt_mm.engine import runner
from pvt_mm.errors import UserError

#: What configs of mmdet 2.x and mmseg 0.x have at the top, beside the model.
OLD = dict(
    data=dict(samples_per_gpu=2, workers_per_gpu=2, train=dict(type='CocoDataset')),
    optimizer=dict(type='SGD', lr=0.02),
    optimizer_config=dict(grad_clip=None),
    lr_config=dict(policy='step', step=[8, 11]),
    runner=dict(type='EpochBasedRunner', max_epochs=12),
    checkpoint_config=dict(interval=1),
    total_epochs=12,
    log_level='INFO',
)
RESNET, AUTHORS = dict(type='ResNet', depth=50), dict(type='pvt_small', style='pytorch')
#: An old config's file and model, and the config of today to begin from.
NEAREST = {
    'faster_rcnn_r50_fpn_1x_coco': (
        dict(type='FasterRCNN', backbone=RESNET),
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    ),
    'deformable_detr_r50_16x2_50e_coco': (
        dict(type='DeformableDETR', backbone=RESNET),
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    ),
    'htc_r50_fpn_1x_coco': (
        dict(type='HybridTaskCascade', backbone=RESNET),
        'mmdet::htc/htc_r50_fpn_1x_coco.py',
    ),
    'retinanet_pvt_s_fpn_1x_coco_640': (
        dict(type='RetinaNet', backbone=AUTHORS),
        'pvt_mm::pvt/retinanet_pvt_s_fpn_1x_coco_640.py',
    ),
    'fpn_pvt_s_ade20k_40k': (
        dict(type='EncoderDecoder', backbone=AUTHORS, decode_head=dict(type='FPNHead')),
        'pvt_mm::pvt/fpn_pvt_s_ade20k_40k.py',
    ),
    'fpn_r50_512x512_160k_ade20k': (
        dict(type='EncoderDecoder', backbone=RESNET, decode_head=dict(type='FPNHead')),
        'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    ),
    'upernet_r50_512x512_160k_ade20k': (
        dict(type='EncoderDecoder', backbone=RESNET, decode_head=dict(type='UPerHead')),
        'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
    ),
    'ocrnet_hr18_512x512_80k_ade20k': (
        dict(
            type='CascadeEncoderDecoder',
            backbone=dict(type='HRNet'),
            decode_head=[dict(type='FCNHead'), dict(type='OCRHead')],
        ),
        'mmseg::ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512.py',
    ),
}


@pytest.mark.parametrize('stem', NEAREST)
def test_an_old_config_is_refused_with_where_to_begin(stem, tmp_path):
    """By reading and by swapping alike, with an installed config of the same head."""
    model, nearest = NEAREST[stem]
    file = tmp_path / f'{stem}.py'
    file.write_text(Config(dict(OLD, model=model)).pretty_text)
    with pytest.raises(
        UserError, match='is of mmdet 2.x or mmseg 0.x .checkpoint_config, data, '
    ) as caught:
        read_config(file)
    assert f'begin from {nearest}, and set' in str(caught.value)
    assert find_config(nearest).is_file()
    with pytest.raises(UserError, match=f'begin from {re.escape(nearest)}'):
        pvt_mm.swap_backbone(file, dict(type='PVT', arch='small'))
    with pytest.raises(UserError, match='is of mmdet 2.x or mmseg 0.x'):
        pvt_mm.swap_backbone(Config(dict(OLD, model=model)), dict(type='PVT', arch='small'))


@given(st.sets(st.sampled_from([*OLD])))
def test_any_part_of_an_old_config_is_recognised(keys):
    """Bases of that generation stand in several files; an optimiser is a variable today too."""
    model = dict(type='OwnDetector', decode_head=[], backbone='a name')
    cfg = Config(dict({key: OLD[key] for key in keys}, model=model))
    if keys <= {'optimizer', 'log_level'}:
        refuse_old_config(cfg)
    else:
        with pytest.raises(UserError, match='begin from a config of today'):
            refuse_old_config(cfg)


@pytest.mark.parametrize('package', CODEBASES[:2])
def test_configs_of_today_are_not_taken_for_old(package):
    """None of a folder's bases and configs is refused, nor one of today with a left-over key."""
    root = config_folder(package)
    for file in [*root.glob('_base_/*/*.py'), *root.glob('_base_/*.py')]:
        refuse_old_config(Config.fromfile(file, import_custom_modules=False))
    refuse_old_config(Config(dict(OLD, default_scope=package)))


def test_old_keys_in_a_config_of_today_are_named(monkeypatch):
    """mmengine reads none of them, so the base's values stay; a variable is none."""
    cfg = Config(dict(OLD, default_scope='mmdet', train_dataloader=dict(batch_size=2)))
    assert old_keys(cfg)['data'].startswith('train_dataloader')
    said = []
    monkeypatch.setattr(runner, 'print_log', lambda text, **_: said.append(text))
    runner.warn_of_old_keys(cfg)
    assert len(said) == 6 and all('it changes nothing here' in text for text in said)
    assert any('has lr_config, which' in t and 'Set param_scheduler.' in t for t in said)
    assert not old_keys(Config(dict(data=dict(root='data/coco'), optimizer=dict(lr=1))))


# Own modules

CONFIG = """
model = dict(type='RetinaNet')
custom_imports = dict(imports=['pvt_mm', {module!r}], allow_failed_imports=False)
"""


@pytest.fixture
def importing(tmp_path):
    """Read a config that imports a module; returns what the error says."""

    def read(module):
        file = tmp_path / 'config.py'
        file.write_text(CONFIG.format(module=module))
        with pytest.raises(UserError, match='does not load: ') as caught:
            read_config(file)
        return str(caught.value)

    yield read
    for name in [name for name in sys.modules if name.startswith('beside_')]:
        del sys.modules[name]


@pytest.mark.parametrize('name', ['beside_one', 'beside_package.inner'])
def test_a_module_beside_the_config_is_named_with_its_path(name, importing, tmp_path):
    """Where it lies beside the config, the message has the very line that helps."""
    place = tmp_path / f'{name.replace(".", "/")}.py'
    place.parent.mkdir(exist_ok=True)
    place.write_text('')
    message = importing(name)
    assert f'its custom_imports name {name}' in message
    assert message.endswith(f'set PYTHONPATH={tmp_path}.')


def test_a_module_that_is_nowhere_is_named(importing):
    message = importing('beside_nothing')
    assert 'its custom_imports name beside_nothing' in message and 'PYTHONPATH=FOLDER' in message


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('import not_installed_here', 'needs not_installed_here, which is not installed'),
        ('from json import no_such_name', 'fails (ImportError: cannot import name'),
        ('1 / 0', 'fails (ZeroDivisionError: division by zero)'),
        ('def broken(:', 'fails (SyntaxError: '),
    ],
)
def test_a_module_that_fails_is_named_with_its_reason(
    text, reason, importing, tmp_path, monkeypatch
):
    """It is on the path, so the path is not to blame."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'beside_failing.py').write_text(text)
    message = importing('beside_failing')
    assert f'its module beside_failing {reason}' in message and 'PYTHONPATH' not in message


def test_a_config_that_fails_is_named_with_its_reason(tmp_path):
    """A config is a program, and may raise anything."""
    file = tmp_path / 'config.py'
    file.write_text('x = 1 / 0')
    with pytest.raises(UserError, match='does not load: ZeroDivisionError: division by zero'):
        read_config(file)


def test_a_preprocessor_beside_the_model_reaches_it(tmp_path):
    """Inference and test-time augmentation would run without it; a model's own wins."""
    file = tmp_path / 'config.py'
    text = "model = dict(type='RetinaNet'{own})\ndata_preprocessor = dict(type='Beside')\n"
    file.write_text(text.format(own=''))
    assert load_config(str(file)).model.data_preprocessor.type == 'Beside'
    file.write_text(text.format(own=", data_preprocessor=dict(type='Own')"))
    assert load_config(str(file)).model.data_preprocessor.type == 'Own'
    file.write_text('data_preprocessor = dict()')
    assert 'model' not in load_config(str(file))
