"""tools/build_mmcv.py: what it mends, how it groups sources, where it takes and keeps files."""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import load_tool
from hypothesis import given
from hypothesis import strategies as st

SETUP = """
def get_version():
    version_file = 'mmcv/version.py'
    with open(version_file, encoding='utf-8') as f:
        exec(compile(f.read(), version_file, 'exec'))
    return locals()['__version__']

flags = ['-std=c++17']
"""


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The script, with an empty cache."""
    module = load_tool('build_mmcv')
    monkeypatch.setattr(module, 'CACHE', tmp_path / 'cache')
    return module


@pytest.mark.parametrize(
    ('torch', 'python', 'mended'),
    [
        ('2.13.0+cpu', (3, 12), 0),
        ('2.14.1+cu130', (3, 12), 1),
        ('2.13.0', (3, 13), 1),
        ('3.0.0', (3, 14), 2),
    ],
)
def test_mends_only_what_breaks_here(tool, monkeypatch, tmp_path, torch, python, mended):
    """Each mend has the version that needs it; what is mended is said, once."""
    monkeypatch.setattr('torch.__version__', torch)
    monkeypatch.setattr(sys, 'version_info', python)
    path = tmp_path / 'setup.py'
    path.write_text(SETUP)
    said = list(tool.mend(path))
    text = path.read_text()
    assert len(said) == len(set(said)) == mended
    assert ('c++20' in text) == (torch >= '2.14')
    assert ("locals()['__version__']" in text) == (python < (3, 13))
    assert list(tool.mend(path)) == []


def test_mended_version_is_read(tool, monkeypatch, tmp_path):
    """The mended setup.py reads its version on every Python."""
    monkeypatch.setattr(sys, 'version_info', (3, 13))
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / 'version.py').write_text("__version__ = '2.1.0'")
    path = tmp_path / 'setup.py'
    path.write_text(SETUP)
    list(tool.mend(path))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(path.read_text(), names)
    assert names['get_version']() == '2.1.0'


def test_release_that_builds_unmended_is_left_alone(tool, monkeypatch, tmp_path):
    """A setup.py without the known texts stays as it is, byte for byte."""
    monkeypatch.setattr('torch.__version__', '9.9.0')
    path = tmp_path / 'setup.py'
    path.write_text('setup()\n')
    assert list(tool.mend(path)) == []
    assert path.read_text() == 'setup()\n'


@given(
    st.lists(st.sets(st.sampled_from('abcdefgh'), max_size=3), min_size=1, max_size=24),
    st.integers(1, 6),
)
def test_groups_hold_every_source_once_and_no_name_twice(tmp_path_factory, names, count):
    """Whatever the sources define, no two in a group define the same name."""
    folder = tmp_path_factory.mktemp('ops') / 'csrc' / 'pytorch'
    folder.mkdir(parents=True)
    sources = []
    for number, defined in enumerate(names):
        path = folder / f'{number}.cpp'
        path.write_text(''.join(f'static int {name}(int x) {{ return x; }}\n' for name in defined))
        sources.append(path)
    groups = load_tool('build_mmcv').deal(sources, count)
    assert sorted(path for group in groups for path in group) == sorted(sources)
    for group in groups:
        taken = [name for path in group for name in names[int(path.stem)]]
        assert len(taken) == len(set(taken))


def test_names_of_headers_and_macros_count(tool, tmp_path):
    """A header that two sources share does not part them; the same name in two headers does."""
    csrc = tmp_path / 'csrc'
    (csrc / 'pytorch').mkdir(parents=True)
    (csrc / 'common').mkdir()
    (csrc / 'common' / 'one.hpp').write_text('template <typename T>\nT area(T x) {\n return x; }\n')
    (csrc / 'common' / 'two.hpp').write_text('#define area 3\n')
    sources = []
    for name, header in (('a', 'one'), ('b', 'one'), ('c', 'two')):
        sources.append(csrc / 'pytorch' / f'{name}.cpp')
        sources[-1].write_text(f'#include "{header}.hpp"\nvoid {name}_impl();\n')
    groups = tool.deal(sources, 1)
    assert [sorted(path.stem for path in group) for group in groups] == [['a', 'b'], ['c']]


def test_setup_finds_the_groups_alone(tool, tmp_path):
    """`*.cpp` are the groups and pybind.cpp; sources are included once, their macros undone."""
    folder = tmp_path / 'csrc' / 'pytorch'
    (folder / 'cpu').mkdir(parents=True)
    for name in ('pybind', 'nms', 'roi', 'cpu/nms', 'cpu/roi'):
        (folder / f'{name}.cpp').write_text(f'// {name}\n')
    (folder / 'roi.cpp').write_text('#define max(a, b) a\n')
    tool.group_sources(folder, 2)
    compiled = sorted(path.name for path in folder.rglob('*.cpp'))
    assert compiled == ['group_0.cpp', 'group_1.cpp', 'pybind.cpp']
    text = ''.join(path.read_text() for path in folder.glob('group_*.cpp'))
    included = re.findall('#include "(.+)"', text)
    assert re.findall('.+roi.inc"\n#undef (.+)', text) == ['max']
    assert sorted(included) == ['cpu/nms.inc', 'cpu/roi.inc', 'nms.inc', 'roi.inc']
    assert all((folder / name).exists() for name in included)


@pytest.fixture
def index(tool, monkeypatch, tmp_path):
    """A package index in a folder that holds one source; returns its content."""
    content = b'a source'
    folder = tmp_path / 'simple' / 'mmcv'
    folder.mkdir(parents=True)
    (folder / 'mmcv-2.1.0.tar.gz').write_bytes(content)
    page = '<a href="mmcv-2.1.0.tar.gz#sha256=0">mmcv-2.1.0.tar.gz</a>'
    urls = [(tmp_path / 'nowhere').as_uri(), (tmp_path / 'simple').as_uri()]
    monkeypatch.setattr(tool, 'index_urls', lambda: urls)
    read = tool.read_url
    monkeypatch.setattr(
        tool, 'read_url', lambda url: page.encode() if url.endswith('/') else read(url)
    )
    return content


def test_source_comes_from_pips_index_by_its_checksum(tool, monkeypatch, index):
    """The first index that answers serves it; from then on it is in the cache."""
    monkeypatch.setattr(tool, 'SHA256', {'mmcv-2.1.0': tool.sha256(index)})
    path = tool.fetch_source('mmcv==2.1.0')
    assert path.read_bytes() == index
    monkeypatch.setattr(tool, 'index_urls', list)
    assert tool.fetch_source('mmcv==2.1.0') == path


def test_other_content_is_not_taken(tool, index):
    """A file with another checksum is refused, with the place to put the right one."""
    with pytest.raises(tool.BuildError, match=r'has mmcv-2\.1\.0\.tar\.gz; download it .* put it'):
        tool.fetch_source('mmcv==2.1.0')
    assert not tool.CACHE.exists()


@pytest.mark.parametrize(
    ('listed', 'urls'),
    [
        ('', ['https://pypi.org/simple']),
        ("global.index-url='https://a/simple'\n", ['https://a/simple']),
        (
            "global.index-url='https://a/simple'\n:env:.index-url='https://b/simple'\n"
            "global.extra-index-url='https://c https://d'\n",
            ['https://b/simple', 'https://c', 'https://d'],
        ),
    ],
)
def test_indexes_are_those_of_pip(tool, monkeypatch, listed, urls):
    """A mirror that pip is set to serves mmcv too."""
    result = SimpleNamespace(stdout=listed)
    monkeypatch.setattr(tool.subprocess, 'run', lambda *_, **__: result)
    assert tool.index_urls() == urls


def test_wheels_are_bound_to_pytorch_and_gpu(tool, monkeypatch):
    """The number differs by PyTorch, CUDA and GPU, and is one that a wheel may have."""
    numbers = set()
    for torch, capabilities in (
        ('2.13.0+cpu', None),
        ('2.14.1+cu130', '9.0'),
        ('2.14.1', '8.0;9.0'),
    ):
        monkeypatch.setattr('torch.__version__', torch)
        monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', capabilities or '')
        numbers.add(tool.build_number('cuda' if capabilities else 'cpu'))
    assert numbers == {'2.13.0+cpu.cpu', '2.14.1+cu130.sm9.0', '2.14.1.sm8.0_9.0'}
    assert all(re.fullmatch(r'\d[\w.+]*', number) for number in numbers)


@pytest.mark.parametrize(
    ('version', 'text', 'number'),
    [
        ('2.1.0', 'Wheel-Version: 1.0\nBuild: 2.13.0+cpu.cpu\nTag: any\n', '2.13.0+cpu.cpu'),
        ('2.1.0', 'Wheel-Version: 1.0\n', ''),
        ('2.2.0', 'Build: 2.13.0+cpu.cpu\n', None),
        (None, '', None),
    ],
)
def test_installed_wheel_says_what_it_was_built_for(tool, monkeypatch, version, text, number):
    """Our wheels carry their number; others' carry none; another version is none."""

    def distribution(name):
        if version is None:
            raise PackageNotFoundError(name)
        return SimpleNamespace(version=version, read_text=lambda _: text)

    monkeypatch.setattr(tool, 'distribution', distribution)
    assert tool.installed_build('mmcv==2.1.0') == number


