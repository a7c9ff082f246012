"""Build mmcv with its compiled operations for the Python that runs this, and install it.

mmcv is published as source alone, and its pinned release does not build everywhere as it is. This
script takes that source, mends what is known to break on this Python and this PyTorch, says what it
mended, and compiles several sources at a time as one, since most of a compiler's time goes into
PyTorch's headers. The wheel is kept in ~/.cache/pvt_mm/wheels for the next environment.

Example:
    python tools/build_mmcv.py --stack onedl --jobs 2
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.parse import urljoin

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'pvt_mm'
SHA256 = {
    'mmcv-2.1.0': 'd387bcab66b467479b6660310e23746cfc79c6e57acf04094680adb499a5cd3f',
    'onedl_mmcv-2.3.6': '8704978a3d492b15cc058742ac3165bd1bcc2dd20678da9ed39e0da3048e3045',
}
OPS = Path('mmcv', 'ops', 'csrc', 'pytorch')
#: Groups of sources that are compiled as one: more cost more headers, fewer leave a compiler idle.
GROUPS_PER_JOB = 2
GIB_PER_JOB = 2
#: PyTorch's CUDA headers include these of the toolkit; nvcc alone may come without them.
CUDA_HEADERS = ('cusparse.h', 'cublas_v2.h', 'cusolverDn.h')
# Names that a C++ file defines for all the files that are compiled with it.
DEFINITION = re.compile(
    r'^[ ]*#[ ]*define (\w+)|^(?:struct|class|enum) (\w+)[^;]*?\{'
    r'|^(?:[\w:<>&*,]+[ \n]+)+[*&]?(\w+)\s*\([^;{}()]*\)\s*(?:const\s*)?\{',
    re.MULTILINE,
)
MACRO = re.compile(r'^[ ]*#[ ]*define (\w+)', re.MULTILINE)
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


class BuildError(Exception):
    """A sentence for the user."""


class Mend(NamedTuple):
    """A text of setup.py that breaks the build from some version of PyTorch or Python on."""

    why: str
    package: str
    since: tuple[int, int]
    old: str
    new: str


MENDS = (
    Mend('C++20, which PyTorch >= 2.14 needs', 'torch', (2, 14), '-std=c++17', '-std=c++20'),
    Mend(
        'how setup.py reads its version: Python >= 3.13 keeps exec out of locals()',
        'python',
        (3, 13),
        "exec(compile(f.read(), version_file, 'exec'))\n    return locals()['__version__']",
        "names = {}\n        exec(compile(f.read(), version_file, 'exec'), names)\n"
        "    return names['__version__']",
    ),
)


def main() -> None:
    """Build and install, or find that there is nothing to do."""
    args = parse_arguments()
    try:
        install_mmcv(args)
    except BuildError as error:
        sys.exit(f'error: {error}')


def parse_arguments() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_build_arguments(parser)
    parser.add_argument('--constraint', help='a file of versions for pip to keep to')
    return parser.parse_args()


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a build needs to know."""
    parser.add_argument(
        '--stack',
        choices=('openmmlab', 'onedl'),
        default='openmmlab',
        help="OpenMMLab's own mmcv, or the maintained fork's (default: %(default)s)",
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=os.cpu_count(),
        help='compilers at a time, fewer where memory is short (default: %(default)s)',
    )


def install_mmcv(args: argparse.Namespace) -> None:
    """Install the pinned mmcv: what is there, a kept wheel or a new one, whichever works first."""
    check_tools()
    pin = read_pin(args.stack)
    target = find_target()
    number = build_number(target)
    if installed_build(pin) in (number, '') and works(target):
        say(f'{pin} is there, and its operations work.')
        return
    # The Python and the machine are in a wheel's name, where pip compares them.
    start = pin.replace('-', '_').replace('==', '-')
    python = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    pattern = f'{start}-*-{python}-*_{platform.machine()}.whl'
    for wheel in kept_wheels(number).glob(pattern):
        say(f'Taking {wheel}, built before.')
        install_wheel(wheel, args.constraint)
        if works(target):
            return
        say('Its operations do not work here: building it again.')
    wheel = build(pin, target, number, jobs=fitting_jobs(args.jobs))
    install_wheel(wheel, args.constraint)
    if not works(target, quiet=False):
        raise BuildError(f'{pin} was built, but its operations do not work: see the message above.')


def check_tools() -> None:
    """Refuse where PyTorch or a tool of the build is missing.

    Raises:
        BuildError: With the command that installs it.
    """
    if find_spec('torch') is None:
        raise BuildError(f'{sys.executable} has no PyTorch; install it first: pip install torch')
    missing = [
        name for name in ('setuptools', 'wheel', 'ninja', 'pkg_resources') if not find_spec(name)
    ]
    if missing:
        raise BuildError(
            f'{" and ".join(missing)} {"is" if len(missing) == 1 else "are"} not installed; run: '
            f"{sys.executable} -m pip install 'setuptools<81' wheel ninja"
        )


