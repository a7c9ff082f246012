"""PVTs are found in a checkpoint by their keys, whatever stands around them and however deep."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ARCHS, FORMATS, PAIRS, backbone_class, load_json

from pvt_mm import CheckpointMismatchError, PVTv2, convert_checkpoint
from pvt_mm.archs import MIT_ARCHS
from pvt_mm.checkpoint import key_maps
from pvt_mm.checkpoint.atoms import recognise_arch, to_atoms
from pvt_mm.checkpoint.convert import bare_backbone, from_atoms, head_tensors
from pvt_mm.checkpoint.find import DEPTH, choose, find, place
from pvt_mm.checkpoint.key_maps import plain
from pvt_mm.checkpoint.load import load_into_backbone
from pvt_mm.checkpoint.safe_load import read_checkpoint


@functools.cache
def target(arch):
    """The state dict of a backbone, without memory."""
    with torch.device('meta'):
        return backbone_class(arch)(arch).state_dict()


@functools.cache
def weights(arch, fmt):
    """The published file of an arch, classifier included, in a format and without memory."""
    shapes = load_json('checkpoint_keys.json')[arch]['official']
    official = {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}
    return convert_checkpoint(official, to=fmt)


@functools.cache
def mit(name, fmt='official'):
    """SegFormer's encoder in the official names, which are PVTv2's, or another format's."""
    with torch.device('meta'):
        state = PVTv2(MIT_ARCHS[name]).state_dict()
    return convert_checkpoint(state, to=fmt)


def load(checkpoint, arch, prefix='', **kwargs):
    """Load into a backbone without memory: what it got, and the sentence."""
    state = dict(checkpoint)
    name = backbone_class(arch).__name__
    message = load_into_backbone(state, prefix, target(arch), name, **kwargs)
    return state, message


def same(state, expected, file):
    """Whether two loads took the same tensors of a file; joined ones are new in each load."""
    own = {id(tensor) for tensor in file.values()}
    return state.keys() == expected.keys() and all(
        state[key] is tensor or (id(tensor) not in own and state[key].shape == tensor.shape)
        for key, tensor in expected.items()
    )


def arrived(state, arch, fmt):
    """Whether a load took every tensor of the published file, each to its place."""
    return same(state, load(weights(arch, fmt), arch)[0], weights(arch, fmt))


# What may stand around weights

WORDS = (
    'encoder', 'backbone', 'model', 'module', 'net', 'student', 'teacher', 'ema', 'layers',
    'stages', 'block1', 'blocks', 'attn', 'pvt', 'pvt_v2', 'segformer', 'bottom_up', 'body',
    '0', '1', '3', '_orig_mod', 'my_block1', 'patch_embed', 'norm', 'q',
)  # fmt: skip
DICTS = (
    'state_dict', 'model', 'model_state_dict', 'net', 'module', 'ema', 'state_dict_ema', 'params',
    'my_weights', '7', '_orig_mod',
)  # fmt: skip
names = st.sampled_from(WORDS) | st.text(
    st.characters(blacklist_characters='.', blacklist_categories=('Cs',)), min_size=1, max_size=6
)
prefixes = st.lists(names, max_size=5).map(lambda parts: ''.join(f'{part}.' for part in parts))
wrappers = st.lists(st.sampled_from(DICTS), max_size=DEPTH)
others = st.sampled_from(
    [
        {},
        {'meta': {'epoch': 3}, 'epoch': 3, 'args': None},
        {'optimizer': {'state': {0: {'exp_avg': torch.ones(1)}}, 'param_groups': [{}]}},
        {'scale': torch.ones(1), 'lr': 0.1},
    ]
)
beside = st.sampled_from(
    [{}, {'decode_head.conv.weight': torch.ones(1)}, {'fc.bias': torch.ones(1), 'x.norm1.bias': 1}]
)


def wrap(tensors, prefix, dicts, state, rest):
    checkpoint = {f'{prefix}{key}': value for key, value in tensors.items()}
    checkpoint |= {f'other.{key}': value for key, value in rest.items()} if plain(prefix) else {}
    for name in reversed(dicts):
        checkpoint = state | {name: checkpoint}
    return checkpoint


