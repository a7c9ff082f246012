"""Where in a checkpoint the PVTs stand: inside which dicts, under which prefix, in which format.

Each block's queries have a key that tells the format; what stands before it is the prefix. So it
may be called anything, and be as deep as it likes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pvt_mm.checkpoint.atoms import Arch, recognise_arch, to_atoms
from pvt_mm.checkpoint.key_maps import Format, detect_format, match, plain, query_prefixes
from pvt_mm.errors import CheckpointMismatchError

#: How deep dicts are looked into.
DEPTH = 3
#: Names of dicts of weights, for files without any PVT. The first that is there is taken.
_WRAPPERS = (
    'state_dict_ema', 'model_ema', 'ema', 'state_dict', 'model_state_dict', 'model', 'module', 'net'
)  # fmt: skip
#: Words in the names of weights that are a running average of others.
_AVERAGED = {'ema', 'teacher', 'averaged', 'average', 'avg', 'swa'}


class Found(NamedTuple):
    """A PVT in a checkpoint.

    Attributes:
        prefix: What stands before the backbone's keys, the names of nested dicts included.
        wrapper: The names of nested dicts alone.
        fmt: The format of the keys.
        tensors: The backbone's, and a classifier's that stands beside it, by the format's keys.
        keys: Where they are in the checkpoint.
        copy: Whether mmengine keeps these beside their average, which it loads.
    """

    prefix: str
    wrapper: str
    fmt: Format
    tensors: dict[str, Any]
    keys: frozenset[str]
    copy: bool = False

    @property
    def arch(self) -> Arch | None:
        """The architecture, as far as the weights show it."""
        return recognise_arch(to_atoms(self.tensors, self.fmt))

    @property
    def head(self) -> dict[str, str]:
        """The keys of a classifier: ``weight`` and ``bias`` -> key."""
        heads = [key for key in self.tensors if _is_head(key, self.fmt)]
        return {key.rpartition('.')[2]: key for key in heads}

    @property
    def root(self) -> str:
        """The prefix without the format's own, such as Hugging Face's ``pvt.``."""
        return self.prefix.removesuffix(self.fmt.prefix)

    @property
    def inner(self) -> str:
        """The root inside of its dict, without DDP's ``module.``."""
        return self.root.removeprefix(self.wrapper).removeprefix('module.')