@pytest.fixture
def installer(tool, monkeypatch):
    """The script with pip, the compiler and the operations' test replaced; returns what it did."""
    done = []
    state = SimpleNamespace(done=done, installed=None, working=[True])

    def build(pin, target, number, *, jobs):
        done.append(f'build for {number}')
        python = f'cp{sys.version_info[0]}{sys.version_info[1]}'
        tag = f'{python}-{python}-linux_{platform.machine()}'
        path = tool.kept_wheels(number) / f'mmcv-2.1.0-{number}-{tag}.whl'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    monkeypatch.setattr(tool, 'check_tools', lambda: None)
    monkeypatch.setattr(tool, 'find_target', lambda: 'cpu')
    monkeypatch.setattr(tool, 'build_number', lambda target: '9.9.cpu')
    monkeypatch.setattr(tool, 'installed_build', lambda pin: state.installed)
    monkeypatch.setattr(tool, 'works', lambda *_, **__: state.working.pop(0))
    monkeypatch.setattr(tool, 'build', build)
    monkeypatch.setattr(tool, 'install_wheel', lambda *_: done.append('install'))
    arguments = SimpleNamespace(stack='openmmlab', jobs=1, constraint=None)
    state.run = lambda: tool.install_mmcv(arguments)
    return state


def test_kept_wheel_serves_the_next_environment(installer):
    """What was built is kept, and the next environment builds nothing."""
    installer.working = [True, True]
    installer.run()
    installer.run()
    assert installer.done == ['build for 9.9.cpu', 'install', 'install']