around = st.tuples(prefixes, wrappers, others, beside)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PAIRS), around)
def test_weights_arrive_from_anywhere(pair, surroundings):
    """11 archs, five formats, random prefixes, dicts and neighbours: every tensor has its place."""
    arch, fmt = pair
    checkpoint = wrap(weights(arch, fmt), *surroundings)
    state, message = load(checkpoint, arch)
    count = len(target(arch))
    assert arrived(state, arch, fmt)
    assert f'loaded {count} of {count} backbone tensors from weights of {arch} in {fmt}' in message
    # And by a hook into a whole model, where a load sees its own prefix alone.
    placed, _ = place(checkpoint, {'neck.pvt.': (None, None)})
    own = {key: value for key, value in placed.items() if key.startswith('neck.pvt.')}
    state, _ = load(own, arch, 'neck.pvt.')
    assert arrived({k.removeprefix('neck.pvt.'): v for k, v in state.items()}, arch, fmt)
    assert bare_backbone(checkpoint, arch).keys() == bare_backbone(weights(arch, fmt)).keys()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PAIRS), st.sampled_from(ARCHS), around)
def test_what_does_not_fit_is_called_what_it_is(pair, own, surroundings):
    """The refusal names the arch of the weights, however they are wrapped; it is never 'no PVT'."""
    arch, fmt = pair
    if arch == own:
        return
    with pytest.raises(CheckpointMismatchError) as bare:
        load(weights(arch, fmt), own)
    with pytest.raises(CheckpointMismatchError) as refusal:
        load(wrap(weights(arch, fmt), *surroundings), own)
    assert str(refusal.value) == str(bare.value)
    assert re.search(rf'they hold PVT(v2)? {arch} \(', str(refusal.value))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MIT_ARCHS)), st.sampled_from(ARCHS), around)
def test_mit_is_never_called_a_pvt(name, own, surroundings):
    """SegFormer's encoder has PVTv2's names; the sentence says whose it is, and what takes it."""
    with pytest.raises(CheckpointMismatchError) as refusal:
        load(wrap(mit(name), *surroundings), own)
    message = str(refusal.value)
    assert f"they hold SegFormer's {name} (" in message
    arch = eval(re.search(r'PVTv2 takes them with arch=(dict\(.*?\))\.', message)[1])
    assert arch == MIT_ARCHS[name]
    count = len(mit(name))
    said = load_into_backbone(dict(mit(name)), '', mit(name, 'pvt_mm'), 'PVTv2')
    assert f'loaded {count} of {count} backbone tensors from weights of {name} in' in said


def test_mit_of_mmseg_and_hugging_face(tmp_path):
    """The encoders of SegFormer that people have are recognised, with all of their tensors."""
    from mmseg.models import MixVisionTransformer

    encoder = MixVisionTransformer(embed_dims=32, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8])
    files = [encoder.state_dict()]
    transformers = pytest.importorskip('transformers')
    model = transformers.SegformerForImageClassification(transformers.SegformerConfig())
    model.save_pretrained(tmp_path)  # under the names of the published files
    files.append(read_checkpoint(tmp_path / 'model.safetensors'))
    for file in files:
        (found,) = find(file)
        assert found.arch.name == 'mit_b0'
        assert not [key for key in found.tensors if not key_maps.match(key, found.fmt)]
        assert bare_backbone(file).keys() == bare_backbone(mit('mit_b0')).keys()


def test_mit_b5_is_pvtv2_b5():
    """Depths, widths and ratios are the same, so that it is taken for what it is as good as."""
    with torch.device('meta'):
        state = PVTv2('b5').state_dict()
    assert recognise_arch(to_atoms(state, key_maps.PVT_MM)).name == 'b5'


