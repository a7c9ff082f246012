"""Time and memory of the backbone beside other implementations of PVT, with the same weights.

Each row runs pvt_mm and its peers in turn, once a round, each in a process of its own, so that a
slow moment of the machine strikes all of them and nothing else of one strikes another; rounds
before the first that counts warm up and compare the outputs. Times are medians, and a ratio is the
median of the rounds' ratios of peer time to pvt_mm time. Memory is the peak over the loaded model.
The machine must be idle.

Examples:
    python tools/benchmark/benchmark.py --archs small b2 --sizes 224 512 800x1344 --plot cost.png
    python tools/benchmark/benchmark.py --check --csv figures.csv         # all that is promised
    python tools/benchmark/benchmark.py --check --mode train --archs b2   # some of it
    python tools/benchmark/benchmark.py --check --from-csv figures.csv    # judge, measure nothing
    python tools/benchmark/benchmark.py --sweep --archs tiny small        # nowhere slower
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import benchmark_machine as machine
import numpy as np
import torch
from benchmark_peers import ARCHS, COMPILED, OURS, PEERS, Side, has_arch, is_installed
from benchmark_report import (
    Case,
    Row,
    Target,
    append_csv,
    check_targets,
    disturbed,
    plot,
    print_rows,
    read_csv,
    report,
    sweep_targets,
)

from pvt_mm import cli
from pvt_mm.apis.complexity import build_on_meta, multiply_adds
from pvt_mm.cli import parse_size
from pvt_mm.errors import UserError

DTYPES = ('float32', 'bfloat16')
MODES = ('forward', 'train')
#: Largest difference from a peer, root mean square over std: eps differ, and bf16 rounds.
TOLERANCE = {'float32': 1e-3, 'bfloat16': 3e-2}
ROW_SECONDS = 20  # a row takes as many rounds as fit in, within these bounds
MIN_RUNS, MAX_RUNS = 5, 60
MEMORY_RUNS = 3

#: The cases to measure, each with the peers to measure against (the keys, in order).
Work = dict[Case, dict[str, None]]


def start(side: str, case: Case, device: str) -> Side:
    """Start the process of a side of a case."""
    shape = (case.batch, 3, *parse_size(case.size))
    return Side(side, case.arch, shape=shape, dtype=case.dtype, mode=case.mode, device=device)


def check_equal(outs: dict[str, list[np.ndarray]], case: Case) -> None:
    """Compare the outputs of all sides, so that nothing wrong is timed.

    Raises:
        UserError: Where a peer's outputs differ.
    """
    for side, theirs in outs.items():
        for stage, (a, b) in enumerate(zip(outs[OURS], theirs, strict=True)):
            error = np.sqrt(np.square(a - b).mean()) / b.std(ddof=1)
            if not error < TOLERANCE[case.dtype]:
                raise UserError(
                    f'{case}: stage {stage} differs from that of {side} by {error:.1e} of its std, '
                    'so it is not timed; find the fault with the tests.'
                )


def measure(case: Case, peers: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """Time a case on pvt_mm and its peers in turn, then measure their memory."""
    device = args.device
    with ExitStack() as stack:
        sides = {s: stack.enter_context(start(s, case, device)) for s in (OURS, *peers)}
        check_equal({name: side.ask('outputs') for name, side in sides.items()}, case)
        warm_up = sum(side.ask('seconds') for side in sides.values())
        runs = args.runs or min(max(int(ROW_SECONDS / warm_up), MIN_RUNS), MAX_RUNS)
        times: dict[str, list[float]] = {name: [] for name in sides}
        others = machine.OtherLoad(lambda: sum(side.cpu_seconds() for side in sides.values()))
        for _ in range(runs):
            for name, side in sides.items():
                times[name].append(1e3 * side.ask('seconds'))
        other_cores = others.cores()
    memory = {}
    if not args.sweep and machine.can_measure_memory(device):
        # A compiled model's peak would be the compiler's.
        memory = {s: peak_mib(s, case, device) for s in times if not s.endswith(COMPILED)}
    ours = times[OURS]
    share = None
    if case.mode == 'forward' and case.dtype == 'float32' and not args.sweep:
        share = flop_rate(case, statistics.median(ours) / 1e3) / machine.gemm_rate(device)
    return [
        Row(
            *case,
            peer,
            runs,
            *(statistics.median(ours), min(ours), max(ours)),
            *(statistics.median(times[peer]), min(times[peer]), max(times[peer])),
            ratio=statistics.median(b / a for a, b in zip(ours, times[peer])),
            ours_mib=memory.get(OURS),
            peer_mib=memory.get(peer),
            gemm_share=share,
            other_cores=other_cores,
            machine=machine.describe(device),
        )
        for peer in peers
    ]


def flop_rate(case: Case, seconds: float) -> float:
    """Return a forward pass's rate over all its matmuls, in FLOP/s."""
    count = multiply_adds(build_on_meta(case.arch), parse_size(case.size)) * case.batch
    return 2 * count / seconds