def read_pin(stack: str) -> str:
    """Return the mmcv of a stack, such as ``mmcv==2.1.0``."""
    text = (ROOT / 'requirements' / f'{stack}.txt').read_text(encoding='utf-8')
    return re.findall(r'^(?:onedl-)?mmcv==.+$', text, re.MULTILINE)[0]


def find_target() -> str:
    """Return ``cuda`` where a GPU is here, or FORCE_CUDA=1 vouches for one; else ``cpu``.

    Raises:
        BuildError: Where PyTorch or the compiler cannot do what FORCE_CUDA=1 asks for.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    forced = os.environ.get('FORCE_CUDA') == '1'
    if not forced and not torch.cuda.is_available():
        return 'cpu'
    if torch.version.cuda is None:
        raise BuildError(
            f'FORCE_CUDA=1 asks for CUDA, and this PyTorch, {torch.__version__}, is built without '
            'it; install a CUDA build of PyTorch.'
        )
    if not CUDA_HOME or not shutil.which(os.path.join(CUDA_HOME, 'bin', 'nvcc')):
        if forced:
            raise BuildError(
                'FORCE_CUDA=1 needs a CUDA compiler, and there is no nvcc; install the CUDA '
                f'toolkit {torch.version.cuda}, or name its folder with CUDA_HOME=.'
            )
        say('There is a GPU, but no CUDA compiler (nvcc): operations are built for the CPU alone.')
        return 'cpu'
    if not torch.cuda.is_available() and not os.environ.get('TORCH_CUDA_ARCH_LIST'):
        raise BuildError(
            'No GPU is here to build for; name yours, as in TORCH_CUDA_ARCH_LIST=9.0 (H100, H200; '
            '8.0 for A100, 8.9 for RTX 40).'
        )
    return 'cuda'


def build_number(target: str) -> str:
    """Return what a wheel is bound to, in the form of a wheel's build number."""
    import torch

    if target == 'cpu':
        return f'{torch.__version__}.cpu'
    capabilities = os.environ.get('TORCH_CUDA_ARCH_LIST') or '.'.join(
        map(str, torch.cuda.get_device_capability())
    )
    return f'{torch.__version__}.sm' + re.sub(r'[^\d.]+', '_', capabilities)


def installed_build(pin: str) -> str | None:
    """Return the installed mmcv's build number: '' where others built it, None without one."""
    name, _, version = pin.partition('==')
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    if found.version != version:
        return None
    numbers = re.findall('^Build: (.+)$', found.read_text('WHEEL') or '', re.MULTILINE)
    return numbers[0] if numbers else ''


WORKS = """
import sys
import torch
from mmcv.ops import nms
boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 20.0, 30.0, 30.0]])
scores = torch.tensor([0.9, 0.8, 0.7])
for device in sys.argv[1:]:
    kept = nms(boxes.to(device), scores.to(device), 0.5)[1].tolist()
    if kept != [0, 2]:
        sys.exit(f'nms on {device} keeps boxes {kept} instead of [0, 2]')
"""


def works(target: str, *, quiet: bool = True) -> bool:
    """Return whether mmcv's operations load and run, on the GPU too where they are built for it."""
    import torch

    devices = ['cpu', 'cuda'] if target == 'cuda' and torch.cuda.is_available() else ['cpu']
    command = [sys.executable, '-c', WORKS, *devices]
    return subprocess.run(command, capture_output=quiet, check=False).returncode == 0