def test_classifiers_are_found_too():
    """In the prefix, or beside Hugging Face's own."""
    for fmt in ('official', 'timm', 'huggingface', 'pvt_mm'):
        for prefix in ('', 'model.'):
            file = wrap(weights('b0', fmt), prefix, ['net'], {}, {})
            assert {leaf: t.shape for leaf, t in head_tensors(file).items()} == {
                'weight': (1000, 256), 'bias': (1000,)
            }  # fmt: skip
    assert head_tensors({'conv1.weight': torch.ones(1)}) == {}


def test_timm_features_only():
    """timm's FeatureListNet writes stages_0 for stages.0."""
    flat = {re.sub(r'^stages\.', 'stages_', k): v for k, v in weights('b2', 'timm').items()}
    state, message = load({f'encoder.model.{key}': value for key, value in flat.items()}, 'b2')
    assert arrived(state, 'b2', 'timm')
    assert "of b2 in timm format under 'encoder.model.'" in message


def test_names_put_into_the_middle_by_wrappers_of_pytorch():
    """torch.compile, FSDP and recomputation of single blocks leave their names everywhere."""
    for inserted in ('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'):
        odd = {
            re.sub(r'(block\d+\.\d+\.)', rf'\1{inserted}.', f'model.{inserted}.{key}'): value
            for key, value in weights('b0', 'official').items()
        }
        state, _ = load(odd, 'b0')
        assert arrived(state, 'b0', 'official')


# Several PVTs in one file


def files(**parts):
    """One file of several weights: name -> (arch, prefix)."""
    return {
        f'{prefix}.{key}'.lstrip('.'): torch.empty_like(value)
        for arch, prefix in parts.values()
        for key, value in weights(arch, 'official').items()
    }


def test_averaged_weights_come_first():
    """EMA before raw, a teacher before its student; the sentence says so."""
    student, teacher = weights('b0', 'official'), dict(weights('b0', 'mmdet'))
    for checkpoint in (
        {'state_dict': student, 'state_dict_ema': teacher},
        {'model': student, 'model_ema': teacher, 'optimizer': {}},
        {'net': student, 'ema': {'module': teacher}},
        {f'student.backbone.{k}': v for k, v in student.items()}
        | {f'teacher.backbone.{k}': v for k, v in teacher.items()},
        {f'model.{k}': v for k, v in student.items()}
        | {f'ema_model.module.{k}': v for k, v in teacher.items()},
    ):
        state, message = load(checkpoint, 'b0')
        assert arrived(state, 'b0', 'mmdet')
        assert 'in mmdet format under' in message and 'averaged weights come first' in message
        placed, (told,) = place(checkpoint, {'backbone.': (None, None)})
        assert 'backbone.layers.0.0.projection.weight' in placed
        assert "go to 'backbone.': averaged weights come first" in told


def test_the_copy_that_mmengine_keeps_is_not_the_average():
    """EMAHook saves the average as state_dict, and the raw weights as ema_state_dict."""
    raw = {f'module.backbone.{key}': value for key, value in weights('b0', 'mmdet').items()}
    used = {f'backbone.{key}': value for key, value in weights('b0', 'official').items()}
    for checkpoint, fmt in (
        ({'message_hub': {}, 'ema_state_dict': raw, 'state_dict': used}, 'official'),
        ({'ema_state_dict': raw, 'state_dict': used}, 'mmdet'),
    ):
        choice, _ = choose(find(checkpoint))
        assert choice.fmt.name == fmt


def test_the_models_own_names_come_before_a_teacher():
    """A file with backbone. and teacher.backbone. fills the backbone of a model by its own name."""
    own = {f'backbone.{key}': value for key, value in weights('b0', 'official').items()}
    teacher = {f'teacher.backbone.{key}': v for key, v in weights('b0', 'mmdet').items()}
    for checkpoint in (own | teacher, {'state_dict': teacher | own}):
        placed, (told,) = place(checkpoint, {'backbone.': (None, None)})
        assert placed.keys() == (own | teacher).keys(), 'the model may have a teacher'
        assert 'own names come first' in told
        assert arrived(load(checkpoint, 'b0')[0], 'b0', 'official')


