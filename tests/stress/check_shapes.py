"""Run every architecture on random images: the documented features or the documented error.

A case draws everything that a caller may choose: batch, size, stages, precision, mode, memory
layout and the kind of values. What comes back must have the documented shapes, be contiguous and
finite, in training with finite gradients, or the error must be the documented one. In evaluation in
fp32 the first image must give the same alone, and with the kernels' chunks made small. Ends with 1
where anything else happens.

Example:
    python tests/stress/check_shapes.py --cases 2000 --seed 0
"""

import argparse
import contextlib
import copy
import functools
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import pvt_mm
from pvt_mm import cli
from pvt_mm.errors import UserError
from pvt_mm.models.fast import attention, cpu, mlp
from pvt_mm.tables import text_table

BACKBONES: dict[str, Any] = {'PVT': pvt_mm.PVT, 'PVTv2': pvt_mm.PVTv2}
STRIDES = (4, 2, 2, 2)
STAGES = tuple(
    indices for count in range(1, 5) for indices in itertools.combinations(range(4), count)
)


class Precision(NamedTuple):
    """Dtypes of weights and image, whether bf16 autocast is on, and the backbone's own setting."""

    weights: torch.dtype = torch.float32
    image: torch.dtype = torch.float32
    autocast: bool = False
    compute_dtype: str | None = None

    @property
    def is_bf16(self) -> bool:
        """Whether matmuls run in bf16."""
        return self.autocast or self.weights == torch.bfloat16 or self.compute_dtype is not None


PRECISIONS = {
    'fp32': Precision(),
    'fp64': Precision(torch.float64, torch.float64),
    'bf16': Precision(torch.bfloat16, torch.bfloat16),
    'fp16': Precision(torch.float16, torch.float16),
    'autocast': Precision(autocast=True),
    'autocast, bf16 image': Precision(image=torch.bfloat16, autocast=True),
    'compute_dtype bf16': Precision(compute_dtype='bfloat16'),
    'fp64 image': Precision(image=torch.float64),
    'uint8 image': Precision(image=torch.uint8),
}
LAYOUTS = ('contiguous', 'channels last', 'transposed', 'sliced', 'expanded')
VALUES = ('normal', 'zero', 'pixels')
#: Elements of a chunk and channels of a tile, so few that the kernels cut even small images.
SMALL_CHUNK, SMALL_TILE = 2**12, 16
#: How far two results for the same image may be apart, over the std of a stage.
TOLERANCE = 1e-5

RIGHT, SMALL, CHANNELS, DTYPE = 'features', 'too small', 'channels', 'dtype'
WRONG = 'UNDOCUMENTED'
OUTCOMES = (RIGHT, SMALL, CHANNELS, DTYPE, WRONG)
#: The documented errors: the class, and words of the message.
REFUSALS: dict[str, tuple[type[Exception], str]] = {
    SMALL: (ValueError, 'needs images of at least'),
    CHANNELS: (ValueError, 'input channels'),
    DTYPE: (TypeError, 'has weights of'),
}


@dataclass(frozen=True)
class Case:
    """One forward pass; ``arch`` is a name or a custom architecture."""

    backbone: str
    arch: Any
    out_indices: tuple[int, ...]
    batch: int
    height: int
    width: int
    precision: str = 'fp32'
    training: bool = False
    layout: str = 'contiguous'
    values: str = 'normal'
    channels: int = 3
    sr_mode: str = 'conv'
    seed: int = 0


# What the documentation promises


