"""Installation: what `import pvt_mm` asks for, what the wheel carries, what `make` says."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import pvt_mm
from pvt_mm import requirements

ROOT = Path(__file__).parents[1]
OPENMMLAB = {'torch': '2.13.0', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmsegmentation': '1.2.2'}
ONEDL = {'torch': '2.13.0', 'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6'}
MODULES = ('torch', 'mmengine', 'mmcv', 'pkg_resources')


@pytest.fixture
def pretend(monkeypatch):
    """Returns a function that makes a set of distributions and modules the only ones installed."""

    def install(distributions, modules=MODULES):
        def version(name):
            if name not in distributions:
                raise PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(requirements, 'version', version)
        monkeypatch.setattr(
            requirements, 'find_spec', lambda name: name if name in modules else None
        )

    return install


@pytest.mark.parametrize('distributions', [OPENMMLAB, ONEDL])
def test_either_stack_is_accepted(pretend, distributions):
    """Both sets of distributions satisfy the requirements."""
    pretend(distributions)
    requirements.check_requirements()


def test_fork_needs_no_pkg_resources(pretend):
    """The fork reads importlib.metadata instead, so setuptools is not asked for there."""
    pretend(ONEDL, modules=('torch', 'mmengine', 'mmcv'))
    requirements.check_requirements()


@pytest.mark.parametrize(
    ('distributions', 'modules', 'fault', 'command'),
    [
        (
            OPENMMLAB | {'torch': '2.0.1+cu118'},
            MODULES,
            'torch>=2.1 (2.0.1+cu118 installed)',
            "pip install 'torch>=2.1'",
        ),
        (
            OPENMMLAB | {'mmengine': '0.9.1'},
            MODULES,
            'mmengine>=0.10 (0.9.1 installed)',
            'pip install mmengine==0.10.7',
        ),
        (
            {'torch': '2.13.0', 'mmengine': '0.10.7', 'mmcv-full': '1.7.2'},
            MODULES,
            'mmcv>=2.0 (1.7.2 installed)',
            "pip install 'setuptools<81' ninja wheel "
            '&& pip install mmcv==2.1.0 --no-build-isolation',
        ),
        (
            ONEDL,
            ('torch', 'mmengine'),
            'mmcv>=2.0 (not installed)',
            "pip install 'setuptools<81' ninja wheel "
            '&& pip install onedl-mmcv==2.3.6 --no-build-isolation',
        ),
        (
            OPENMMLAB,
            ('torch', 'mmengine', 'mmcv'),
            'pkg_resources (not installed; mmengine imports it)',
            "pip install 'setuptools<81'",
        ),
        (
            {'torch': '2.0.1', 'mmcv': '2.1.0'},
            ('torch', 'mmcv', 'pkg_resources'),
            'torch>=2.1 (2.0.1 installed) and mmengine>=0.10 (not installed)',
            "pip install 'torch>=2.1' && pip install mmengine==0.10.7",
        ),
    ],
)
def test_one_sentence_for_what_is_missing_or_old(pretend, distributions, modules, fault, command):
    """The message names each part at fault and the command for the stack that is there."""
    pretend(distributions, modules)
    with pytest.raises(ImportError) as error:
        requirements.check_requirements()
    assert str(error.value) == f'pvt_mm needs {fault}; run: {command}'


def test_source_tree_without_metadata_is_asked_itself(pretend, monkeypatch):
    """A module on PYTHONPATH has no distribution: its own `__version__` counts."""
    pretend({name: OPENMMLAB[name] for name in ('torch', 'mmengine')})
    monkeypatch.setattr(
        requirements, 'import_module', lambda name: type(name, (), {'__version__': '1.9.0'})
    )
    with pytest.raises(ImportError, match=r'mmcv>=2\.0 \(1\.9\.0 installed\)'):
        requirements.check_requirements()


def test_import_without_mmcv_fails_in_that_sentence():
    """`import pvt_mm` itself says what is missing, before anything of it needs the part."""
    code = "import sys; sys.modules['mmcv'] = None; import pvt_mm"
    result = run([sys.executable, '-c', code], env={'PYTHONPATH': str(ROOT)})
    assert result.returncode == 1
    assert 'ImportError: pvt_mm needs mmcv>=2.0 (not installed); run: pip' in result.stderr


def test_check_is_cheap():
    """Checking the requirements imports none of them."""
    code = (
        'import runpy, sys\n'
        f'runpy.run_path({str(ROOT / "pvt_mm" / "requirements.py")!r})["check_requirements"]()\n'
        'print(sorted({"torch", "mmengine", "mmcv", "pkg_resources"} & set(sys.modules)))'
    )
    assert run([sys.executable, '-c', code]).stdout == '[]\n'


@pytest.mark.parametrize('stack', ['openmmlab', 'onedl'])
def test_pins_of_messages_are_the_pins_of_the_files(stack, monkeypatch):
    """The commands in the messages install the versions that requirements/ pins."""
    monkeypatch.setattr(requirements, '_is_onedl', lambda: stack == 'onedl')
    pins = (ROOT / 'requirements' / f'{stack}.txt').read_text().splitlines()
    for module in ('mmengine', 'mmcv', 'mmdet', 'mmseg'):
        assert requirements.pinned(module) in pins


def test_version_has_one_source():
    """The package, its metadata and version.py agree, and setup.py holds no number of its own."""
    result = run([sys.executable, 'setup.py', '--version'], cwd=ROOT)
    assert result.stdout.splitlines()[-1] == pvt_mm.__version__
    assert pvt_mm.__version__ not in (ROOT / 'setup.py').read_text()


def test_register_config_packages_touches_its_own_entries_only(monkeypatch, pretend):
    """OpenMMLab's mapping stays as it is; the fork alone gets another entry for mmseg."""
    from mmengine.config import utils

    original = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation'}
    fork = ONEDL | {'onedl-mmsegmentation': '1.4.2'}
    for distributions, mmseg in ((OPENMMLAB, 'mmsegmentation'), (fork, 'mmseg')):
        pretend(distributions)
        monkeypatch.setattr(utils, 'MODULE2PACKAGE', dict(original))
        requirements.register_config_packages()
        assert original | {'mmseg': mmseg, 'pvt_mm': 'pvt_mm.version'} == utils.MODULE2PACKAGE


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what a distribution is made from, so that building leaves the tree alone."""
    folder = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'model-index.yml'):
        shutil.copy(ROOT / name, folder)
    for name in ('pvt_mm', 'configs', 'tools', 'requirements'):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__')
        )
    return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    """The wheel, built as a user would build it."""
    folder = tmp_path_factory.mktemp('wheel')
    pip(sys.executable, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, source)
    (path,) = folder.glob('pvt_mm-*.whl')
    return path


def test_wheel_carries_configs_tools_and_index(wheel):
    """Every config, base and tool for users lies under .mim, and nothing else does."""
    names = zipfile.ZipFile(wheel).namelist()
    carried = {name.removeprefix('pvt_mm/.mim/') for name in names if '/.mim/' in name}
    configs = {
        f'configs/pvt/{path.relative_to(ROOT / "configs").as_posix()}'
        for path in (ROOT / 'configs').rglob('*')
        if path.suffix in ('.py', '.yml')
    }
    tools = {
        path.relative_to(ROOT).as_posix()
        for folder in ('.', 'analysis_tools', 'deployment', 'model_converters')
        for path in (ROOT / 'tools' / folder).iterdir()
        if path.suffix in ('.py', '.sh') and path.name != 'install.sh'
    }
    assert {'tools/train.py', 'tools/dist_train.sh', 'tools/deployment/export.py'} < tools
    assert carried == configs | tools | {'model-index.yml'}
    assert {name.split('/')[0] for name in names} == {
        'pvt_mm',
        f'pvt_mm-{pvt_mm.__version__}.dist-info',
    }


def test_wheel_carries_the_whole_package(wheel):
    """Every module of every folder is in it, and every page that a module reads."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith('pvt_mm/')}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / 'pvt_mm').rglob('*')
        if path.is_file() and path.suffix != '.pyc' and '.mim' not in path.parts
    }
    assert {name for name in names if '/.mim/' not in name} == files


