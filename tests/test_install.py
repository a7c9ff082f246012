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
            ONEDL | {'onedl-mmcv': '1.9.0'},
            MODULES,
            'mmcv>=2.0 (1.9.0 installed)',
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


BACKBONE_ALONE = """
import sys
for name in ('mmcv', 'mmdet', 'mmseg'):
    sys.modules[name] = None  # not there to be imported
import torch
import pvt_mm
from mmengine.registry import MODELS
backbone = MODELS.build(dict(type='PVTv2', arch='b0')).eval()
with torch.inference_mode():
    print([tuple(feature.shape) for feature in backbone(torch.randn(1, 3, 64, 96))])
"""


def test_backbone_alone_needs_no_mmcv():
    """With torch and mmengine the backbones can be imported, built and run."""
    result = run([sys.executable, '-c', BACKBONE_ALONE], env={'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0, result.stderr
    shapes = [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    assert result.stdout.strip() == str(shapes)


WAITING = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == 'torch':
            print(os.environ.get('OMP_WAIT_POLICY'))
            sys.exit()

sys.meta_path.insert(0, Watch())
import pvt_mm
"""


@pytest.mark.parametrize(
    ('own', 'policy'), [({}, 'PASSIVE'), ({'OMP_WAIT_POLICY': 'active'}, 'active')]
)
def test_threads_wait_without_spinning(own, policy):
    """The variable is set before PyTorch is loaded, unless the user has set it."""
    env = {'PYTHONPATH': str(ROOT)} | own
    without = None if own else 'OMP_WAIT_POLICY'
    assert run([sys.executable, '-c', WAITING], env=env, without=without).stdout == f'{policy}\n'


@pytest.mark.parametrize('tool', ['train', 'test', 'infer', 'analysis_tools/visualize'])
def test_tools_load_pytorch_after_that(tool):
    """The first import that is not Python's own is pvt_mm's."""
    tree = ast.parse((ROOT / 'tools' / f'{tool}.py').read_text())
    names = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    foreign = [name for name in names if name.partition('.')[0] not in sys.stdlib_module_names]
    assert foreign[0].partition('.')[0] == 'pvt_mm'


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
        if path.suffix in ('.py', '.sh') and path.name not in ('install.sh', 'build_mmcv.py')
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


def test_docker_runs_what_the_documentation_says():
    """The image has the parts that install.sh would miss, and then runs the documented command."""
    lines = (ROOT / 'docker' / 'Dockerfile').read_text().splitlines()
    packages, command = [line.removeprefix('RUN ') for line in lines if line.startswith('RUN ')]
    prefix = 'apt-get update && apt-get install -y '
    assert packages.startswith(prefix)
    needed = {'g++', 'python3-dev', 'python3-venv', 'libgl1', 'libglib2.0-0', 'make'}
    assert needed < set(packages.removeprefix(prefix).split())
    assert f'\n{command}\n' in (ROOT / 'docs' / 'installation.md').read_text()
    ignored = (ROOT / '.dockerignore').read_text().split()
    assert {'.venv*', 'data', 'work_dirs'} <= set(ignored)


def test_fresh_machine_says_how_to_call_it():
    """Without a folder it prints its usage and touches nothing."""
    script = ROOT / 'tests' / 'stress' / 'fresh_machine.sh'
    result = run([shutil.which('bash'), script], cwd=ROOT)
    assert result.returncode == 1
    assert 'bash tests/stress/fresh_machine.sh FOLDER [COMMAND...]' in result.stdout


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


@pytest.mark.parametrize('asked', ['TORCH=2.14.1', 'FORCE_CUDA=1', 'FORCE_CUDA=0'])
def test_another_pytorch_is_not_passed_over_for_what_is_done(asked, tmp_path):
    """After an installation, `make install` does nothing, unless PyTorch or CUDA is asked for."""
    (tmp_path / '.installed-openmmlab').touch()
    command = ['make', '-n', 'install', f'VENV={tmp_path}']
    assert 'install.sh' not in run(command, cwd=ROOT).stdout
    assert ('install.sh' in run([*command, asked], cwd=ROOT).stdout) == (asked != 'FORCE_CUDA=0')


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


@pytest.mark.parametrize(
    ('system', 'command'),
    [
        ('ID=debian', 'sudo apt-get update && sudo apt-get install -y g++'),
        (
            'ID=linuxmint\nID_LIKE="ubuntu debian"',
            'sudo apt-get update && sudo apt-get install -y g++',
        ),
        ('ID=fedora', 'sudo dnf install -y gcc-c++'),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', 'sudo dnf install -y gcc-c++'),
        ('ID=alpine', 'sudo apk add g++'),
        ('ID=arch', 'on Debian and Ubuntu they are called: g++'),
    ],
)
def test_missing_compiler_is_one_line_of_this_system(system, command, tmp_path):
    """Without g++ the installation stops before it makes anything and prints what installs it."""
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name in ('bash', 'dirname', 'nproc', 'xargs', 'echo', 'sed', 'tr'):
        (tools / name).symlink_to(shutil.which(name))
    release = tmp_path / 'os-release'
    release.write_text(system + '\n')
    env = {'PATH': str(tools), 'VENV': str(tmp_path / 'venv'), 'OS_RELEASE': str(release)}
    result = install(env)
    assert result.returncode == 1
    assert any(command in line for line in result.stderr.splitlines())
    assert not (tmp_path / 'venv').exists()


@pytest.mark.parametrize('version', ['3.9', '3.15', None])
def test_unfit_python_is_refused_with_lines_that_work(version, tmp_path):
    """A Python that is missing or not supported is named; uv or conda brings another."""
    path = tmp_path / 'python'
    if version:
        path.write_text(f'#!/bin/sh\necho {version}\n')
        path.chmod(0o755)
    result = install({'PYTHON': str(path), 'VENV': str(tmp_path / 'venv')})
    assert result.returncode == 1
    assert (
        f'error: pvt_mm needs Python 3.10 to 3.14, and {path} is {version or "none"}.'
        in result.stderr
    )
    assert f'uv venv --python 3.12 {tmp_path}/venv\n' in result.stderr
    assert f'conda create --yes --prefix {tmp_path}/venv python=3.12' in result.stderr


def test_two_stacks_in_one_venv_are_refused(tmp_path):
    """The stacks provide the same modules, so the second one is sent to another folder."""
    (tmp_path / '.installed-onedl').touch()
    result = install({'VENV': str(tmp_path)})
    assert result.returncode == 1
    assert 'holds the other stack' in result.stderr


# Stands in for an environment's interpreter: logs what it is asked; the CPU index may be away.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    '-c import sys;'*) echo 3.12 ;;
    '-c from importlib.metadata'*) test -n '{torch}' && echo {torch} ;;
    '- https://'*) exit {away} ;;
    *) echo "$*" >> '{folder}/log' ;;
esac
"""


@pytest.fixture
def asked(tmp_path):
    """Returns a function that installs; it gives what the interpreter was asked, and stdout."""

    def run_install(torch='', away=0, **env):
        folder = tmp_path / 'venv' / 'bin'
        folder.mkdir(parents=True)
        (folder / 'python').write_text(FAKE_PYTHON.format(folder=tmp_path, torch=torch, away=away))
        (folder / 'python').chmod(0o755)
        result = install({'VENV': str(tmp_path / 'venv'), 'JOBS': '3'} | env)
        assert result.returncode == 0, result.stderr
        return (tmp_path / 'log').read_text().splitlines(), result.stdout

    if shutil.which('nvidia-smi') or install({}, 'missing').stdout:
        pytest.skip('the installation would stop here, or ask for CUDA')
    return run_install


def test_pytorch_of_an_environment_stays(asked):
    """What is at VENV already is used, with its PyTorch; mmcv is built for that one."""
    lines, said = asked(torch='2.14.1+cu130')
    assert not any(re.search(r'install.* torch==', line) for line in lines)
    assert 'PyTorch 2.14.1+cu130 is there' in said
    assert any(line.startswith('tools/build_mmcv.py --stack openmmlab --jobs 3') for line in lines)


def test_chosen_pytorch_replaces_another(asked):
    """TORCH= wins over what is there."""
    lines, _ = asked(torch='2.13.0', TORCH='2.15.0')
    assert any(line.endswith('torch==2.15.0') for line in lines)


@pytest.mark.parametrize('torch', ['2.15.0', '2.15.0+cpu'])
def test_chosen_pytorch_that_is_there_is_not_installed_again(asked, torch):
    """A local label, as of a CPU build, is no other version."""
    lines, _ = asked(torch=torch, TORCH='2.15.0')
    assert not any(re.search(r'install.* torch==', line) for line in lines)


@pytest.mark.parametrize('away', [0, 1])
def test_cpu_build_is_asked_for_first(asked, away):
    """Without a GPU PyTorch's own index is asked; where it is away, that is said, and pip's is."""
    lines, said = asked(away=away)
    *first, last = [line for line in lines if line.endswith('torch==2.13.0')]
    assert ['--index-url https://download.pytorch.org/whl/cpu' in line for line in first] == (
        [] if away else [True]
    )
    assert '--index-url' not in last
    assert ('cannot be reached' in said) == bool(away)


def test_gpu_build_is_asked_for_where_it_is_wanted(asked):
    """FORCE_CUDA=1 takes PyTorch from pip's own index."""
    lines, _ = asked(FORCE_CUDA='1')
    assert not any('--index-url' in line for line in lines)


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
