"""Check that a Python compiles all sources here and has what they use of its standard library.

It needs nothing installed, so that every Python can run it.

Example:
    python3.10 tools/check_python.py
"""

import argparse
import ast
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('configs', 'pvt_mm', 'tests', 'tools')


def sources(root: Path) -> list[Path]:
    """Every source of the project, links into it left out."""
    found = [path for name in FOLDERS for path in (root / name).rglob('*.py')]
    return sorted(path for path in [*found, root / 'setup.py'] if '.mim' not in path.parts)


def library_names(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Yield module, name in it (or an empty one) and line of each use of the standard library."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in filter(is_library, node.names):
                yield alias.name, '', node.lineno
                top = alias.name.partition('.')[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level and is_library(node):
            for alias in node.names:
                yield str(node.module), alias.name, node.lineno
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in aliases:
            yield aliases[node.value.id], node.attr, node.lineno


def is_library(node: ast.alias | ast.ImportFrom) -> bool:
    """Whether an import is of the standard library."""
    name = node.name if isinstance(node, ast.alias) else str(node.module)
    return name.partition('.')[0] in sys.stdlib_module_names - {'__future__'}


def fault_of(module: str, name: str) -> str:
    """Say what this Python lacks, if anything."""
    try:
        found: ModuleType = import_module(module)
    except ImportError:
        return f'no module {module}'
    if not name or hasattr(found, name):
        return ''
    try:
        import_module(f'{module}.{name}')
    except ImportError:
        return f'no {module}.{name}'
    return ''


def check(files: list[Path]) -> tuple[list[str], set[tuple[str, str]]]:
    """Check files.

    Returns:
        What is wrong, a line each, and the names of the standard library that were looked up.
    """
    faults, names = [], set()
    for path in files:
        text = path.read_text(encoding='utf-8')
        try:
            compile(text, str(path), 'exec', dont_inherit=True)
        except SyntaxError as error:
            faults.append(f'{path}:{error.lineno}: {error.msg}')
            continue
        for module, name, line in library_names(ast.parse(text)):
            names.add((module, name))
            if fault := fault_of(module, name):
                faults.append(f'{path}:{line}: {fault}')
    return faults, names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('files', nargs='*', type=Path, help='sources (default: all of the project)')
    files = parser.parse_args().files or sources(ROOT)
    faults, names = check(files)
    for fault in faults:
        print(f'error: {fault}', file=sys.stderr)
    print(
        f'Python {platform.python_version()}: {len(files)} files compiled, {len(names)} names of '
        f'the standard library looked up, {len(faults)} faults'
    )
    sys.exit(1 if faults else 0)


if __name__ == '__main__':
    main()