LOAD = """
import json, logging, pathlib
from importlib.metadata import version

import pvt_mm
from mmengine.config import Config
from mmengine.hub import get_config

pathlib.Path('leaf.py').write_text(
    "_base_ = 'pvt_mm::pvt/retinanet_pvt_s_fpn_1x_coco.py'\\nmodel = dict(neck=dict(num_outs=6))"
)
leaf = Config.fromfile('leaf.py')
semantic = get_config('pvt_mm::pvt/fpn_pvt_s_ade20k_40k.py')
print(json.dumps({
    'package': pvt_mm.__file__,
    'version': version('pvt-mm'),
    'backbones': [leaf.model.backbone.type, semantic.model.backbone.type],
    'neck': [leaf.model.neck.num_outs, leaf.model.neck.in_channels],
}))
"""


@pytest.mark.parametrize('how', ['wheel', 'editable'])
def test_configs_resolve_behind_the_package_name(how, source, request, tmp_path):
    """`pvt_mm::pvt/...` loads, as base and by name, from a wheel and from `pip install -e`."""
    venv.create(tmp_path / 'venv', symlinks=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    site = tmp_path / 'venv' / Path(sysconfig.get_paths()['purelib']).relative_to(sys.prefix)
    # What is installed here is there too, but not this environment's own pvt_mm.
    (site / 'here.pth').write_text(sysconfig.get_paths()['purelib'])
    what = [request.getfixturevalue('wheel')] if how == 'wheel' else ['-e', source]
    pip(python, 'install', '--no-deps', '--no-build-isolation', '--ignore-installed', *what)

    result = run([python, '-c', LOAD], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = ast.literal_eval(result.stdout.splitlines()[-1])
    assert Path(loaded['package']).is_relative_to(site if how == 'wheel' else source)
    assert loaded['version'] == pvt_mm.__version__
    assert loaded['backbones'] == ['PVT', 'PVT']
    assert loaded['neck'] == [6, [64, 128, 320, 512]]


@pytest.mark.parametrize(
    'name', ['retinanet_pvt_s_fpn_1x_coco', 'mask_rcnn_pvt_s_fpn_1x_coco', 'fpn_pvt_s_ade20k_40k']
)
def test_inherited_parts_build(name, tmp_path):
    """What mmengine builds of an inherited config is found, though it looks in a scope `pvt_mm`."""
    from mmengine.config import Config
    from mmengine.registry import HOOKS, PARAM_SCHEDULERS

    leaf = tmp_path / 'leaf.py'
    leaf.write_text(f"_base_ = 'pvt_mm::pvt/{name}.py'")
    cfg = Config.fromfile(leaf)
    assert cfg.model.get('_scope_') == cfg.default_scope
    assert cfg.val_dataloader.dataset.get('_scope_') == cfg.default_scope
    for registry, parts in ((HOOKS, cfg.custom_hooks), (PARAM_SCHEDULERS, cfg.param_scheduler)):
        for part in parts:
            if part.get('_scope_') not in (cfg.default_scope, 'mmengine'):
                assert registry.get(part['type']), part


def test_make_refuses_an_unknown_stack():
    """A mistyped STACK is named, with those that exist, before anything is made."""
    result = run(['make', 'install', 'STACK=mmdet'], cwd=ROOT)
    assert result.returncode != 0
    assert 'STACK=mmdet is not known: say STACK=openmmlab (the default) or STACK=onedl' in (
        result.stderr
    )


def test_make_runs_chosen_tests_on_the_other_stack():
    """Each stack has its own environment, and TESTS says which tests run."""
    chosen = 'tests/tools/test_tools.py -k det'
    shown = run(['make', '-n', 'test', 'STACK=onedl', f'TESTS={chosen}'], cwd=ROOT)
    options = '-q -n 2 --dist loadfile'
    assert f'.venv-onedl/bin/python -m pytest {options} {chosen}' in shown.stdout
    last = run(['make', '-n', 'test'], cwd=ROOT).stdout.splitlines()[-1].rstrip()
    assert last.endswith(f' .venv/bin/python -m pytest {options}')


def test_ci_runs_both_stacks_and_names_tests_that_exist():
    """The tests that CI runs on the second stack are there."""
    script = (ROOT / '.ci' / 'run').read_text()
    assert 'make test\n' in script and 'make test STACK=onedl TESTS=' in script
    named = re.findall(r'tests/\w+/test_\w+\.py', script)
    assert len(named) == len(set(named)) >= 6
    assert all((ROOT / name).is_file() for name in named)


def test_make_help_names_every_target():
    """`make help` lists what the Makefile can do."""
    listed = run(['make', 'help'], cwd=ROOT).stdout
    for target in ('install', 'demo', 'demo-all', 'test', 'lint', 'clean'):
        assert f'make {target} ' in listed


def test_missing_compiler_is_one_apt_line(tmp_path):
    """Without g++ the installation stops before it makes anything and prints what installs it."""
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name in ('bash', 'dirname', 'nproc', 'xargs', 'echo'):
        (tools / name).symlink_to(shutil.which(name))
    result = install({'PATH': str(tools), 'VENV': str(tmp_path / 'venv')})
    assert result.returncode == 1
    (apt,) = (line for line in result.stderr.splitlines() if 'apt-get' in line)
    assert 'sudo apt-get update && sudo apt-get install -y g++' in apt
    assert not (tmp_path / 'venv').exists()


@pytest.mark.parametrize(
    ('python', 'says'),
    [
        ('#!/bin/sh\necho 3.13\n', 'pvt_mm needs Python 3.10, 3.11 or 3.12, and {} is 3.13'),
        (None, '{} is not there: install Python 3.10, 3.11 or 3.12'),
    ],
)
def test_unfit_python_is_refused(python, says, tmp_path):
    """A Python that is missing or not supported is named, with the way out."""
    path = tmp_path / 'python'
    if python:
        path.write_text(python)
        path.chmod(0o755)
    result = install({'PYTHON': str(path), 'VENV': str(tmp_path / 'venv')})
    assert result.returncode == 1
    assert f'error: {says.format(path)}' in result.stderr
    assert 'PYTHON=' in result.stderr


def test_two_stacks_in_one_venv_are_refused(tmp_path):
    """The stacks provide the same modules, so the second one is sent to another folder."""
    (tmp_path / '.installed-onedl').touch()
    result = install({'VENV': str(tmp_path)})
    assert result.returncode == 1
    assert 'holds the other stack' in result.stderr


# Stands in for a venv's interpreter: logs what pip is asked; mmcv's ops work once it was forced.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    '-m pip'*'--no-binary mmcv'*) touch '{folder}/forced' ;;
    '- mmcv=='*) exec test -e '{folder}/forced' ;;
    '-') echo {target} ;;
