"""A summary of a training before its first iteration, with warnings about known traps."""

from __future__ import annotations

import locale
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from torch import nn

from pvt_mm.checkpoint.atoms import recognise_arch, to_atoms
from pvt_mm.checkpoint.key_maps import PVT_MM
from pvt_mm.datasets.coco_file import Census, absent_classes
from pvt_mm.datasets.coco_readers import census_of
from pvt_mm.datasets.ignore_index import ignored_label
from pvt_mm.datasets.label_maps import check_labels
from pvt_mm.engine.model_parts import find_backbones, unwrap_model
from pvt_mm.models import PyramidBackbone
from pvt_mm.models.context import bf16_is_slow_on_cpu
from pvt_mm.tables import as_text

WIDTH = 100


class Data(NamedTuple):
    """A data set: its split, type, numbers of images and classes, a note, warnings, objects."""

    split: str
    kind: str
    images: int
    classes: int
    note: str = ''
    warnings: Sequence[str] = ()
    objects: Census | None = None


@dataclass(frozen=True)
class Facts:
    """What is known about a training right before its first iteration.

    Args:
        config: The config's path.
        model: Type, architecture and size.
        weights: A line for each source of weights; empty where all are random.
        per_device: Images in a batch of one device.
        devices: Number of processes.
        accumulation: Iterations per update of the weights.
        base_batch: The batch that the config's learning rate is for; 0 if it does not say.
        scaled: Whether mmengine scales the learning rate.
        optimizer: Its type.
        lr: The learning rate that schedules multiply.
        weight_decay: Of the optimizer; None if it has none.
        precision: What the model computes in.
        device: What it runs on.
        data: The data sets.
        work_dir: Folder of logs and checkpoints.
        transformer: Whether the model has one.
        batch_norms: BatchNorm layers that normalise by each device's own batch.
        slow_bf16: Whether a backbone computes in bf16 on a CPU without instructions for it.
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
        """The batch that mmengine scales the learning rate for; it ignores accumulation."""
        return self.per_device * self.devices

    @property
    def batch(self) -> int:
        """Images per update of the weights."""
        return self.scaled_batch * self.accumulation


# What is written


def warnings_of(facts: Facts) -> list[str]:
    """Return a sentence for each known trap that a training is in, with what to do."""
    found = []
    if not facts.weights:
        found.append(
            'no weights are loaded, all are random: --load-from FILE, or init_cfg in the backbone.'
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
            '--auto-scale-lr leaves accumulation out: train without it and set '
            f'optim_wrapper.optimizer.lr={facts.lr * facts.accumulation:.3g}.'
        )
    if facts.per_device == 1 and facts.batch_norms:
        found.append(
            f'{facts.batch_norms} BatchNorm layers see one image at a time: norm_eval=True, GN, or '
            'train_dataloader.batch_size=2 or more.'
        )
    for data in facts.data:
        found += [f'{data.split}: {text}' for text in data.warnings]
    if facts.slow_bf16:
        found.append(
            'this CPU has no instructions for bf16, so that it is slower than fp32: leave out '
            '--amp and compute_dtype.'
        )
    found += [text for data in facts.data for text in _warnings_of_data(data)]
    return found


def _warnings_of_data(data: Data) -> Iterator[str]:
    if data.split != 'train' or data.objects is None:
        return
    absent = absent_classes(data.objects)
    if absent:
        names = ', '.join(absent[:5]) + ', ...' * (len(absent) > 5)
        yield f'the training data have no object of class {names}: nothing of it is learnt.'
    if data.objects.left_out.total() > data.objects.used.total():
        yield (
            'most objects of the training data are left out: '
            'tools/analysis_tools/check_dataset.py names each and says why.'
        )


def summary_lines(facts: Facts, width: int = WIDTH, ascii_only: bool = False) -> list[str]:
    """Return a box with the facts of a training, and below them the warnings.

    Args:
        facts: Of the training.
        width: Of the box, at most.
        ascii_only: Draw the box with ASCII characters.
    """
    rows = _columns(_rows(facts), label_width=12)
    warned = [('WARNING', text) for text in warnings_of(facts)]
    rule = Rule(characters='-' if ascii_only else '─')
    parts = [rows, rule, _columns(warned, label_width=9)] if warned else [rows]
    style = box.ASCII if ascii_only else box.SQUARE
    panel = Panel(Group(*parts), style, title='training', title_align='left', expand=False)
    return as_text(panel, width).splitlines()


def _columns(rows: Iterable[tuple[str, str]], label_width: int) -> Table:
    table = Table.grid()
    table.add_column(width=label_width)
    table.add_column(overflow='fold')
    for row in rows:
        table.add_row(*row)
    return table


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    yield 'config', facts.config
    yield 'model', facts.model
    yield from zip(['weights'] + [''] * len(facts.weights), facts.weights or ['none'])
    yield (
        'batch',
        f'{facts.batch} images per update: {facts.per_device} per device x {facts.devices} '
        f'device(s) x {facts.accumulation} iteration(s)',
    )
    yield 'lr', _rate(facts)
    decay = '' if facts.weight_decay is None else f', weight decay {facts.weight_decay:g}'
    yield 'optimizer', f'{facts.optimizer}{decay}'
    yield 'precision', facts.precision
    yield 'device', facts.device
    for data in facts.data:
        note = f', {data.note}' if data.note else ''
        yield data.split, f'{data.images:,} images, {data.classes} classes ({data.kind}){note}'
        if data.objects is not None:
            yield '', str(data.objects)
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


def can_draw_lines() -> bool:
    """Tell whether both the terminal and a log file take the characters of boxes."""
    for encoding in (sys.stdout.encoding, locale.getpreferredencoding(False)):
        try:
            '─'.encode(encoding or 'ascii')
        except (UnicodeEncodeError, LookupError):
            return False
    return True


# Where the facts come from


class TrainingSummaryHook(Hook):
    """Log the summary of a training after its weights are loaded, before its first iteration.

    It counts the tensors that were really written, whatever the config asks for.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._built: dict[str, int] = {}
        self._before_load: dict[str, int] = {}

    def before_run(self, runner: Any) -> None:
        """Note the state of all tensors before the weights are initialised."""
        self._built = _versions(runner.model)
        self._before_load = {}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Note the state of all tensors right before a checkpoint is loaded."""
        self._before_load = _versions(runner.model)

    def before_train(self, runner: Any) -> None:
        """Log the summary in the main process."""
        if is_main_process():
            facts = facts_of(runner, self._weights(runner))
            lines = summary_lines(facts, ascii_only=not can_draw_lines())
            runner.logger.info('\n'.join(['', *lines]))

    def _weights(self, runner: Any) -> list[str]:
        """Say how many tensors each source of weights gave."""
        now = _versions(runner.model)
        backbones, files = find_backbones(runner.model), _init_files(runner.model)
        found = []
        for name, source in files.items():
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
        for name, backbone in backbones.items():
            if backbone.loaded:
                source = '' if self._before_load else files.get(name, '')
                found.append(_backbone_line(backbone, source))
        if self._before_load:
            rest = {key for key in now if not key.startswith(tuple(f'{b}.' for b in backbones))}
            written = sum(now[key] != self._before_load[key] for key in rest)
            place = 'the rest of the model' if backbones else 'the model'
            found.append(f'{place}: loaded {written} of {len(rest)} tensors')
            how = 'resumed' if runner._resume else 'load_from'
            found.append(f'{how}: {runner._load_from or "the newest checkpoint of the work dir"}')
        return found


def _backbone_line(backbone: PyramidBackbone, source: str) -> str:
    """Shorten the message of a backbone's load, and add where the weights are from."""
    text = backbone.loaded.rstrip('.').split('; dropped')[0]
    return f'{text}: {source}' if source else text


