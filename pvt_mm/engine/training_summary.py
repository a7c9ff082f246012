"""What a training is about to do, told before its first iteration, with what looks wrong."""

from __future__ import annotations

import locale
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from torch import nn

from pvt_mm.checkpoint.convert import recognise_arch, to_atoms
from pvt_mm.checkpoint.key_maps import PVT_MM
from pvt_mm.engine.checkpoint_hook import _inner
from pvt_mm.models.fast import kernels
from pvt_mm.models.pyramid import PyramidBackbone

WIDTH = 100
#: Corners, horizontal, vertical and the ends of the inner line.
LINES, ASCII = '┌┐└┘─│├┤', '++++-|++'


class Data(NamedTuple):
    """A data set: its split, type, and numbers of images and classes."""

    split: str
    kind: str
    images: int
    classes: int


@dataclass(frozen=True)
class Facts:
    """What is known of a training right before its first iteration.

    Args:
        config: The config's path.
        model: Type, architecture and size.
        weights: A line for each source of weights; empty where all numbers are random.
        per_device: Images in a batch of one device.
        devices: Number of processes.
        accumulation: Iterations to an update of the weights.
        base_batch: The batch that the config's learning rate is for; 0 where it does not say.
        scaled: Whether mmengine scales the learning rate.
        optimizer: Its type.
        lr: The learning rate that schedules multiply.
        weight_decay: Of the optimizer; None where it has none.
        precision: What numbers are computed in.
        device: What it runs on.
        data: The data sets.
        work_dir: Folder of logs and checkpoints.
        transformer: Whether the model holds one.
        batch_norms: BatchNorm layers that take statistics of each device's batch.
        slow_bf16: Whether a backbone computes in bf16 on a CPU that cannot multiply it.
    """

    config: str
    model: str
    weights: list[str]
    per_device: int
    devices: int
    accumulation: int
    base_batch: int
    scaled: bool
    optimizer: str
    lr: float
    weight_decay: float | None
    precision: str
    device: str
    data: list[Data]
    work_dir: str
    transformer: bool = False
    batch_norms: int = 0
    slow_bf16: bool = False

    @property
    def scaled_batch(self) -> int:
        """The batch that mmengine scales for, which leaves accumulation out."""
        return self.per_device * self.devices

    @property
    def batch(self) -> int:
        """Images to an update of the weights."""
        return self.scaled_batch * self.accumulation


# What is told


def warnings_of(facts: Facts) -> list[str]:
    """Return a sentence, with the way out, for each known trap that a training is in."""
    found = []
    if not facts.weights:
        found.append(
            'no weights are loaded, all numbers are random: --load-from FILE, or init_cfg in the '
            'backbone.'
        )
    if facts.optimizer == 'SGD' and facts.transformer:
        found.append(
            'SGD trains transformers badly: optim_wrapper.optimizer=dict(type="AdamW", lr=1e-4, '
            'weight_decay=0.05).'
        )
    if facts.base_batch and not facts.scaled and facts.batch != facts.base_batch:
        way = (
            '--auto-scale-lr'
            if facts.accumulation == 1
            else f'optim_wrapper.optimizer.lr={facts.lr * facts.batch / facts.base_batch:.3g}'
        )
        found.append(
            f'the learning rate is for a batch of {facts.base_batch}, this one is {facts.batch}: '
            f'{way}.'
        )
    if facts.scaled and facts.accumulation > 1:
        found.append(
            f'--auto-scale-lr leaves accumulation out: without it, set optim_wrapper.optimizer.lr='
            f'{facts.lr * facts.accumulation:.3g}.'
        )
    if facts.per_device == 1 and facts.batch_norms:
        found.append(
            f'{facts.batch_norms} BatchNorm layers see one image at a time: norm_eval=True, GN, or '
            'train_dataloader.batch_size=2 or more.'
        )
    if facts.slow_bf16:
        found.append(
            'this CPU has no instructions for bf16, which only costs time then: leave out --amp '
            'and compute_dtype.'
        )
    return found


