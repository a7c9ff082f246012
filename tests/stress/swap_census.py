"""Swap a PVT into every config of the installed mmdet and mmseg, and count what came of it.

Each config is loaded, swapped, written, and read back. Each distinct model is then built once with
random weights, and the loss of two small images is carried back to PVT's first convolution. Nothing
is downloaded. What is done is kept: a run that was stopped goes on where it was, and one after a
change of the swap runs only the models that are new or failed.

Example:
    python tests/stress/swap_census.py --markdown docs/swap_census.md
"""

import argparse
import contextlib
import copy
import fnmatch
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from pvt_mm import cli
from pvt_mm.apis import swap
from pvt_mm.config import config_folder, config_names, iter_dicts, nearest, read_config, type_name
from pvt_mm.engine.model_parts import find_backbones
from pvt_mm.errors import UserError

CODEBASES = ('mmdet', 'mmseg')
BACKBONE = dict(type='PVTv2', arch='b0')
SIDE, LARGE_SIDE = 128, 384

FAMILIES = {
    **dict.fromkeys(('ResNet', 'ResNetV1c', 'ResNetV1d'), 'ResNet'),
    **{name: name for name in ('ResNeXt', 'RegNet', 'Res2Net', 'ResNeSt')},
    'SwinTransformer': 'Swin',
    **dict.fromkeys(('PyramidVisionTransformer', 'PyramidVisionTransformerV2'), 'PVT'),
    'MixVisionTransformer': 'MiT',
    **dict.fromkeys(('PCPVT', 'SVT'), 'Twins'),
}
#: What mmcv has for CUDA alone says so; the backbone and neck of such models run by themselves.
NO_CPU_KERNEL = ('implementation for device cpu not found', 'is not implemented on CPU')
#: Deformable convolutions on the last level; the queries that DINO picks among an image's tokens.
TOO_SMALL = ('input image is smaller than kernel', 'selected index k out of range')

CARRIED = 'gradient'
LOSS, FEATURES = 'loss', 'backbone and neck'

PAGE = """# Census of swaps

`python tests/stress/swap_census.py --force --markdown docs/swap_census.md` made this page. It took
every config of the installed mmdet and mmseg (`_base_` left out) and swapped PVTv2-B0 for its
backbone; dilated backbones, whose levels get coarser, were swapped with `--allow-stride-change` and
are counted apart. Each swapped config was written and read back to the same.

Each distinct model was then built once with random weights, on the CPU, since the forward needs
real ones, and run on two images of {side} x {side} pixels ({large} x {large} where it needs larger
ones) with made-up boxes, masks and maps. It passes where its loss carries a finite gradient, not
all zeros, to PVT's first convolution. In {features} configs there can be no loss here: the head has
an operation for CUDA only, or the config is for zero-shot evaluation (GLIP, Grounding DINO). There
the whole model is built and the gradient is that of the neck's output.

Trackers are run as the detector that they wrap, semi-supervised detectors as their student. The
text encoder of GLIP and Grounding DINO, which would be downloaded, is stood in for by random
features, GLIP's text layers by none. What failed was run with its own backbone as well; "fails
anyway" means that it ends in the same error there.

{stack}. {models} distinct models, {minutes:.0f} minutes of one core.

## The goal

Of the **{total}** configs with a ResNet, ResNeXt, RegNet, Res2Net, ResNeSt, Swin, PVT, MiT or Twins
backbone, **{done}** ({share:.1f}%) swap, build and carry a gradient: {plain} at the strides they
had, {coarse} with coarser ones. The goal is 95%; refusals count against it.
"""


# One config


def census_config(name: str) -> dict[str, Any]:
    """Load, swap, write and read back a config; return its row."""
    start = time.process_time()
    row = dict(name=name, codebase=name.partition('::')[0], family='unknown', stride_changed=False)
    row.update(outcome_of(name), seconds=time.process_time() - start)
    return row