def grids(case: Case) -> list[tuple[int, int]]:
    """Height and width of each stage that is built: halved, rounded down in v1, up in v2."""
    height, width, sizes = case.height, case.width, []
    for stride in STRIDES[: max(case.out_indices) + 1]:
        if case.backbone == 'PVT':
            height, width = height // stride, width // stride
        else:
            height, width = -(-height // stride), -(-width // stride)
        sizes.append((height, width))
    return sizes


def settings(case: Case) -> dict[str, Any]:
    """Return the architecture of a case."""
    if isinstance(case.arch, str):
        return BACKBONES[case.backbone].ARCHS[case.arch]
    return dict(case.arch)


def expected(case: Case) -> str:
    """Return the outcome that the documentation gives."""
    precision = PRECISIONS[case.precision]
    weights, image = precision.weights, precision.image
    if case.channels != 3:
        return CHANNELS
    if not image.is_floating_point or (image != weights and not precision.autocast):
        return DTYPE
    arch = settings(case)
    smallest = (1,) * 4 if arch.get('linear') else arch['sr_ratios']
    if any(min(grid) < side for grid, side in zip(grids(case), smallest)):
        return SMALL
    return RIGHT


# One case, run


@functools.lru_cache(maxsize=1)
def build(
    backbone: str, arch: Any, out_indices: tuple[int, ...], sr_mode: str, compute_dtype: str | None
) -> Any:
    """Build a backbone in fp32; the last one is kept, since cases come sorted."""
    torch.manual_seed(0)
    arch = arch if isinstance(arch, str) else dict(arch)
    return BACKBONES[backbone](
        arch,
        out_indices=out_indices,
        sr_mode=sr_mode,
        compute_dtype=compute_dtype,
        drop_path_rate=0.1,
    )


def backbone_of(case: Case) -> Any:
    """Return the backbone in the case's precision and mode, gradients cleared."""
    dtype, _, _, compute_dtype = PRECISIONS[case.precision]
    model = build(case.backbone, case.arch, case.out_indices, case.sr_mode, compute_dtype)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    model.zero_grad()
    return model.train(case.training)


def draw_image(case: Case) -> Tensor:
    """Draw the images of a case, in its dtype and memory layout."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.channels, case.height, case.width)
    if case.values == 'pixels':
        image = torch.randint(0, 256, shape, generator=generator).float()
    else:
        image = torch.randn(shape, generator=generator) * (case.values == 'normal')
    image = image.to(PRECISIONS[case.precision].image)
    if case.layout == 'channels last':
        return image.contiguous(memory_format=torch.channels_last)
    if case.layout == 'transposed':
        return image.transpose(2, 3).contiguous().transpose(2, 3)
    if case.layout == 'sliced':
        return image.repeat_interleave(2, 3)[..., ::2]
    if case.layout == 'expanded':
        return image[:1].expand(shape)
    return image


def run(case: Case) -> tuple[str, str]:
    """Run a case and compare it with the documentation.

    Returns:
        The outcome, and what was wrong with it, if anything.
    """
    promised = expected(case)
    model, image = backbone_of(case), draw_image(case)
    try:
        fault = fault_of(case, model, image)
    except Exception as error:  # any other kind is what this tool looks for
        kind, words = REFUSALS.get(promised, (None, ''))
        if type(error) is kind and words in str(error):
            return promised, ''
        return WRONG, f'{type(error).__name__}: {error}'
    if not fault and promised != RIGHT:
        fault = f'accepted, though it should be refused: {promised}'
    return (WRONG, fault) if fault else (RIGHT, '')


def fault_of(case: Case, model: Any, image: Tensor) -> str:
    """Run the forward pass, in training the backward pass too; say what is wrong, if anything."""
    precision = PRECISIONS[case.precision]
    with torch.set_grad_enabled(case.training):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision.autocast):
            outs = model(image)
        if case.training:
            sum(out.float().sin().mean() for out in outs).backward()
    arch, sizes = settings(case), grids(case)
    shapes = [(case.batch, arch['dims'][i], *sizes[i]) for i in case.out_indices]
    if [tuple(out.shape) for out in outs] != shapes:
        return f'shapes {[tuple(out.shape) for out in outs]}, not {shapes}'
    if not precision.autocast and any(out.dtype != precision.weights for out in outs):
        return f'features of {[out.dtype for out in outs]}'
    if not all(out.is_contiguous() for out in outs):
        return 'features are not contiguous'
    if not all(out.isfinite().all() for out in outs):
        return 'features are not finite'
    if has_gradients(case):
        for name, parameter in model.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all():
                return f'the gradient of {name} is not finite'
    if case.precision == 'fp32' and not case.training:
        return dependence(model, image, outs)
    return ''


def has_gradients(case: Case) -> bool:
    """Tell whether the gradients of a case are to be finite.

    With fresh weights, whose biases are 0, an all-zero image stays zero from norm to norm in v2,
    and each norm multiplies the gradient by up to 1 / sqrt(eps) = 1000: more than fp32 can hold, in
    any implementation. And PyTorch's bf16 convolution leaves those columns of the weight's gradient
    unwritten that met nothing but padding, as some do where an image is at most 16 pixels wide.
    """
    tiny = PRECISIONS[case.precision].is_bf16 and min(case.height, case.width) <= 16
    return case.training and case.values != 'zero' and not tiny


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Have the kernels work in small chunks, and use them for small attentions too."""
    traits = cpu.traits()._replace(chunk=SMALL_CHUNK)
    with (
        mock.patch.object(cpu, 'traits', lambda: traits),
        mock.patch.object(mlp, 'CHANNELS', SMALL_TILE),
        mock.patch.object(attention, 'MANY_SCORES', 1),
    ):
        yield


@torch.no_grad()
def dependence(model: Any, image: Tensor, outs: tuple[Tensor, ...]) -> str:
    """Say where the features of the first image depend on the other images or on the chunks."""
    alone = model(image[:1])
    with small_chunks():
        cut = model(image)
    for cause, features in {'the rest of the batch': alone, 'the size of chunks': cut}.items():
        for i, (out, other) in enumerate(zip(outs, features)):
            apart = (out[: len(other)] - other).abs().max() / out.std().clamp(min=1e-30)
            if apart > TOLERANCE:
                return f'output {i} depends on {cause}: {apart:.1e} of its std'
    return ''


# Many cases


def draw_cases(count: int, seed: int) -> list[Case]:
    """Draw cases, each architecture as many, sorted so that a backbone is built once."""
    rng = random.Random(seed)
    archs = [(name, arch) for name, backbone in BACKBONES.items() for arch in backbone.ARCHS]
    cases = []
    for number in range(count):
        backbone, arch = archs[number % len(archs)]
        height, width = (draw_side(rng) for _ in range(2))
        cases.append(
            Case(
                backbone,
                arch,
                rng.choice(STAGES),
                rng.choice((1, 1, 2, 3)),
                height,
                width,
                rng.choices(list(PRECISIONS), (4, 2, 2, 2, 2, 2, 2, 0.4, 0.4))[0],
                rng.random() < 0.4,
                rng.choice(LAYOUTS),
                rng.choice(VALUES),
                rng.choice((1, 4)) if rng.random() < 0.03 else 3,
                seed=rng.randrange(2**31),
            )
        )
    return sorted(
        cases, key=lambda case: (case.backbone, case.arch, case.out_indices, case.precision)
    )


def draw_side(rng: random.Random) -> int:
    """Draw a side in pixels: about the smallest that works, or anything up to 288."""
    return rng.randint(1, 40) if rng.random() < 0.15 else round(2 ** rng.uniform(5, 8.17))


def outcome_table(counts: Counter[tuple[str, str, str]]) -> str:
    """Return lines of architecture, precision and how many cases had each outcome."""
    rows = sorted({key[:2] for key in counts})
    cells = []
    for arch, precision in rows:
        found = (str(counts[arch, precision, outcome]) for outcome in OUTCOMES)
        cells.append((arch, precision, *found))
    total = [sum(counts[arch, p, outcome] for arch, p in rows) for outcome in OUTCOMES]
    cells.append(('all', '', *map(str, total)))
    return text_table(('arch', 'precision', *OUTCOMES), cells)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--cases', type=int, default=2000, help='forward passes (default: 2000)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the cases (default: 0)')
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    if args.cases < 1:
        raise UserError(f'--cases {args.cases}: run 1 case or more.')
    start = time.monotonic()
    counts: Counter[tuple[str, str, str]] = Counter()
    for number, case in enumerate(draw_cases(args.cases, args.seed), 1):
        outcome, fault = run(case)
        counts[f'{case.backbone} {case.arch}', case.precision, outcome] += 1
        if fault:
            print(f'{WRONG}: {fault}\n    {case}', file=sys.stderr)
        if number % 100 == 0:
            print(f'[{number}/{args.cases}] {time.monotonic() - start:.0f} s', flush=True)
    print(f'\n{outcome_table(counts)}')
    wrong = sum(count for key, count in counts.items() if key[2] == WRONG)
    print(f'\n{args.cases} cases, {wrong} undocumented, PyTorch {torch.__version__}')
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    main()