esac
echo "CUDA=${{CUDA_VISIBLE_DEVICES-unset}} JOBS=$MAX_JOBS $*" >> '{folder}/log'
"""


@pytest.mark.parametrize(('target', 'cuda'), [('cpu', 'unset'), ('nocompiler', '')])
def test_mmcv_is_rebuilt_rather_than_trusted(target, cuda, tmp_path):
    """A wheel whose ops fail is built again, for the CPU where there is no CUDA compiler."""
    if missing := install({}, 'missing').stdout:
        pytest.skip(f'install.sh stops here, for want of {missing.split()}')
    python = tmp_path / 'venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(folder=tmp_path, target=target))
    python.chmod(0o755)
    result = install({'VENV': str(tmp_path / 'venv'), 'JOBS': '3'}, without='CUDA_VISIBLE_DEVICES')
    assert result.returncode == 0, result.stderr

    first, second = (
        line
        for line in (tmp_path / 'log').read_text().splitlines()
        if '-m pip' in line and 'mmcv==2.1.0' in line
    )
    assert first.startswith(f'CUDA={cuda} JOBS=3 ') and '--no-build-isolation' in first
    for flag in ('--no-cache-dir', '--force-reinstall', '--no-deps', '--no-binary mmcv'):
        assert flag in second and flag not in first
    assert 'about 7 minutes on 2 cores' in result.stdout
    assert ('no CUDA compiler (nvcc)' in result.stdout) == (target == 'nocompiler')


def install(env, *arguments, without=None):
    """Runs tools/install.sh with this Python unless `env` names another."""
    base = {'PYTHON': sys.executable, 'STACK': 'openmmlab'}
    script = ROOT / 'tools' / 'install.sh'
    return run([shutil.which('bash'), script, *arguments], env=base | env, without=without)


def pip(python, *arguments):
    """Runs pip without the network."""
    result = run([python, '-m', 'pip', *arguments, '--no-index', '--disable-pip-version-check'])
    assert result.returncode == 0, result.stderr


def run(command, cwd=None, env=None, without=None):
    """Runs a command outside the tree's own import path; its output is text."""
    hidden = {'PYTHONPATH', 'MAKEFLAGS', 'MAKELEVEL', 'STACK', 'VENV', 'PYTHON', without}
    clean = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