def test_weights_of_the_arch_come_first():
    """Of two encoders, the one that fits is meant."""
    checkpoint = files(rgb=('b1', 'rgb'), depth=('b0', 'depth'))
    assert "of b0 in official format under 'depth.' (it has the arch)" in load(checkpoint, 'b0')[1]
    assert "under 'rgb.'" in load(checkpoint, 'b1')[1]


def test_what_stays_ambiguous_lists_the_choices_and_the_argument():
    """Two encoders of one arch: the sentence names both; weights_prefix takes either."""
    for prefixes in (('rgb', 'depth'), ('a.backbone', 'b.backbone')):
        checkpoint = files(one=('b0', prefixes[0]), two=('b0', prefixes[1]))
        for wrapped in (checkpoint, {'state_dict': checkpoint}):
            with pytest.raises(CheckpointMismatchError) as refusal:
                load(wrapped, 'b0')
            first, second = (f"'{prefix}.' (PVTv2 b0" for prefix in prefixes)
            assert first in str(refusal.value) and second in str(refusal.value)
            assert f"choose with weights_prefix='{prefixes[0]}.' in the backbone" in str(
                refusal.value
            )
            for prefix in prefixes:
                for asked in (f'{prefix}.', prefix):
                    state, message = load(wrapped, 'b0', weights_prefix=asked)
                    assert 'is asked for' in message and f"{prefix}.'" in message
                    key = f'{prefix}.patch_embed1.proj.weight'
                    assert state['stages.0.patch_embed.proj.weight'] is checkpoint[key]
            with pytest.raises(CheckpointMismatchError, match="no PVT under 'nir.', but under"):
                load(wrapped, 'b0', weights_prefix='nir.')
            with pytest.raises(CheckpointMismatchError, match='--prefix'):
                bare_backbone(wrapped)
            assert len(bare_backbone(wrapped, prefix=prefixes[1])) == len(target('b0'))
            converted = convert_checkpoint(wrapped, to='mmdet')
            assert {key.split('.layers.')[0] for key in converted} == set(prefixes), 'both of them'
    two = {'rgb': weights('b0', 'official'), 'depth': weights('b0', 'official')}
    with pytest.raises(CheckpointMismatchError, match="under 'rgb.' .* and 'depth.' "):
        convert_checkpoint(two)
    assert len(convert_checkpoint(two, prefix='depth')) == len(weights('b0', 'official'))


def test_weights_prefix_is_no_hindrance_where_nothing_is_to_choose():
    """It stays in a config, which later loads the training's own checkpoints."""
    assert arrived(load(weights('b0', 'timm'), 'b0', weights_prefix='rgb.')[0], 'b0', 'timm')
    placed, told = place(
        {'state_dict': {f'backbone.{k}': v for k, v in weights('b0', 'timm').items()}},
        {'backbone.': (None, 'rgb.')},
    )
    assert told == [] and all(key.startswith('backbone.') for key in placed)


# Whole models


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FORMATS), prefixes, wrappers, others)
def test_whole_models_keep_their_other_parts(fmt, prefix, dicts, state):
    """What stands around a whole model goes; neck and head arrive with the backbone."""
    backbone = {f'backbone.{key}': value for key, value in weights('b0', fmt).items()}
    parts = {'neck.a': torch.ones(1), 'bbox_head.b': torch.ones(2)}
    checkpoint = wrap(backbone | parts, prefix, dicts, state, {})
    placed, _ = place(checkpoint, {'backbone.': (None, None)})
    assert {key: placed[key] for key in parts} == parts
    own = {key: value for key, value in placed.items() if key.startswith('backbone.')}
    assert {id(value) for value in own.values()} == {id(value) for value in backbone.values()}
    assert placed.keys() - own.keys() - parts.keys() <= {'scale'}