def peak_mib(side: str, case: Case, device: str) -> float:
    """Return the peak over the loaded model in MiB, the median of processes that did nothing else.

    What an allocator cannot reuse differs by a tenth from process to process.
    """
    peaks = []
    for _ in range(MEMORY_RUNS):
        with start(side, case, device) as process:
            peaks.append(process.ask('peak_mib'))
    return statistics.median(peaks)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: Any = dict(nargs='+', metavar='NAME')
    parser.add_argument('--archs', **several, help='of PVT and PVTv2 (default: small b2)')
    parser.add_argument('--sizes', **several, help='height x width (default: 224 512 800x1344)')
    parser.add_argument('--batch', type=int, nargs='+', metavar='N', help='images (default: 1)')
    parser.add_argument(
        '--dtype', nargs='+', choices=DTYPES, help='bfloat16: autocast (default: float32)'
    )
    parser.add_argument(
        '--mode', nargs='+', choices=MODES, help='train: backward too (default: forward)'
    )
    parser.add_argument('--peers', **several, help=f'of {", ".join(PEERS)} (default: mmdet)')
    parser.add_argument(
        '--device', choices=('cpu', 'cuda'), default='cpu', help='(default: %(default)s)'
    )
    parser.add_argument(
        '--runs', type=int, help='rounds (default: as many as fit in 20 s, 5 to 60)'
    )
    parser.add_argument('--csv', type=Path, metavar='FILE', help='append the rows to a file')
    parser.add_argument('--from-csv', type=Path, metavar='FILE', help='take rows from a file')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw cost over image size')
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument('--check', action='store_true', help='hold figures against the promised')
    goal.add_argument('--sweep', action='store_true', help='all archs and sizes, at least 1.0')
    parser.add_argument('--anyway', action='store_true', help='measure on a busy machine too')
    return parser.parse_args()


def check_names(args: argparse.Namespace) -> None:
    """Refuse what no backbone, peer or size is called, and write sizes in one way.

    Raises:
        UserError: Naming the first that is unknown.
    """
    for name, known in (('archs', ARCHS), ('peers', PEERS)):
        unknown = [value for value in getattr(args, name) or () if value not in known]
        if unknown:
            raise UserError(f'--{name}: there is no {unknown[0]}; choose of {", ".join(known)}.')
    if args.sizes:
        args.sizes = ['{}x{}'.format(*parse_size(size)) for size in args.sizes]
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: PyTorch sees no GPU; measure with --device cpu.')


def wanted(args: argparse.Namespace) -> list[Target]:
    """Return what ``--check`` or ``--sweep`` asks for, as far as the other arguments allow it.

    Raises:
        UserError: Where nothing is left.
    """
    limits = (args.archs, args.sizes, args.batch, args.dtype, args.mode, args.peers)
    targets = []
    for target in sweep_targets() if args.sweep else check_targets():
        values = (*target.case, target.peer)
        if all(not limit or value in limit for value, limit in zip(values, limits)):
            targets.append(target)
    for peer in sorted({target.peer for target in targets if not is_installed(target.peer)}):
        print(f'{peer} is not installed, so its rows are left out.')
    targets = [target for target in targets if is_installed(target.peer)]
    if not targets:
        raise UserError('No row to be reached is left; give fewer of --archs, --sizes and so on.')
    return targets


def asked(args: argparse.Namespace) -> Work:
    """Return the cases that the arguments span."""
    cases = itertools.product(
        args.archs or ('small', 'b2'),
        args.sizes or ('224x224', '512x512', '800x1344'),
        args.batch or (1,),
        args.dtype or DTYPES[:1],
        args.mode or MODES[:1],
    )
    peers = args.peers or ['mmdet']
    return {Case(*c): {peer: None for peer in peers if has_arch(peer, c[0])} for c in cases}


@cli.main_errors
def main() -> None:
    args = parse_args()
    check_names(args)
    targets = wanted(args) if args.check or args.sweep else []
    cases = asked(args) if not targets else {}
    for target in targets:
        cases.setdefault(target.case, {})[target.peer] = None
    rows = read_csv(args.from_csv) if args.from_csv else measure_all(cases, args)
    if args.plot:
        plot(args.plot, rows)
    if targets and not report(targets, rows, brief=args.sweep):
        sys.exit(1)


def measure_all(cases: Work, args: argparse.Namespace) -> list[Row]:
    """Measure case by case, and print and save each one's rows at once."""
    if not args.anyway:
        machine.check_idle()
    print(machine.describe(args.device), flush=True)
    rows = []
    for case, peers in cases.items():
        if not peers:
            print(f'{case}: none of the peers has it.')
            continue
        new = measure(case, list(peers), args)
        for row in new:
            flag = f', DISTURBED by {row.other_cores:.1f} cores' if disturbed(row) else ''
            print(f'{case} against {row.peer}: {row.ratio:.2f}{flag}', flush=True)
        if args.csv:
            append_csv(args.csv, new)
        rows += new
    print_rows(rows)
    return rows


if __name__ == '__main__':
    main()
