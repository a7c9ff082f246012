"""Pythons from 3.10 on and PyTorch from 2.1 on: what the sources use of both is there."""

import ast
import importlib.util
import shutil
import subprocess
import sys

import pytest
from reference import REPO, load_json

spec = importlib.util.spec_from_file_location('check_python', REPO / 'tools/check_python.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

#: Conditions that hold only where a newer name is there.
CONDITIONS = (
    'takes_safe_globals()',
    'reading.takes_safe_globals()',
    "hasattr(torch.compiler, 'is_exporting')",
)
SOURCES = sorted([*REPO.glob('pvt_mm/*.py'), *REPO.glob('tools/*.py')])


# Python


@pytest.mark.parametrize('version', ['3.10', '3.11', '3.12'])
def test_sources_suit_each_python(version):
    """All sources compile, and what they use of the standard library is there."""
    python = shutil.which(f'python{version}')
    if sys.version_info[:2] == tuple(map(int, version.split('.'))):
        python = sys.executable
    if not python or subprocess.run([python, '--version'], capture_output=True).returncode:
        pytest.skip(f'there is no Python {version} here')
    command = [python, REPO / 'tools/check_python.py']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f'Python {version}.' in result.stdout and ', 0 faults' in result.stdout


@pytest.mark.parametrize(
    ('source', 'fault'),
    [
        ('from itertools import unheard_of', 'no itertools.unheard_of'),
        ('import os.path as p\np.unheard_of', 'no os.path.unheard_of'),
        ('import xml.unheard_of', 'no module xml.unheard_of'),
        ('import os\n\nos.path.join(', "'(' was never closed"),
        ('import numpy\nnumpy.unheard_of\nfrom os import path\nimport json.decoder', ''),
    ],
)
def test_what_a_python_lacks_is_noticed(tmp_path, source, fault):
    """A name, a module, the syntax; other packages are none of its business."""
    path = tmp_path / 'source.py'
    path.write_text(source)
    faults, _ = tool.check([path])
    assert [line.rpartition(': ')[2] for line in faults] == ([fault] if fault else [])


# PyTorch


def torch_names(tree):
    """Yield each dotted name of PyTorch that a source uses, and the node."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                module = alias.name if isinstance(node, ast.Import) else node.module or ''
                if module.partition('.')[0] != 'torch':
                    continue
                full = module if isinstance(node, ast.Import) else f'{module}.{alias.name}'
                name = alias.asname or alias.name.partition('.')[0]
                aliases[name] = full if name != 'torch' else 'torch'
                yield full, node
    inner = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node in inner:
            continue
        chain, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            inner.add(value)
            chain.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in aliases:
            yield '.'.join([aliases[value.id], *reversed(chain)]), node


def guarded(tree):
    """The nodes that run only where they can, or whose AttributeError or ImportError is mended."""
    nodes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            safe = any(
                ast.unparse(handler.type) in ('AttributeError', 'ImportError')
                for handler in node.handlers
                if handler.type
            )
        else:
            safe = isinstance(node, ast.If) and ast.unparse(node.test) in CONDITIONS
        if safe:
            nodes |= {inner for statement in node.body for inner in ast.walk(statement)}
    return nodes


def faults_of(text, known):
    """What a source uses of PyTorch that 2.1 lacks, unguarded, or that nobody has looked up."""
    tree = ast.parse(text)
    safe = guarded(tree)
    return [
        f'line {node.lineno}: {name}'
        for name, node in torch_names(tree)
        if name not in known['names'] and not (name in known['newer'] and node in safe)
    ]


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.name)
def test_all_that_is_used_is_in_torch_2_1(path):
    """A name that is new here: look it up in PyTorch 2.1 and list it in torch_2_1.json."""
    assert not faults_of(path.read_text(), load_json('torch_2_1.json'))


def test_newer_names_are_noticed():
    """Unguarded, guarded against something else, and unknown names fail; a guarded one does not."""
    known = {'names': ['torch', 'torch.nn'], 'newer': ['torch.new', 'torch.nn.new']}
    guard = 'try:\n    torch.new\nexcept {}:\n    pass\n'
    assert faults_of('import torch\n' + guard.format('AttributeError'), known) == []
    condition = f'import torch\nif {CONDITIONS[0]}:\n    torch.new'
    assert faults_of(condition, known) == []
    assert faults_of(condition.replace('if', 'if not'), known) == ['line 3: torch.new']
    assert faults_of('import torch\n' + guard.format('TypeError'), known) == ['line 3: torch.new']
    assert faults_of('from torch import nn\nnn.new', known) == ['line 2: torch.nn.new']
    assert faults_of('import torch.nn.old as o\no.x', known) == [
        'line 1: torch.nn.old',
        'line 2: torch.nn.old.x',
    ]