def facts_of(runner: Any, weights: list[str]) -> Facts:
    """Collect the facts from a Runner that is about to train.

    Args:
        runner: Its model, optimizer and loops are built.
        weights: A line for each source of weights.
    """
    cfg, model = runner.cfg, unwrap_model(runner.model)
    model.train()  # as the loop does next: norm_eval and frozen stages take effect
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
        data=[_data(split, loader.dataset, ignored_label(cfg)) for split, loader in loaders],
        work_dir=str(runner.work_dir),
        transformer=any(map(_is_transformer, model.modules())),
        batch_norms=sum(_sees_its_batch(module) for module in model.modules()),
        slow_bf16=any(map(_has_slow_bf16, find_backbones(model).values())),
    )


def _versions(model: Any) -> dict[str, int]:
    """Return for each tensor how often it was written."""
    tensors = unwrap_model(model).state_dict(keep_vars=True).items()
    return {
        key: tensor._version for key, tensor in tensors if not key.endswith('num_batches_tracked')
    }


def _init_files(model: Any) -> dict[str, str]:
    """Return the checkpoint that a module is initialised from, by the module's name."""
    found = {}
    for name, module in unwrap_model(model).named_modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            found[name] = str(init_cfg['checkpoint'])
    return found


def _model(model: nn.Module) -> str:
    parts = [type(model).__name__]
    for backbone in find_backbones(model).values():
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
    for backbone in find_backbones(model).values():
        if backbone.compute_dtype:
            return f'{backbone.compute_dtype} in the backbone, float32 elsewhere'
    return 'float32'


def _has_slow_bf16(backbone: PyramidBackbone) -> bool:
    on_cpu = next(backbone.parameters()).device.type == 'cpu'
    return on_cpu and backbone.compute_dtype == 'bfloat16' and bf16_is_slow_on_cpu()


def _device(model: nn.Module) -> str:
    device, count = next(model.parameters()).device, get_world_size()
    what = f'CPU, {torch.get_num_threads()} thread(s)'
    if device.type == 'cuda':
        what = torch.cuda.get_device_name(device)
    return f'{count} x {what}'


def _data(split: str, dataset: Any, ignored: int | None) -> Data:
    classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
    kind, (note, warnings) = type(dataset).__name__, check_labels(dataset, ignored)
    count = len(dataset), len(classes)
    return Data(split, kind, *count, note, warnings, census_of(dataset))


def _is_transformer(module: nn.Module) -> bool:
    kinds = (PyramidBackbone, nn.MultiheadAttention)
    return isinstance(module, kinds) or 'Transformer' in type(module).__name__


def _sees_its_batch(module: nn.Module) -> bool:
    """Tell whether a layer normalises by its own device's batch."""
    if isinstance(module, nn.SyncBatchNorm) and get_world_size() > 1:
        return False
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