def outcome_of(name: str) -> dict[str, Any]:
    """Return what came of swapping a config."""
    try:
        cfg = read_config(name, import_custom_modules=False)
    except UserError as error:
        reason = str(error).rpartition(' does not load: ')[2]
        folder = str(config_folder(name.partition('::')[0]))
        return dict(outcome='does not load', reason=reason.replace(f'{folder}/', ''))
    row: dict[str, Any] = dict(outcome='swapped', reason='', family=family_of(cfg))
    try:
        try:
            swapped = swap.swap_with_changes(cfg, BACKBONE)
        except swap.SwapRefusedError as error:
            if error.reason is not swap.Refusal.STRIDE:
                raise
            swapped = swap.swap_with_changes(cfg, BACKBONE, allow_stride_change=True)
            row['stride_changed'] = True
    except swap.SwapRefusedError as error:
        return dict(row, outcome='refused', reason=error.reason.value)
    if not reads_back(swapped):
        return dict(row, outcome='failed', reason='reads back to another config')
    model = bare(swapped.cfg.model.to_dict())
    text = json.dumps(identity(model), sort_keys=True, default=repr)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return dict(row, model=key, criterion=FEATURES if is_for_evaluation(model) else LOSS)


def family_of(cfg: Config) -> str:
    """Name the family of a config's backbone; of another backbone, its type."""
    for node in iter_dicts(cfg._cfg_dict.get('model')):
        backbone = node.get('backbone')
        if isinstance(backbone, dict) and 'type' in backbone:
            name = type_name(backbone)
            return FAMILIES.get(name, name)
    return 'none'