def test_wheel_whose_operations_fail_is_built_again(installer, capsys):
    """A kept wheel is tried, not trusted."""
    installer.working = [True, False, True]
    installer.run()
    installer.run()
    assert installer.done == [
        'build for 9.9.cpu',
        'install',
        'install',
        'build for 9.9.cpu',
        'install',
    ]
    assert 'do not work here: building it again' in capsys.readouterr().out


@pytest.mark.parametrize('number', ['9.9.cpu', ''])
def test_working_mmcv_stays(installer, number):
    """Ours for this PyTorch, or the user's own, stays where its operations run."""
    installer.installed = number
    installer.run()
    assert installer.done == []


def test_mmcv_of_another_pytorch_is_replaced(installer):
    """It may load and still be wrong, so that it is not even tried."""
    installer.installed = '1.1.cpu'
    installer.run()
    assert installer.done == ['build for 9.9.cpu', 'install']


def test_builds_find_ninja_outside_an_activated_environment(tool, monkeypatch):
    """Without it PyTorch would compile one file at a time, and print no progress."""
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    path = tool.build_environment('cpu', 2)['PATH']
    assert (Path(tool.shutil.which('ninja', path=path)).parent / 'python').exists()


def test_progress_counts_files_and_time(tool, monkeypatch, capsys):
    """Each compiled file prints how many there are and how long the others take."""
    clock = iter([0.0, 60.0, 120.0])
    monkeypatch.setattr(tool.time, 'monotonic', lambda: next(clock))
    tool.show_progress(['  [1/2] c++ nms.cpp\n', 'warning: [3/4]\n', '  [2/2] c++ roi.cpp\n'])
    assert capsys.readouterr().out.splitlines() == [
        '==> 1 of 2 files compiled, about 1 min left.',
        '==> 2 of 2 files compiled.',
    ]


def test_failed_build_names_its_first_error_and_its_log(tool, monkeypatch, tmp_path, capsys):
    """Sources that do not compile together are compiled one by one; then it is an error."""
    archive = tmp_path / 'mmcv-2.1.0.tar.gz'
    source = tmp_path / 'mmcv-2.1.0'
    (source / tool.OPS / 'cpu').mkdir(parents=True)
    (source / 'setup.py').write_text(SETUP)
    (source / tool.OPS / 'nms.cpp').write_text('int x;\n')
    with tool.tarfile.open(archive, 'w:gz') as tar:
        tar.add(source, source.name)
    monkeypatch.setattr(tool, 'fetch_source', lambda pin: archive)
    compiled = []

    def run_build(source, number, environment, log):
        compiled.append(sorted(path.name for path in (source / tool.OPS).glob('*.cpp')))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('[1/2] c++\n  nms.cpp:3:1: error: x is not y\nAnother Error: z\n')

    monkeypatch.setattr(tool, 'run_build', run_build)
    with pytest.raises(tool.BuildError, match=r'nms\.cpp:3:1: error: x is not y The whole log is'):
        tool.build('mmcv==2.1.0', 'cpu', '9.9.cpu', jobs=1)
    assert compiled == [['group_0.cpp'], ['nms.cpp']]
    assert 'compiling them one by one' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('jobs', 'gibibytes', 'fitting'), [(16, 64, 16), (16, 8, 4), (2, 1, 1), (1, 64, 1)]
)
def test_compilers_fit_in_memory(tool, monkeypatch, jobs, gibibytes, fitting):
    """A compiler needs up to 2 GiB: more of them would be killed."""
    sizes = {'SC_PHYS_PAGES': gibibytes * 2**18, 'SC_PAGE_SIZE': 4096}
    monkeypatch.setattr(tool.os, 'sysconf', sizes.get)
    assert tool.fitting_jobs(jobs) == fitting
