"""Run every architecture on a CUDA device that is not there: devices and dtypes of each operation.

PyTorch's fake tensors know their device, shape and dtype, and hold no numbers, so that no GPU is
needed, only a build of PyTorch for CUDA. Each operation of a forward pass is looked at, and of the
backward pass where there is a GPU: autograd asks the driver for a stream. An operation's tensors
must lie on one device, numbers from the CPU aside. Under autocast, and with
compute_dtype='bfloat16', matmuls, convolutions and attention compute in the low precision; norms,
the residual stream, the features and the gradients are in fp32. Ends with 1 where anything else
happens.

Examples:
    python tests/stress/check_fake_cuda.py
    python tests/stress/check_fake_cuda.py --archs tiny b2_li --size 448
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pvt_mm import PVT, PVTv2, cli
from pvt_mm.apis.complexity import build_on_meta
from pvt_mm.errors import UserError
from pvt_mm.models.layers import Block
from pvt_mm.tables import text_table

ARCHS = (*PVT.ARCHS, *PVTv2.ARCHS)
DEVICE = 'cuda:0'


class Precision(NamedTuple):
    """What matmuls run in, and what says so."""

    dtype: torch.dtype = torch.float32
    autocast: bool = False
    compute_dtype: str | None = None


PRECISIONS = {
    'fp32': Precision(),
    'fp16 autocast': Precision(torch.float16, autocast=True),
    'bf16 autocast': Precision(torch.bfloat16, autocast=True),
    "compute_dtype='bfloat16'": Precision(torch.bfloat16, compute_dtype='bfloat16'),
}
#: Parts of names of operations: those that compute in the precision asked for, and those in fp32.
LOW = ('addmm', 'mm', 'bmm', 'baddbmm', 'convolution', 'attention')
FULL = ('layer_norm',)


class Watch(TorchDispatchMode):
    """Look at the device and dtype of each operation.

    Args:
        dtype: What matmuls, convolutions and attention must compute in.

    Attributes:
        counts: Operations by their kind: ``'matmul'``, ``'norm'`` and ``'other'``.
        faults: What is wrong, in words.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket).removeprefix('aten.').removesuffix('_backward')
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        places = {x.device for x in given + made if x.ndim or x.is_cuda}
        if places - {torch.device(DEVICE)}:
            self.faults.append(f'{name} on {", ".join(sorted(map(str, places)))}')
        low = name in LOW or LOW[-1] in name
        full = any(part in name for part in FULL)
        self.counts['matmul' if low else 'norm' if full else 'other'] += 1
        wanted = self.dtype if low else torch.float32
        if low or full:
            found = {x.dtype for x in given if x.ndim > 1 and x.is_floating_point()}
            if found != {wanted}:
                self.faults.append(f'{name} of {", ".join(sorted(map(str, found)))}')
        return out


@contextlib.contextmanager
def cuda_without_a_gpu() -> Iterator[None]:
    """Have autocast believe that there is a GPU, one with bf16; nothing is ever run on it."""
    # Where it finds no GPU, PyTorch writes its fused attention out, in fp32 unless told otherwise.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with (
        mock.patch('torch.cuda.amp.common.amp_definitely_not_available', lambda: False),
        mock.patch('torch.amp.autocast_mode.torch.cuda.is_bf16_supported', lambda *_: True),
    ):
        yield


def fp32_hook(name: str, faults: list[str]) -> Callable[..., None]:
    """Return a hook that holds what a module returns to fp32."""

    def check(module: nn.Module, inputs: Any, out: Tensor) -> None:
        if out.dtype != torch.float32:
            faults.append(f'{name} returns {out.dtype}')

    return check


def check(arch: str, precision: Precision, size: int) -> tuple[Counter[str], list[str]]:
    """Run a forward pass, and a backward pass where autograd can have one.

    Returns:
        How many operations of each kind there were, and what was wrong with them.
    """
    model: Any = build_on_meta(arch)
    model.compute_dtype = precision.compute_dtype
    watch = Watch(precision.dtype)
    for name, module in model.named_modules():
        if isinstance(module, Block) or name.endswith('patch_embed'):  # the residual stream
            module.register_forward_hook(fp32_hook(name, watch.faults))
    trains = torch.cuda.is_available()
    with cuda_without_a_gpu(), FakeTensorMode(), torch.set_grad_enabled(trains):
        weights = {
            name: torch.empty(parameter.shape, device=DEVICE, requires_grad=trains)
            for name, parameter in model.named_parameters()
        }
        image = torch.empty(2, 3, size, size, device=DEVICE)
        with watch:
            with torch.autocast('cuda', precision.dtype, enabled=precision.autocast):
                features = torch.func.functional_call(model, weights, (image,))
            grads: tuple[Tensor, ...] = ()
            if trains:
                loss = sum(feature.float().mean() for feature in features)
                grads = torch.autograd.grad(loss, list(weights.values()))
        for kind, tensors in (('feature', features), ('gradient', grads)):
            for x in tensors:
                if x.dtype != torch.float32 or x.device != torch.device(DEVICE):
                    watch.faults.append(f'a {kind} of {x.dtype} on {x.device}')
        watch.faults += [
            'a feature that is not contiguous' for x in features if not x.is_contiguous()
        ]
    return watch.counts, watch.faults


def has_cuda_build() -> bool:
    """Tell whether this PyTorch was built for CUDA, with a GPU or without."""
    return torch.version.cuda is not None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--archs', nargs='+', choices=ARCHS, default=ARCHS, metavar='ARCH',
                        help=f'of {", ".join(ARCHS)} (default: all)')  # fmt: skip
    parser.add_argument('--size', type=int, default=224, help='side of the image (default: 224)')
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    if not has_cuda_build():
        raise UserError(
            f'PyTorch {torch.__version__} was built without CUDA: install a build with it, in an '
            'environment of its own; a GPU is not needed.'
        )
    rows, wrong = [], 0
    for arch in args.archs:
        for name, precision in PRECISIONS.items():
            counts, faults = check(arch, precision, args.size)
            for fault, count in Counter(faults).items():
                print(f'{arch}, {name}: {fault} ({count} times)', file=sys.stderr)
            kinds = [str(counts[kind]) for kind in ('matmul', 'norm', 'other')]
            rows.append((arch, name, *kinds, 'wrong' if faults else 'right'))
            wrong += bool(faults)
    header = ('arch', 'precision', 'matmuls, convolutions', 'norms', 'others', 'devices, dtypes')
    print(text_table(header, rows))
    print(f'\n{len(rows)} cases, {wrong} wrong, PyTorch {torch.__version__}')
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    main()
