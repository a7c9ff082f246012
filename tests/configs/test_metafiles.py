"""What OpenMMLab's tools are told of the configs is true, and they find it where they look."""

import shutil
import subprocess
import sys

import pytest
import yaml
from mmengine.config.utils import _get_cfg_metainfo
from mmengine.hub import get_config
from recipes import LEAVES, load, parts_of, published_figures
from reference import REPO

MIM = REPO / 'pvt_mm' / '.mim'
INDEX = yaml.safe_load((REPO / 'model-index.yml').read_text())
METAFILES = [
    yaml.safe_load((REPO / 'configs' / path.removeprefix('configs/pvt/')).read_text())
    for path in INDEX['Import']
]
MODELS = {model['Name']: model for file in METAFILES for model in file['Models']}
DATA = {'ade20k': 'ADE20K', 'in1k': 'ImageNet-1k'}
SIZES = {'tiny': 'Tiny', 'small': 'Small', 'medium': 'Medium', 'large': 'Large'}


def figures(model):
    """The metrics of a model in the order in which the reference prints them."""
    return [value for result in model.get('Results', []) for value in result['Metrics'].values()]


def test_every_metafile_is_imported():
    """The index lists all metafiles, under the path that mmengine and mim look for below .mim."""
    files = {f'configs/pvt/metafiles/{p.name}' for p in REPO.glob('configs/metafiles/*')}
    assert set(INDEX['Import']) == files
    assert len(INDEX['Import']) == len(files)
    for path in INDEX['Import']:
        assert (MIM / path).is_file(), 'setup.py makes the links of pvt_mm/.mim'


def test_every_recipe_is_listed_once():
    """Every leaf has one entry, named like its file and pointing to it."""
    listed = [model['Name'] for file in METAFILES for model in file['Models']]
    assert len(listed) == len(set(listed))
    assert {f'{name}.py' for name in listed} == set(LEAVES)
    for name, model in MODELS.items():
        assert model['Config'] == f'configs/pvt/{name}.py'
        assert name == name.lower(), 'mim lowers what it searches for'


def test_every_model_is_in_a_collection_of_its_file():
    """One file holds one family; a collection names its paper and its data."""
    for file in METAFILES:
        (collection,) = file['Collections']
        assert collection['Paper'].startswith('https://arxiv.org/abs/')
        for model in file['Models']:
            assert model['In Collection'] == collection['Name']
            data = next((data for part, data in DATA.items() if part in model['Name']), 'COCO')
            assert collection['Metadata']['Training Data'] == data


@pytest.mark.parametrize('name', MODELS)
def test_results_are_the_published_ones(name):
    """A model has the reference's figures, marked as the reference's, or none."""
    model = MODELS[name]
    assert figures(model) == published_figures(f'{name}.py')
    marked = model['Metadata'].get('Results From')
    assert marked == ('whai362/PVT, not reproduced here' if figures(model) else None)
    boxes = [('Object Detection', 'COCO', 'box AP'), ('Instance Segmentation', 'COCO', 'mask AP')]
    expected = boxes
    if 'ade20k' in name:
        expected = [('Semantic Segmentation', 'ADE20K', 'mIoU')]
    elif 'in1k' in name:
        expected = [('Image Classification', 'ImageNet-1k', 'Top 1 Accuracy')]
    found = [(r['Task'], r['Dataset'], *r['Metrics']) for r in model.get('Results', [])]
    assert found == expected[: len(found)]


@pytest.mark.parametrize('name', MODELS)
def test_metadata_is_the_configs(name):
    """Backbone and schedule are those of the config."""
    stated, cfg = MODELS[name]['Metadata'], load(f'{name}.py')
    _, kind, arch = parts_of(name)
    size = SIZES.get(arch) or arch.replace('b', 'B').replace('_li', '-Linear')
    assert stated['Backbone'] == f'{kind}-{size}'
    assert cfg.train_cfg.get('max_epochs') == stated.get('Epochs')
    assert cfg.train_cfg.get('max_iters') == stated.get('Iterations')


@pytest.mark.parametrize('name', MODELS)
def test_download_has_nothing_to_fetch(name):
    """`mim download` needs a weight, and fetches none whose address ends in a slash.

    It belongs to the metadata: under `Weights`, mmengine would load it.
    """
    weight = MODELS[name]['Metadata']['Weight']
    assert weight.endswith('/') and 'Weights' not in MODELS[name]
    assert weight.startswith('https://github.com/whai362/') or weight == 'none/'
    assert (weight == 'none/') is not bool(figures(MODELS[name]))


def test_mmengine_finds_a_recipe_by_its_name():
    """`pvt_mm::pvt/...` goes through the metafiles; weights that there are not are an error."""
    name = 'pvt/retinanet_pvt_s_fpn_1x_coco.py'
    assert _get_cfg_metainfo(str(REPO / 'pvt_mm'), name) == MODELS['retinanet_pvt_s_fpn_1x_coco']
    assert get_config(f'pvt_mm::{name}').model.type == 'RetinaNet'
    with pytest.raises(AssertionError, match='Cannot find `Weights`'):
        get_config(f'pvt_mm::{name}', pretrained=True)


@pytest.mark.parametrize('state', ['missing', 'text'])
def test_setup_makes_the_links(state, tmp_path):
    """Where .mim is missing, or its links became text files, setup.py makes it."""
    for name in ('setup.py', 'pyproject.toml', 'model-index.yml'):
        shutil.copy(REPO / name, tmp_path)
    shutil.copytree(REPO / 'requirements', tmp_path / 'requirements')
    shutil.copytree(REPO / 'configs', tmp_path / 'configs')
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'pvt_mm').mkdir()
    shutil.copy(REPO / 'pvt_mm' / 'version.py', tmp_path / 'pvt_mm')
    mim = tmp_path / 'pvt_mm' / '.mim'
    if state == 'text':
        (mim / 'configs').mkdir(parents=True)
        (mim / 'configs' / 'pvt').write_text('../../../configs')
        (mim / 'model-index.yml').write_text('../../model-index.yml')
    for _ in range(2):  # a second time it finds them
        command = [sys.executable, 'setup.py', '--version']
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert (mim / 'model-index.yml').read_text() == (REPO / 'model-index.yml').read_text()
        assert (mim / 'configs' / 'pvt' / LEAVES[0]).is_file()
        assert (mim / 'tools').is_dir() and (mim / 'tools').is_symlink()
