"""Measure what it costs to ask whether the CPU fast path applies, as a share of a block.

Each first block of a stage of PVT-Small and PVTv2-B2 is timed at 224 x 224, in evaluation and in
training, and so is `fast.applies` on it. Medians; run it while nothing else runs. Ends with 1 where
the share is 1% or more.

Example:
    python tests/stress/question_cost.py --calls 200
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from pvt_mm import PVT, PVTv2, cli
from pvt_mm.archs import STRIDES
from pvt_mm.models import fast
from pvt_mm.tables import text_table

SIDE = 224
LIMIT = 0.01


def median_time(function: Callable[[], Any], calls: int) -> float:
    """Return the median seconds of a call, after a tenth as many to warm up."""
    times = []
    for number in range(calls + calls // 10):
        start = time.perf_counter()
        function()
        if number >= calls // 10:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(arch: str, training: bool, calls: int) -> list[tuple[int, float, float]]:
    """Return each stage's number, the seconds of the question, and those of a block."""
    cls = PVT if arch in PVT.ARCHS else PVTv2
    model: Any = cls(arch).train(training)
    rows, stride = [], 1
    with torch.set_grad_enabled(training):
        for number, stage in enumerate(model.stages, 1):
            stride *= STRIDES[number - 1]
            x = torch.randn(1, SIDE // stride, SIDE // stride, stage.dim)
            block = stage.blocks[0]
            question = median_time(lambda: fast.applies(block, x, fast.is_known_block), 10 * calls)  # noqa: B023
            rows.append((number, question, median_time(lambda: block(x), calls)))  # noqa: B023
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--calls', type=int, default=200, help='of a block (default: 200)')
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    rows, worst = [], 0.0
    for arch in ('small', 'b2'):
        for training in (False, True):
            for number, question, block in measure(arch, training, args.calls):
                worst = max(worst, question / block)
                rows.append((
                    arch, 'training' if training else 'evaluation', str(number),
                    f'{1e6 * question:.1f}', f'{1e6 * block:.0f}', f'{question / block:.2%}',
                ))  # fmt: skip
    header = ('arch', 'mode', 'stage', 'question, us', 'block, us', 'share')
    print(text_table(header, rows))
    print(f'\nat most {worst:.2%}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}')
    sys.exit(1 if worst >= LIMIT else 0)


if __name__ == '__main__':
    main()
