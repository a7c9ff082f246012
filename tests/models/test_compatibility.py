"""PyTorch from 2.1 on: what the sources use of it is there."""

import ast

import pytest
from reference import REPO, load_json

#: Conditions that hold only where a newer name is there.
CONDITIONS = (
    'takes_safe_globals()',
    'reading.takes_safe_globals()',
    "hasattr(torch.compiler, 'is_exporting')",
)
SOURCES = sorted([*REPO.glob('pvt_mm/**/*.py'), *REPO.glob('tools/**/*.py')])


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


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(REPO)))
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