def reads_back(swapped: swap.Swapped) -> bool:
    """Check that the written config loads to the same one; unformatted, which is quick."""
    object.__setattr__(swapped.cfg, '_format_python_code', False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'config.py'
        swap.write(swapped, file, 'a config')
        again = Config.fromfile(file, import_custom_modules=False)
    return again._cfg_dict == swapped.cfg._cfg_dict


def bare(node: Any) -> Any:
    """Return a model without weights to load, and without what saves memory by more packages."""
    if isinstance(node, dict):
        skipped = ('init_cfg', 'pretrained', 'teacher_ckpt', 'num_cp')
        return {key: bare(value) for key, value in node.items() if key not in skipped}
    if isinstance(node, (list, tuple)):
        return type(node)(bare(item) for item in node)
    return node


def identity(node: Any) -> Any:
    """Return what makes two models the same here: all but testing and image statistics."""
    if isinstance(node, dict):
        skipped = ('test_cfg', 'data_preprocessor')
        return {key: identity(value) for key, value in node.items() if key not in skipped}
    if isinstance(node, (list, tuple)):
        return [identity(item) for item in node]
    return node


# One model


def check(row: dict[str, Any]) -> dict[str, Any]:
    """Check the model of a row, on larger images or without its head where it needs that."""
    start = time.process_time()
    criterion, side = row['criterion'], SIDE
    error = failure(check_model, row, criterion, side)
    if contains(error, TOO_SMALL):
        side = LARGE_SIDE
        error = failure(check_model, row, criterion, side)
    if contains(error, NO_CPU_KERNEL):
        criterion = FEATURES
        error = failure(check_model, row, criterion, side)
    result = dict(model=row['model'], criterion=criterion, error=error[:160])
    result['anyway'] = bool(error) and failure(check_original, row, criterion, side) == error
    return dict(result, seconds=time.process_time() - start)


def failure(function: Callable[..., None], *arguments: Any) -> str:
    """Call a function and return its error in one line; nothing where it went well."""
    try:
        function(*arguments)
    except Exception as error:  # whatever a model raises counts as its failure
        words = ' '.join(str(error).split()).replace('|', '/')
        return f'{type(error).__name__}: {words}'
    return ''


def contains(error: str, texts: tuple[str, ...]) -> bool:
    """Tell whether an error is one of these."""
    return any(text in error for text in texts)


def check_model(row: dict[str, Any], criterion: str, side: int) -> None:
    """Swap a config again, build its model and carry a gradient to PVT's first convolution.

    Raises:
        UserError: Where none, or one that is not finite or all zero, arrives.
    """
    cfg = swap.swap_with_changes(
        row['name'], BACKBONE, allow_stride_change=row['stride_changed']
    ).cfg
    model = run(row['codebase'], bare(cfg.model.to_dict()), criterion, side)
    stems = [
        backbone.stages[0].patch_embed.proj.weight
        for name, backbone in find_backbones(model).items()
        if not name.startswith('teacher')
    ]
    trained = [stem.grad for stem in stems if stem.requires_grad and stem.grad is not None]
    if not trained:
        raise UserError("no gradient reaches PVT's first convolution")
    if not all(torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in trained):
        raise UserError("the gradient at PVT's first convolution is zero or not finite")


def check_original(row: dict[str, Any], criterion: str, side: int) -> None:
    """Build and run the model of a config as it is, to see whether that fails too."""
    cfg = read_config(row['name'], import_custom_modules=False)
    run(row['codebase'], bare(cfg.model.to_dict()), criterion, side)


def run(codebase: str, settings: dict[str, Any], criterion: str, side: int) -> Any:
    """Build a model, carry its loss back and return it."""
    torch.manual_seed(0)
    np.random.seed(0)
    cfg = Config(dict(default_scope=codebase, model=copy.deepcopy(settings)))
    for node in iter_dicts(cfg.model):
        if type_name(node) in ('SyncBN', 'MMSyncBN'):  # not on a CPU
            node['type'] = 'BN'
    registry = import_module(f'{codebase}.registry').MODELS
    with DefaultScope.overwrite_default_scope(codebase), beside_configs(codebase):
        model = registry.build(cfg.model)
        model.train()  # not chained: LAD's returns nothing
        model.init_weights()
        loss_of(codebase, model, settings, criterion, side).backward()
    return model


@contextlib.contextmanager
def beside_configs(codebase: str) -> Iterator[None]:
    """Work in a folder with a link ``configs``: some models name the config of a teacher so."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'configs').symlink_to(config_folder(codebase))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def loss_of(
    codebase: str, model: Any, settings: dict[str, Any], criterion: str, side: int
) -> torch.Tensor:
    """Return the summed losses of two made-up images, or the summed features of the neck."""
    for part in ('detector', 'student'):  # trackers and semi-supervised detectors
        if hasattr(model, part):
            model = getattr(model, part)
            settings = settings.get('detector', settings)
            break
    channels = settings.get('backbone', {}).get('in_channels', 3)
    images = torch.rand(2, channels, side, side) * 4 - 2
    if criterion == FEATURES:
        features = model.extract_feat(images)
        return sum(feature.square().mean() for feature in features)
    samples = (
        segmentation_samples(settings, side)
        if codebase == 'mmseg'
        else detection_samples(settings, side)
    )
    if type_name(settings) == 'Mask2FormerVideo':
        images, samples = video(images, samples)
    if type_name(settings) == 'BoxInst':  # its preprocessor makes the targets
        raw = [(image * 50 + 120).clamp(0, 255).byte() for image in images]
        data = model.data_preprocessor(dict(inputs=raw, data_samples=samples), True)
        images, samples = data['inputs'], data['data_samples']
    losses = model.loss(images, samples)
    losses = losses[0] if isinstance(losses, tuple) else losses
    total, _ = model.parse_losses(losses)
    return total


def is_for_evaluation(settings: dict[str, Any]) -> bool:
    """Tell zero-shot configs, which lack what a loss needs: assigner or box loss."""
    if type_name(settings) == 'GroundingDINO':
        return not settings.get('train_cfg')
    return type_name(settings) == 'GLIP' and 'loss_bbox' not in settings['bbox_head']


def classes_of(settings: dict[str, Any]) -> int:
    """Return how many classes every head of a model has at least."""
    counts = [
        node[key]
        for node in iter_dicts(settings)
        for key in ('num_classes', 'num_things_classes')
        if isinstance(node.get(key), int) and node[key] > 0
    ]
    return min(counts, default=1)


def segmentation_samples(settings: dict[str, Any], side: int) -> list[Any]:
    """Make the targets of two images: random classes in blocks."""
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        blocks = torch.randint(0, min(classes_of(settings), 8), (1, 8, 8))
        labels = blocks.repeat_interleave(side // 8, 1).repeat_interleave(side // 8, 2)
        sample = SegDataSample(metainfo=metainfo(side))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return samples


def metainfo(side: int) -> dict[str, Any]:
    """Describe an image that was neither resized nor padded."""
    shape = (side, side)
    return dict(
        img_id=0,
        img_path='',
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
        flip=False,
    )


def detection_samples(settings: dict[str, Any], side: int) -> list[Any]:
    """Make the targets of two images: two boxes with masks, a map, proposals and a text."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[0.08, 0.05, 0.6, 0.55], [0.3, 0.25, 0.95, 0.9]]) * side
    samples = []
    for _ in range(2):
        sample = DetDataSample(metainfo=metainfo(side))
        labels = torch.arange(2) % classes_of(settings)
        masks = np.zeros((2, side, side), np.uint8)
        for mask, box in zip(masks, boxes.round().int().tolist()):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        use_boxes = HorizontalBoxes(boxes.clone()) if settings.get('type') == 'BoxInst' else boxes
        sample.gt_instances = InstanceData(
            bboxes=use_boxes, labels=labels, masks=BitmapMasks(masks, side, side)
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=labels[:0])
        sample.proposals = InstanceData(bboxes=boxes + 2, scores=torch.tensor([0.9, 0.8]))
        sample.gt_sem_seg = PixelData(sem_seg=semantic_map(masks, labels))
        sample.set_metainfo(dict(text=('zero', 'one')))
        samples.append(sample)
    return samples


def semantic_map(masks: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
    """Paint a map of classes."""
    painted = torch.zeros(1, *masks.shape[1:], dtype=torch.long)
    for mask, label in zip(masks, labels):
        painted[0, torch.from_numpy(mask).bool()] = label
    return painted


def video(images: torch.Tensor, samples: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    """Make one video of two frames of two images."""
    from mmdet.structures import TrackDataSample

    for sample in samples:
        sample.gt_instances.instances_ids = torch.arange(2)
    video = TrackDataSample(video_data_samples=samples)
    video.set_metainfo(dict(key_frames_inds=[0], ref_frames_inds=[1]))
    return images[None], [video]


class Characters:
    """Stands in for a tokenizer: a token a character, after one that begins the text."""

    def __call__(self, texts: list[str], **kwargs: Any) -> 'Characters':
        """Tokenize texts, all alike here."""
        self.input_ids = torch.tensor([[0, *map(ord, texts[0])]])
        return self

    def char_to_token(self, position: int) -> int:
        """Return the token of a character."""
        return position + 1


class TextFeatures(nn.Module):
    """Stands in for BERT: random features, so that nothing is downloaded."""

    def __init__(
        self,
        name: str = '',
        max_tokens: int = 256,
        pad_to_max: bool = True,
        use_sub_sentence_represent: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.tokenizer = Characters()
        self.max_tokens = max_tokens
        self.pad_to_max = pad_to_max
        self.has_square_mask = use_sub_sentence_represent
        self.language_backbone = nn.Module()
        self.language_backbone.body = nn.Module()
        self.language_backbone.body.language_dim = 768  # type: ignore[assignment]

    def forward(self, captions: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return what mmdet's BertModel returns."""
        used = max(map(len, captions)) + 1
        length = self.max_tokens if self.pad_to_max else used
        features = torch.randn(len(captions), length, 768)
        visible = (torch.arange(length) < used).expand(len(captions), -1)
        square = visible[:, None].expand(-1, length, -1)
        return dict(
            embedded=features,
            hidden=features,
            masks=square if self.has_square_mask else visible.long(),
            position_ids=torch.arange(length).expand(len(captions), -1),
            text_token_mask=visible,
        )


class TextLayer(nn.Identity):
    """Stands in for the text layers of GLIP's head, which not every transformers can build."""


class TextConfig:
    """Stands in for BERT's configuration, which would be downloaded as well."""

    hidden_size = 768

    @classmethod
    def from_pretrained(cls, name: str) -> 'TextConfig':
        """Return this one, whatever the name."""
        return cls()


def stand_in_for_text() -> None:
    """Put stand-ins in the place of BERT and of what is made from it."""
    import_module('mmdet.registry').MODELS.register_module(
        name='BertModel', module=TextFeatures, force=True
    )
    head: Any = import_module('mmdet.models.dense_heads.atss_vlfusion_head')
    head.BertConfig, head.BertEncoderLayer = TextConfig, TextLayer


# All of them


def start_worker() -> None:
    """Prepare a process: one thread, quiet, no text encoder, no way to a model hub."""
    os.environ['HF_HUB_OFFLINE'] = '1'
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    MMLogger.get_instance('mmengine', log_level='ERROR')
    MessageHub.get_current_instance().update_info_dict(dict(epoch=0, iter=0))  # TOOD asks for it
    for codebase in CODEBASES:
        import_module(f'{codebase}.utils').register_all_modules(init_default_scope=False)
    stand_in_for_text()


class Results:
    """What is done so far, on disc."""

    def __init__(self, folder: Path, force: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / 'results.json'
        self.saved = time.monotonic()
        self.digest = hashlib.sha256(Path(swap.__file__).read_bytes()).hexdigest()
        self.rows: dict[str, dict[str, Any]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        if self.file.is_file() and not force:
            kept = json.loads(self.file.read_text())
            self.models = {
                key: model for key, model in kept['models'].items() if not model['error']
            }
            if kept['digest'] == self.digest:
                self.rows = kept['rows']

    def save_now_and_then(self) -> None:
        """Write everything, unless that was done within the last ten seconds."""
        if time.monotonic() - self.saved > 10:
            self.save()

    def save(self) -> None:
        """Write everything; quick enough for a few thousand entries."""
        self.saved = time.monotonic()
        part = self.file.with_suffix('.part')
        data = dict(digest=self.digest, rows=self.rows, models=self.models)
        part.write_text(json.dumps(data))
        part.replace(self.file)


def find_configs(patterns: list[str]) -> list[str]:
    """Return the names of the shipped configs that match any pattern.

    Raises:
        UserError: Where a pattern matches none.
    """
    names = [
        f'{codebase}::{path}'
        for codebase in CODEBASES
        for path in config_names(config_folder(codebase))
    ]
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            hint = nearest(pattern.strip('*'), names)
            raise UserError(f'--pattern {pattern}: no config has such a name; {hint}')
        found |= set(matches)
    return sorted(found)


def census(results: Results, names: list[str], workers: int) -> None:
    """Do what is not done yet of some configs, and save it."""
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        todo = [name for name in names if name not in results.rows]
        found = pool.map(census_config, todo, chunksize=8)
        # An exception here is a fault of the swap, and ends the census.
        for row in cli.track(found, len(todo), 'configs'):
            results.rows[row['name']] = row
            results.save_now_and_then()
        results.save()
        rows = [results.rows[name] for name in names]
        distinct = {row['model']: row for row in rows if row['outcome'] == 'swapped'}
        models = [row for key, row in distinct.items() if key not in results.models]
        for model in cli.track(pool.map(check, models), len(models), 'models'):
            results.models[model.pop('model')] = model
            results.save_now_and_then()
        results.save()


# The page


def outcomes(results: Results, names: list[str]) -> list[dict[str, Any]]:
    """Return the rows of some configs with what came of their models."""
    rows = []
    for name in names:
        row = dict(results.rows[name])
        if row['outcome'] == 'swapped':
            model = results.models[row['model']]
            if model['error']:
                outcome = 'fails anyway' if model['anyway'] else 'failed'
                row.update(outcome=outcome, reason=model['error'])
            else:
                row.update(outcome=CARRIED, reason=model['criterion'])
        rows.append(row)
    return rows


def table(header: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    """Return a table in Markdown."""
    rows = [header, ('---',) * len(header), *lines]
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)


def label(row: dict[str, Any]) -> str:
    """Name an outcome, those with other strides apart."""
    if row['outcome'] == CARRIED:
        return 'coarser strides' if row['stride_changed'] else 'same strides'
    return row['outcome']


def page(results: Results, rows: list[dict[str, Any]]) -> str:
    """Return the page of docs/."""
    goal = [row for row in rows if row['family'] in set(FAMILIES.values())]
    done = [row for row in goal if row['outcome'] == CARRIED]
    coarse = [row for row in done if row['stride_changed']]
    alone = [row for row in rows if row['outcome'] == CARRIED and row['reason'] == FEATURES]
    models = [results.models[key] for key in {row['model'] for row in rows if 'model' in row}]
    packages = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
    head = PAGE.format(
        side=SIDE,
        large=LARGE_SIDE,
        features=len(alone),
        stack=', '.join(f'{name} {import_module(name).__version__}' for name in packages),
        models=len(models),
        minutes=sum(item['seconds'] for item in [*rows, *models]) / 60,
        total=len(goal),
        done=len(done),
        share=100 * len(done) / max(len(goal), 1),
        plain=len(done) - len(coarse),
        coarse=len(coarse),
    )
    columns = (
        *('same strides', 'coarser strides', 'refused'),
        *('failed', 'fails anyway', 'does not load'),
    )
    sections = [head.rstrip()]
    for codebase in sorted({row['codebase'] for row in rows}):
        own = [row for row in rows if row['codebase'] == codebase]
        sections.append(f'## {codebase}: {len(own)} configs')
        counts = Counter((row['family'], label(row)) for row in own)
        families = sorted({family for family, _ in counts}, key=str.lower)
        lines = [(name, *(counts[name, column] or '' for column in columns)) for name in families]
        total = Counter(map(label, own))
        lines.append(('**all**', *(total[column] for column in columns)))
        sections.append(table(('backbone', *columns), lines))
        reasons = Counter((columns.index(label(row)), row['reason']) for row in own)
        ordered = sorted(reasons.items(), key=lambda item: (item[0][0], -item[1]))
        lines = [(columns[outcome], reason, number) for (outcome, reason), number in ordered]
        sections.append(table(('outcome', 'by, or because', 'configs'), lines))
    failures = [
        (f'`{row["name"]}`', row['outcome'], row['reason'])
        for row in rows
        if row['outcome'] in columns[-3:]
    ]
    sections.append('## What failed')
    sections.append(table(('config', 'outcome', 'reason'), failures) if failures else 'Nothing.')
    return '\n\n'.join(sections) + '\n'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--pattern',
        nargs='+',
        default=['*'],
        metavar='GLOB',
        help="some of them, e.g. 'mmdet::retinanet/*' (default: all)",
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/swap_census'),
        help='where results are kept (default: %(default)s)',
    )
    parser.add_argument('--workers', type=int, default=2, help='processes (default: 2)')
    parser.add_argument('--force', action='store_true', help='do everything again')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the page')
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    names = find_configs(args.pattern)
    results = Results(args.work_dir, args.force)
    census(results, names, args.workers)
    rows = outcomes(results, names)
    for (codebase, outcome), number in sorted(
        Counter((row['codebase'], label(row)) for row in rows).items()
    ):
        print(f'{codebase}  {outcome}: {number}')
    if args.markdown:
        args.markdown.write_text(page(results, rows), encoding='utf-8')
        print(f'wrote {args.markdown}')


if __name__ == '__main__':
    main()