def preflight_lines(facts: Facts, width: int = WIDTH, lines: str = LINES) -> list[str]:
    """Return a box with the facts of a training, and below them the warnings.

    Args:
        facts: Of the training.
        width: Of the box, at most.
        lines: Characters to draw with: ``LINES`` or ``ASCII``.
    """
    top_left, top_right, left, right, across, down, tee, end_tee = tuple(lines)
    title = 'training'
    inside = width - 4
    label = 12
    body: list[str] = []
    for name, text in _rows(facts):
        room = inside - label
        for part in textwrap.wrap(_fit(text, room), room, break_on_hyphens=False) or ['']:
            body.append(f'{name:<{label}}{part}')
            name = ''
    warned: list[str] = []
    for text in warnings_of(facts):
        wrapped = textwrap.wrap(f'WARNING  {text}', inside, subsequent_indent=' ' * 9)
        warned += wrapped
    used = max(map(len, [*body, *warned, title]))

    def framed(rows: list[str]) -> list[str]:
        return [f'{down} {row:<{used}} {down}' for row in rows]

    head = f'{top_left}{across} {title} {across * (used - len(title) - 1)}{top_right}'
    divider = [f'{tee}{across * (used + 2)}{end_tee}'] if warned else []
    foot = f'{left}{across * (used + 2)}{right}'
    return [head, *framed(body), *divider, *framed(warned), foot]


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    yield 'config', facts.config
    yield 'model', facts.model
    yield from zip(['weights'] + [''] * len(facts.weights), facts.weights or ['none'])
    yield (
        'batch',
        f'{facts.batch} images to an update: {facts.per_device} a device x {facts.devices} '
        f'device(s) x {facts.accumulation} iteration(s)',
    )
    yield 'lr', _rate(facts)
    decay = '' if facts.weight_decay is None else f', weight decay {facts.weight_decay:g}'
    yield 'optimizer', f'{facts.optimizer}{decay}'
    yield 'precision', facts.precision
    yield 'device', facts.device
    for data in facts.data:
        yield data.split, f'{data.images:,} images, {data.classes} classes ({data.kind})'
    yield 'output', facts.work_dir


def _rate(facts: Facts) -> str:
    if not facts.base_batch:
        return f'{facts.lr:g}, not scaled: the config has no auto_scale_lr.base_batch_size'
    if facts.scaled:
        before = facts.lr * facts.base_batch / facts.scaled_batch
        return (
            f'{facts.lr:g}, scaled by --auto-scale-lr from {before:g} for a batch of '
            f'{facts.base_batch}'
        )
    return f'{facts.lr:g}, for a batch of {facts.base_batch}; not scaled (--auto-scale-lr does)'


def _fit(text: str, width: int) -> str:
    """Shorten the long words of a text, which are paths, in their middle."""
    return ' '.join(shorten(word, width) for word in text.split(' '))


def shorten(path: str, width: int) -> str:
    """Leave out the middle of a path that is longer than a width."""
    if len(path) <= width:
        return path
    end = (width - 3) * 2 // 3  # the file's name tells more than the root
    return f'{path[: width - 3 - end]}...{path[-end:]}'


def drawing_characters() -> str:
    """Return the characters of boxes that both the terminal and a log file take."""
    for encoding in (sys.stdout.encoding, locale.getpreferredencoding(False)):
        try:
            LINES.encode(encoding or 'ascii')
        except (UnicodeEncodeError, LookupError):
            return ASCII
    return LINES


# Where it comes from


class PreflightHook(Hook):
    """Log the box of a training when its weights are loaded and before its first iteration.

    What is loaded is told by the tensors that were written, not by what the config asks for.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._built: dict[str, int] = {}
        self._before_load: dict[str, int] = {}

    def before_run(self, runner: Any) -> None:
        """Note the state of all tensors before weights are drawn."""
        self._built = _versions(runner.model)
        self._before_load = {}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Note the state of all tensors right before a checkpoint is loaded."""
        self._before_load = _versions(runner.model)

    def before_train(self, runner: Any) -> None:
        """Log the box, in the main process alone."""
        if is_main_process():
            facts = facts_of(runner, self._weights(runner))
            box = preflight_lines(facts, lines=drawing_characters())
            runner.logger.info('\n'.join(['', *box]))

    def _weights(self, runner: Any) -> list[str]:
        """Say of each source of weights how many tensors it gave."""
        now = _versions(runner.model)
        backbones = _backbones(runner.model)
        found = []
        for name, source in _pretrained(runner.model):
            if name in backbones:
                continue
            own = {key for key in now if key.startswith(f'{name}.' if name else '')}
            given = f'{name or "model"} from {source}'
            # Across processes, mmengine writes every tensor once more.
            if get_world_size() == 1:
                after = self._before_load or now
                written = sum(after[key] != self._built.get(key) for key in own)
                given = f'{written} of {len(own)} tensors of {given}'
            found.append(given)
        sources = dict(_pretrained(runner.model))
        for name, backbone in backbones.items():
            if backbone.loaded:
                source = sources.get(name, '')
                inside = not self._before_load and source
                found.append(_backbone_line(backbone, source if inside else ''))
        if self._before_load:
            rest = {key for key in now if not key.startswith(tuple(f'{b}.' for b in backbones))}
            written = sum(now[key] != self._before_load[key] for key in rest)
            way = 'resumed' if runner._resume else 'load_from'
            place = 'the rest of the model' if backbones else 'the model'
            found.append(f'{place}: loaded {written} of {len(rest)} tensors')
            found.append(f'{way}: {runner._load_from or "the newest checkpoint of the work dir"}')
        return found