def fitting_jobs(jobs: int) -> int:
    """Return how many compilers fit in memory, at most ``jobs``."""
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
    return max(1, min(jobs, int(memory // GIB_PER_JOB)))


def build(pin: str, target: str, number: str, *, jobs: int) -> Path:
    """Return a new wheel, in the folder of kept ones.

    Raises:
        BuildError: With the compiler's first error and the path of the log.
    """
    archive = fetch_source(pin)
    name = archive.name.removesuffix('.tar.gz')
    for how in ('together', 'alone'):
        log = CACHE / f'{name}-{number}-{how}.log'
        with tempfile.TemporaryDirectory(prefix='mmcv-') as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter='data')
            source = Path(folder, name)
            for why in mend(source / 'setup.py'):
                say(f'Mended in {pin}: {why}.')
            if how == 'together':
                group_sources(source / OPS, jobs * GROUPS_PER_JOB)
            say(f'Building {pin} for {number}, compilers at a time: {jobs}.')
            if wheel := run_build(source, number, build_environment(target, jobs), log):
                kept = kept_wheels(number)
                kept.mkdir(parents=True, exist_ok=True)
                return Path(shutil.move(wheel, kept / wheel.name))
        if how == 'together':
            say(f'The sources did not compile together (see {log}): compiling them one by one.')
    raise BuildError(f'{pin} did not build: {first_error(log)} The whole log is {log}.')


def kept_wheels(number: str) -> Path:
    """Return the folder of the wheels that were built for one PyTorch and one device."""
    return CACHE / 'wheels' / number


def fetch_source(pin: str) -> Path:
    """Return the published source of a pin, from the cache or a package index, by its checksum.

    pip would run the unmended setup.py when it downloads, so that this asks the index itself.

    Raises:
        BuildError: Where no index has it; says where to put the file.
    """
    name = pin.replace('-', '_').replace('==', '-')
    path = CACHE / f'{name}.tar.gz'
    if path.exists() and sha256(path.read_bytes()) == SHA256[name]:
        return path
    project = pin.partition('==')[0]
    for index in index_urls():
        page_url = f'{index.rstrip("/")}/{project}/'
        try:
            page = read_url(page_url).decode()
            links = re.findall(rf'href="([^"]*{re.escape(path.name)}[^"]*)"', page)
            content = read_url(urljoin(page_url, links[0])) if links else b''
        except OSError:
            continue
        if sha256(content) == SHA256[name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return path
    raise BuildError(
        f'No package index that pip is set to has {path.name}; download it from '
        f'https://pypi.org/project/{project}/#files and put it in {path.parent}.'
    )


def index_urls() -> list[str]:
    """Return the package indexes that pip is set to, by environment or file, or PyPI."""
    command = [sys.executable, '-m', 'pip', 'config', 'list']
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    # pip gives the file's value first and the environment's last; the later one counts.
    main = re.findall(r"^\S+\.index-url='(.+)'$", listed, re.MULTILINE)[-1:]
    extra = re.findall(r"^\S+\.extra-index-url='(.+)'$", listed, re.MULTILINE)
    return (main or ['https://pypi.org/simple']) + ' '.join(extra).split()


def read_url(url: str) -> bytes:
    """Return what lies at an address."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def sha256(content: bytes) -> str:
    """Return the checksum of some bytes."""
    return hashlib.sha256(content).hexdigest()


def mend(setup: Path) -> Iterator[str]:
    """Mend a setup.py where it breaks on this Python or PyTorch; yield what was mended.

    A text that is not there, as in a later release, is left alone.
    """
    import torch

    here = {
        'python': sys.version_info[:2],
        'torch': tuple(int(part) for part in torch.__version__.split('.')[:2]),
    }
    text = setup.read_text(encoding='utf-8')
    for fault in MENDS:
        if here[fault.package] >= fault.since and fault.old in text:
            text = text.replace(fault.old, fault.new)
            yield fault.why
    setup.write_text(text, encoding='utf-8')


def group_sources(folder: Path, count: int) -> None:
    """Put the C++ sources of a folder, and of its ``cpu``, into ``count`` files that include them.

    Sources that define one name differently stay apart. pybind.cpp is as long as a group, and stays
    as it is. setup.py compiles every ``*.cpp`` of the folder, and so the new ones alone.
    """
    sources = [path for path in folder.glob('*.cpp') if path.name != 'pybind.cpp']
    sources += (folder / 'cpu').glob('*.cpp')
    for number, group in enumerate(deal(sources, count)):
        lines = []
        for source in group:
            included = source.rename(source.with_suffix('.inc'))
            lines.append(f'#include "{included.relative_to(folder).as_posix()}"\n')
            # A macro such as max would change the headers and sources that follow.
            lines += [f'#undef {name}\n' for name in MACRO.findall(included.read_text('utf-8'))]
        (folder / f'group_{number}.cpp').write_text(''.join(lines), encoding='utf-8')


def deal(sources: Iterable[Path], count: int) -> list[list[Path]]:
    """Return ``count`` or more groups, alike in size, in which no two files define a name."""
    groups: list[tuple[list[Path], dict[str, Path]]] = [([], {}) for _ in range(count)]
    for source in sorted(sources, key=lambda path: (-path.stat().st_size, path)):
        names = defined_names(source)
        fitting = [
            group
            for group in groups
            if all(group[1].get(name, origin) == origin for name, origin in names.items())
        ]
        if not fitting:
            fitting = [([], {})]
            groups += fitting
        members, taken = min(
            fitting, key=lambda group: sum(path.stat().st_size for path in group[0])
        )
        members.append(source)
        taken.update(names)
    return [members for members, _ in groups if members]


def defined_names(source: Path) -> dict[str, Path]:
    """Return what a source defines for whatever is compiled with it, and the file it comes from."""
    text = source.read_text(encoding='utf-8')
    names = {name: source for found in DEFINITION.findall(text) for name in found if name}
    common = next(parent for parent in source.parents if parent.name == 'csrc') / 'common'
    for header in (common / included for included in INCLUDE.findall(text)):
        if header.exists():
            names = defined_names(header) | names
    return names


def build_environment(target: str, jobs: int) -> dict[str, str]:
    """Return the environment of a build: how many compilers, for what device, with what flags."""
    environment = dict(os.environ, MAX_JOBS=str(jobs))
    # After the flags of the Python that runs this, which ask for -O3 and debug symbols.
    environment['CPPFLAGS'] = f'-O2 -g0 {os.environ.get("CPPFLAGS", "")}'.strip()
    # PyTorch compiles one file at a time where it does not find ninja, which is beside this Python.
    environment['PATH'] = os.pathsep.join([sysconfig.get_path('scripts'), os.environ['PATH']])
    environment['FORCE_CUDA'] = '1' if target == 'cuda' else '0'
    if target == 'cpu':
        environment['CUDA_VISIBLE_DEVICES'] = ''
    elif folders := cuda_header_folders():
        environment['CPATH'] = os.pathsep.join([*folders, os.environ.get('CPATH', '')]).strip(
            os.pathsep
        )
    return environment


def cuda_header_folders() -> list[str]:
    """Return the folders of pip's CUDA packages with headers that the toolkit does not have.

    Raises:
        BuildError: Where neither has them.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    toolkit = [Path(CUDA_HOME or '', 'include'), *Path(CUDA_HOME or '').glob('targets/*/include')]
    nvidia = find_spec('nvidia')
    parents = nvidia.submodule_search_locations if nvidia else None
    packages = [path for parent in parents or () for path in Path(parent).glob('*/include')]
    folders = []
    for header in CUDA_HEADERS:
        if any((folder / header).exists() for folder in toolkit):
            continue
        found = [folder for folder in packages if (folder / header).exists()]
        if not found:
            raise BuildError(
                f"{header} is neither in {CUDA_HOME}/include nor in pip's CUDA packages; install "
                'the whole CUDA toolkit, or PyTorch from a CUDA index, which brings it.'
            )
        if str(found[0]) not in folders:
            say(f"{header} is taken from pip's package in {found[0]}.")
            folders.append(str(found[0]))
    return folders


def run_build(source: Path, number: str, environment: dict[str, str], log: Path) -> Path | None:
    """Build a wheel and show how far it is; log all of it; return None where it fails."""
    command = [
        *(
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '-v',
            '--use-pep517',
            '--no-build-isolation',
            '--no-deps',
        ),
        *('--no-cache-dir', '--config-settings', f'--build-option=--build-number={number}'),
        *('-w', str(source.parent), str(source)),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open('w', encoding='utf-8') as file,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        ) as process,
    ):
        show_progress(tee(process.stdout or (), file))
    return next(source.parent.glob('*.whl'), None) if process.returncode == 0 else None


def tee(lines: Iterable[str], file: TextIO) -> Iterator[str]:
    """Yield lines and write them to a file."""
    for line in lines:
        file.write(line)
        yield line


def show_progress(lines: Iterable[str]) -> None:
    """Print how many files are compiled and how long the others will take, from ninja's lines."""
    start = time.monotonic()
    for line in lines:
        found = re.match(r'\s*\[(\d+)/(\d+)\] ', line)
        if found:
            done, total = map(int, found.groups())
            seconds = (time.monotonic() - start) / done * (total - done)
            left = f', about {seconds / 60:.0f} min left' if done < total else ''
            say(f'{done} of {total} files compiled{left}.')


def first_error(log: Path) -> str:
    """Return the first line of a log that is a compiler's or setup.py's error."""
    lines = log.read_text(encoding='utf-8').splitlines()
    errors = [line.strip() for line in lines if re.search(r'(?:\berror: |Error: )', line)]
    return errors[0] if errors else 'its log names no error.'


def install_wheel(wheel: Path, constraint: str | None) -> None:
    """Install a wheel over whatever mmcv is there, with what it needs."""
    pip = [sys.executable, '-m', 'pip', 'install']
    versions = ['-c', constraint] if constraint else []
    # The first replaces an mmcv of the same version; the second finds it and brings what it needs.
    subprocess.run([*pip, '--force-reinstall', '--no-deps', '--quiet', str(wheel)], check=True)
    subprocess.run([*pip, *versions, str(wheel)], check=True)


def say(text: str) -> None:
    """Print a line at once."""
    print(f'==> {text}', flush=True)


if __name__ == '__main__':
    main()