def _dicts(
    checkpoint: Mapping[Any, Any], name: str = '', depth: int = DEPTH
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield a checkpoint and the dicts in it, each after its name: ``''``, ``'state_dict.'``."""
    yield name, checkpoint
    for key, value in checkpoint.items():
        # Numbered dicts are an optimizer's state.
        if depth and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            yield from _dicts(value, plain(f'{name}{key}.'), depth - 1)


def entries(checkpoint: Mapping[Any, Any], wrapper: str) -> dict[str, Any]:
    """Return the entries of one of the dicts in a checkpoint, under their full names."""
    return _named(wrapper, next(own for name, own in _dicts(checkpoint) if name == wrapper))


def _named(wrapper: str, own: Mapping[Any, Any]) -> dict[str, Any]:
    return {plain(f'{wrapper}{key}'): value for key, value in own.items()}


def flatten(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what a checkpoint and the dicts in it hold, under names joined by dots."""
    return {
        plain(f'{name}{key}'): value
        for name, entries in _dicts(checkpoint)
        for key, value in entries.items()
        if not isinstance(value, Mapping)
    }


def unwrap(checkpoint: Mapping[str, Any], depth: int = DEPTH) -> dict[str, Any]:
    """Return the state dict inside a checkpoint of any model, without its wrappers' names.

    It is looked for by usual names; without one, it is the dict that holds most tensors.
    """
    inner = {
        key: sum(isinstance(leaf, Tensor) for leaf in flatten(value).values())
        for key, value in checkpoint.items()
        if depth and isinstance(value, Mapping)
    }
    usual = [name for name in _WRAPPERS if inner.get(name)]
    if not usual and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        usual = sorted((key for key in inner if inner[key]), key=lambda key: -inner[key])
    if usual:
        return unwrap(checkpoint[usual[0]], depth - 1)
    return {plain(str(key)).removeprefix('module.'): value for key, value in checkpoint.items()}


def find(checkpoint: Mapping[str, Any]) -> list[Found]:
    """Find every PVT in a checkpoint."""
    averages = 'message_hub' in checkpoint  # mmengine's, which saves the average as state_dict
    return [
        found
        for name, own in _dicts(checkpoint)
        for found in _find_in(name, _named(name, own), averages and name == 'ema_state_dict.')
    ]


def _find_in(wrapper: str, own: Mapping[str, Any], copy: bool) -> Iterator[Found]:
    """Yield the PVTs among a dict's own entries."""
    prefixes = list(dict.fromkeys(prefix for key in own for prefix in query_prefixes(key)))
    for prefix in prefixes:
        deeper = tuple(other for other in prefixes if len(other) > len(prefix))
        keys = {
            key: key.removeprefix(prefix)
            for key in own
            if key.startswith(prefix) and not key.startswith(deeper)
        }
        fmt = detect_format(list(keys.values()))
        assert fmt is not None, 'its queries have one'
        root = prefix.removesuffix(fmt.prefix)  # a classifier stands beside pvt., not in it
        for key in own if root != prefix else ():
            if key.startswith(root) and _is_head(key.removeprefix(root), fmt):
                keys[key] = key.removeprefix(root)
        tensors = {name: own[key] for key, name in keys.items()}
        yield Found(prefix, wrapper, fmt, tensors, frozenset(keys), copy)


def _is_head(key: str, fmt: Format) -> bool:
    held = match(key, fmt)
    return bool(held) and held[0].part == 'head'


def choose(
    found: Sequence[Found],
    own: Sequence[str] = ('', 'backbone.'),
    arch: Arch | None = None,
    prefix: str | None = None,
    argument: str = 'weights_prefix={!r} in the backbone',
) -> tuple[Found, str]:
    """Choose one PVT of a checkpoint that may hold several.

    In order: the one of ``prefix``; those of ``arch``; averaged weights (EMA) before others, by the
    names of their dicts; the model's own name; averaged weights (a teacher) by their prefix.

    Args:
        found: At least one.
        own: The backbone's prefix in its model.
        arch: The backbone's; weights of another one cannot be loaded anyway.
        prefix: Its prefix, given by the user; not needed, and not looked at, where there is one.
        argument: How a user gives ``prefix``, for messages.

    Returns:
        The choice, and the reason; '' where there was no other.

    Raises:
        CheckpointMismatchError: Where nothing decides.
    """

    def is_own(choice: Found) -> bool:
        return choice.inner in own or choice.root in own

    if prefix is not None and not any(_is_asked(f.prefix, prefix) or is_own(f) for f in found):
        raise CheckpointMismatchError(
            f'These weights hold no PVT under {prefix!r}, but under {_listed(found)}.'
        )
    left = list(found)
    rules: tuple[tuple[str, Callable[[Found], bool]], ...] = (
        (f'{prefix!r} is asked for', lambda f: _is_asked(f.prefix, prefix)),
        ('it has the arch', lambda f: arch is not None and _fits(f.arch, arch)),
        ('averaged weights come first', lambda f: _is_averaged(f.wrapper) and not f.copy),
        ('weights in use come first', lambda f: not f.copy),
        ("the model's own names come first", is_own),
        ('averaged weights come first', lambda f: _is_averaged(f.inner)),
    )
    for reason, rule in rules:
        kept = [f for f in left if rule(f)] or left
        if len(kept) == 1:
            return kept[0], reason if len(left) > 1 else ''
        left = kept
    raise CheckpointMismatchError(
        f'These weights hold {len(left)} PVTs, under {_listed(left)}, and nothing says which one '
        f'to take; choose with {argument.format(_short_names(left)[0])}.'
    )


def _short_names(found: Sequence[Found]) -> list[str]:
    """Return the prefixes, without the dict's name where all are in one."""
    wrappers = {choice.wrapper for choice in found}
    common = wrappers.pop() if len(wrappers) == 1 else ''
    return [choice.prefix.removeprefix(common) for choice in found]


def _listed(found: Sequence[Found]) -> str:
    return ' and '.join(
        f'{name!r} ({choice.arch})' for name, choice in zip(_short_names(found), found)
    )


def _is_asked(prefix: str, asked: str | None) -> bool:
    """Tell whether a prefix is the one asked for; either may lack names at its beginning."""
    if asked is None or not prefix:
        return prefix == asked
    pair = f'.{prefix}', f'.{asked.removesuffix(".")}.'
    return pair[0].endswith(pair[1]) or pair[1].endswith(pair[0])


def _fits(arch: Arch | None, other: Arch) -> bool:
    """Tell whether weights of an arch fill one that may have fewer stages."""
    return arch is not None and arch.first_stages(len(other.dims)).matches(other)


def _is_averaged(name: str) -> bool:
    return bool(_AVERAGED & set(re.split(r'[._]', name)))


def place(
    checkpoint: Mapping[str, Any],
    backbones: Mapping[str, tuple[Arch | None, str | None]],
    heads: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Rename a checkpoint's weights for a model that holds PVTs.

    Weights of a whole model keep their names but for what is wrapped around them; those of a
    backbone alone get its place in the model.

    Args:
        checkpoint: Of any kind; one without a PVT is unwrapped, and its names stay.
        backbones: Each PVT's prefix in the model, its arch, and the prefix that its user asks for.
        heads: Prefixes of PVTHeads in the model, which get a bare backbone's classifier.

    Returns:
        The state dict, and sentences on what was taken from where, if that needs saying.

    Raises:
        CheckpointMismatchError: Where several PVTs could be meant.
    """
    found = find(checkpoint)
    if not found or not backbones:
        return unwrap(checkpoint), []
    chosen = _choose_all(found, backbones)
    taken: set[str] = set().union(*(choice.keys for choice, _ in chosen.values()))
    others = {
        key: value
        for key, value in flatten(checkpoint).items()
        if key not in taken and (isinstance(value, Tensor) or key.endswith('_extra_state'))
    }
    placed: dict[str, Any] = {}
    for name, (choice, _) in chosen.items():
        whole = _outside(choice.root, plain(name))
        outer, own = whole or (choice.root.removesuffix(choice.inner), '')
        tensors = dict(choice.tensors)
        for prefix in () if whole else heads:
            placed |= {prefix + leaf: tensors[key] for leaf, key in choice.head.items()}
        if heads and not whole:
            tensors = {k: v for k, v in tensors.items() if k not in choice.head.values()}
        rest = {own + k.removeprefix(outer): v for k, v in others.items() if k.startswith(outer)}
        placed |= {k: v for k, v in rest.items() if not k.startswith(tuple(backbones))}
        placed |= {name + key: value for key, value in tensors.items()}
    told = [
        f'Weights under {choice.prefix!r} go to {name!r}{f": {reason}" if reason else ""}.'
        for name, (choice, reason) in chosen.items()
        if reason or choice.inner not in ('', plain(name))
    ]
    return placed, told


def _choose_all(
    found: Sequence[Found], backbones: Mapping[str, tuple[Arch | None, str | None]]
) -> dict[str, tuple[Found, str]]:
    """Choose for each PVT of a model: all from one whole model where they stand as in this one."""
    names = {name: plain(name) for name in backbones}
    if len(names) > 1:
        by_root = {choice.root: choice for choice in found}
        first = next(iter(names.values()))
        wholes = [
            choice
            for choice in found
            if all(_beside(choice.root, first, name) in by_root for name in names.values())
        ]
        if wholes:
            choice, reason = choose(wholes, (first,))
            return {
                name: (by_root[str(_beside(choice.root, first, short))], reason)
                for name, short in names.items()
            }
    return {
        name: choose(found, (names[name],), arch, prefix)
        for name, (arch, prefix) in backbones.items()
    }


def _beside(prefix: str, name: str, other: str) -> str | None:
    """Return the prefix of another part of the model whose part ``name`` stands under a prefix."""
    outer = prefix.removesuffix(name)
    return outer + other if outer + name == prefix and outer[-1:] in ('', '.') else None


def _outside(prefix: str, name: str) -> tuple[str, str] | None:
    """Return what stands before the last names that two prefixes share; None where they do not.

    ``'student.backbone.'`` and ``'backbone.'`` give ``('student.', '')``.
    """
    shared = os.path.commonprefix([prefix.split('.')[::-1], name.split('.')[::-1]])[::-1]
    end = '.'.join(shared)  # 'backbone.'; the last one is empty
    return (prefix.removesuffix(end), name.removesuffix(end)) if end else None