def _backbone_line(backbone: PyramidBackbone, source: str) -> str:
    """Shorten what a load of a backbone said, and add where the weights are from."""
    text = backbone.loaded.rstrip('.').split('; dropped')[0]
    return f'{text}: {source}' if source else text


def facts_of(runner: Any, weights: list[str]) -> Facts:
    """Collect the facts of a Runner that is about to train.

    Args:
        runner: With its model, optimizer and loops built.
        weights: A line for each source of weights.
    """
    cfg, model = runner.cfg, _inner(runner.model)
    model.train()  # as the loop does next; norm_eval and frozen stages show then
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        wrapper = next(iter(wrapper.values()))
    scaling = cfg.get('auto_scale_lr') or {}
    groups = wrapper.optimizer.param_groups
    loaders = [('train', runner.train_dataloader)]
    if runner.val_loop is not None:
        loaders.append(('val', runner.val_dataloader))
    return Facts(
        config=str(cfg.filename or 'no file'),
        model=_model(model),
        weights=weights,
        per_device=_batch_size(runner.train_dataloader),
        devices=get_world_size(),
        accumulation=wrapper._accumulative_counts,
        base_batch=scaling.get('base_batch_size') or 0,
        scaled=bool(scaling.get('enable')),
        optimizer=type(wrapper.optimizer).__name__,
        lr=max(float(group.get('initial_lr', group['lr'])) for group in groups),
        weight_decay=wrapper.optimizer.defaults.get('weight_decay'),
        precision=_precision(wrapper, model),
        device=_device(model),
        data=[_data(split, loader.dataset) for split, loader in loaders],
        work_dir=str(runner.work_dir),
        transformer=any(map(_is_transformer, model.modules())),
        batch_norms=sum(_sees_its_batch(module) for module in model.modules()),
        slow_bf16=any(map(_has_slow_bf16, _backbones(model).values())),
    )


def _versions(model: Any) -> dict[str, int]:
    """Return a number for each tensor that counts how often it was written."""
    tensors = _inner(model).state_dict(keep_vars=True).items()
    return {k: t._version for k, t in tensors if not k.endswith('num_batches_tracked')}


def _backbones(model: Any) -> dict[str, PyramidBackbone]:
    named = _inner(model).named_modules()
    return {name: module for name, module in named if isinstance(module, PyramidBackbone)}


def _pretrained(model: Any) -> list[tuple[str, str]]:
    """Return the places and files of the modules that start from a checkpoint."""
    found = []
    for name, module in _inner(model).named_modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            found.append((name, str(init_cfg['checkpoint'])))
    return found


def _model(model: nn.Module) -> str:
    parts = [type(model).__name__]
    for backbone in _backbones(model).values():
        arch = recognise_arch(to_atoms(backbone.state_dict(), PVT_MM))
        name = arch and arch.name
        parts.append(f'{type(backbone).__name__} {name or "of no published arch"}')
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f'{", ".join(parts)}; {size / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained'


def _batch_size(loader: Any) -> int:
    sampler = loader.batch_sampler
    return int(getattr(sampler, 'batch_size', 0) or loader.batch_size or 1)


def _precision(wrapper: Any, model: nn.Module) -> str:
    if hasattr(wrapper, 'loss_scaler'):
        dtype = str(getattr(wrapper, 'cast_dtype', None) or torch.float16).removeprefix('torch.')
        return f'mixed: {dtype}, weights in float32'
    for backbone in _backbones(model).values():
        if backbone.compute_dtype:
            return f'{backbone.compute_dtype} in the backbone, float32 elsewhere'
    return 'float32'


def _has_slow_bf16(backbone: PyramidBackbone) -> bool:
    on_cpu = next(backbone.parameters()).device.type == 'cpu'
    return on_cpu and backbone.compute_dtype == 'bfloat16' and kernels.BF16_IS_SLOW


def _device(model: nn.Module) -> str:
    device, count = next(model.parameters()).device, get_world_size()
    what = f'CPU, {torch.get_num_threads()} thread(s)'
    if device.type == 'cuda':
        what = torch.cuda.get_device_name(device)
    return f'{count} x {what}'


def _data(split: str, dataset: Any) -> Data:
    classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
    return Data(split, type(dataset).__name__, len(dataset), len(classes))


def _is_transformer(module: nn.Module) -> bool:
    kinds = (PyramidBackbone, nn.MultiheadAttention)
    return isinstance(module, kinds) or 'Transformer' in type(module).__name__


def _sees_its_batch(module: nn.Module) -> bool:
    """Tell whether a layer normalises by its own device's batch."""
    if isinstance(module, nn.SyncBatchNorm) and get_world_size() > 1:
        return False
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