def test_two_backbones_of_a_model_get_their_own():
    """Streams with a PVT each: a file of the same model fills both, one of a single PVT too."""
    model = {'rgb.': (None, None), 'depth.': (None, None)}
    checkpoint = files(one=('b0', 'net.rgb'), two=('b0', 'net.depth')) | {
        'net.head.x': torch.ones(1)
    }
    placed, _ = place({'model': checkpoint}, model)
    assert placed == {key.removeprefix('net.'): value for key, value in checkpoint.items()}
    placed, _ = place(weights('b0', 'official'), model)
    assert len(placed) == 2 * len(weights('b0', 'official'))
    chosen = {'rgb.': (None, 'a.'), 'depth.': (None, 'b.')}
    checkpoint = files(one=('b0', 'a'), two=('b0', 'b'))
    placed, told = place(checkpoint, chosen)
    assert placed['depth.norm1.weight'] is checkpoint['b.norm1.weight']
    assert placed['rgb.norm1.weight'] is checkpoint['a.norm1.weight'] and len(told) == 2


def test_dicts_of_modules_are_a_whole_model():
    """One dict a module, as scripts save them."""
    own = weights('b0', 'official')
    placed, _ = place(
        {'backbone': own, 'neck': {'a': torch.ones(1)}, 'epoch': 3}, {'backbone.': (None, None)}
    )
    assert placed.keys() == {'neck.a', *(f'backbone.{key}' for key in own)}


# What is no PVT


def test_other_models_are_none():
    """Swin, ConvNeXt, ViT and Twins have keys that end as some of PVT's do."""
    for keys in (
        ['patch_embed.proj.weight', 'layers.0.blocks.0.norm1.weight', 'norm1.weight'],
        ['stages.0.blocks.0.mlp.fc1.weight', 'stages.0.downsample.norm.weight'],
        ['patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', 'blocks.0.norm1.weight'],
        ['patch_embeds.0.proj.weight', 'blocks.0.0.attn.q.weight', 'pos_block.0.proj.weight'],
    ):
        assert find(dict.fromkeys(keys, torch.ones(2, 2))) == []


def test_a_look_alike_is_told_by_its_keys():
    """Shunted Transformer has PVTv2's names and two kv; the sentence shows one."""
    odd = {key.replace('attn.kv', 'attn.kv1'): v for key, v in weights('b2', 'official').items()}
    odd['block1.0.norm3.weight'] = torch.empty(64, device='meta')
    del odd['block4.2.mlp.fc1.weight'], odd['block4.2.mlp.fc1.bias']
    with pytest.raises(CheckpointMismatchError, match='kv.weight is missing'):
        load(odd, 'b2')
    deeper = {k.replace('block1.0.', 'block1.7.'): v for k, v in odd.items()} | odd
    with pytest.raises(CheckpointMismatchError, match='keys are of no PVT, such as block1'):
        load(deeper, 'b2')


def test_the_way_out_is_true():
    """Other arch, same arch but not whole, nothing at all: each its own sentence."""
    tiny = weights('tiny', 'official')
    for file, message in (
        (weights('small', 'official'), 'Choose the arch of the weights.*takes what fits'),
        ({k: v for k, v in tiny.items() if 'fc1' not in k}, 'of this arch, but not whole'),
        ({'conv1.weight': torch.ones(1)}, 'named such as conv1.weight; take a PVT'),
        ({'block1.0.mlp.fc1.bias': torch.ones(512)}, 'they hold parts of a PVT, and 1 of 156'),
    ):
        with pytest.raises(CheckpointMismatchError, match=message):
            load(file, 'tiny')
    with pytest.raises(CheckpointMismatchError, match="have no keys under 'backbone.'"):
        load({'net.x': torch.ones(1)}, 'tiny', 'backbone.')
    with pytest.raises(CheckpointMismatchError) as refusal:
        load({'conv1.weight': torch.ones(1)}, 'tiny')
    assert 'allow_partial' not in str(refusal.value), 'it would not help'


def test_segformer_is_not_written():
    """Its format is read alone: a PVT in it would be no SegFormer."""
    atoms = to_atoms(target('b0'), key_maps.PVT_MM)
    written = convert_checkpoint(target('b0'), to='huggingface')
    assert not any('sr.weight' in key for key in written)
    assert len(from_atoms(atoms, key_maps._HUGGINGFACE_MIT)) > len(target('b0')), 'k and v apart'
