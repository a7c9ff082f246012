"""Figures of the benchmark: what they must reach, how they are kept, printed and drawn."""

import csv
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_machine import BUSY
from benchmark_peers import ARCHS, COMPILED, OURS, has_arch

from pvt_mm.cli import parse_size, print_table
from pvt_mm.errors import UserError


class Case(NamedTuple):
    """One workload: a batch forward, or forward and backward."""

    arch: str
    size: str
    batch: int = 1
    dtype: str = 'float32'
    mode: str = 'forward'

    def __str__(self) -> str:
        """Return the name in tables."""
        return f'{self.mode} {self.arch} {self.batch}x{self.size} {self.dtype}'


class Target(NamedTuple):
    """What a row must reach; memory is a share of the peer's."""

    case: Case
    peer: str
    least: float
    aim: float | None = None
    memory: float | None = None
    figure: str = 'ratio'  # or 'gemm_share'

    @property
    def name(self) -> tuple[str, str]:
        """The work, and against what."""
        return str(self.case), self.peer if self.figure == 'ratio' else 'best GEMM rate'


@dataclasses.dataclass
class Row:
    """A case against one peer; None where a figure was not measured."""

    arch: str
    size: str
    batch: int
    dtype: str
    mode: str
    peer: str
    runs: int
    ours_ms: float
    ours_ms_low: float
    ours_ms_high: float
    peer_ms: float
    peer_ms_low: float
    peer_ms_high: float
    ratio: float
    ours_mib: float | None = None
    peer_mib: float | None = None
    gemm_share: float | None = None
    other_cores: float | None = None
    machine: str = ''

    @property
    def case(self) -> Case:
        """What was run."""
        return Case(self.arch, self.size, self.batch, self.dtype, self.mode)

    @property
    def memory(self) -> float | None:
        """Peak memory as a share of the peer's."""
        return self.ours_mib / self.peer_mib if self.ours_mib and self.peer_mib else None


#: (least, aim, most memory) of small and of b2 against mmdet.
_PROMISES = {
    ('800x1344', 'float32', 'forward'): ((3.1, 3.6, 0.18), (3.4, 3.8, 0.22)),
    ('512x512', 'float32', 'forward'): ((2.0, 2.6, 0.4), (2.1, 2.6, 0.4)),
    ('224x224', 'float32', 'forward'): ((1.25, 1.8, None), (1.3, 1.7, None)),
    ('800x1344', 'bfloat16', 'forward'): ((3.7, 4.4, 0.2), (3.8, 4.4, 0.2)),
    ('512x512', 'float32', 'train'): ((1.3, 1.7, 0.6), (1.4, 1.7, 0.6)),
    ('800x1344', 'float32', 'train'): ((1.8, 2.3, 0.35), (1.8, 2.3, 0.35)),
}


def check_targets() -> Iterator[Target]:
    """Yield the rows of ``--check``."""
    for (size, dtype, mode), figures in _PROMISES.items():
        for arch, figure in zip(('small', 'b2'), figures):
            yield Target(Case(arch, size, 1, dtype, mode), 'mmdet', *figure)
        for peer in ('huggingface', 'timm'):
            yield Target(Case('b2', size, 1, dtype, mode), peer, 1.0)
    for arch in ('small', 'b2'):
        case = Case(arch, '800x1344')
        yield Target(case, f'mmdet{COMPILED}', 1.6)
        yield Target(case, 'mmdet', 0.55, 0.75, figure='gemm_share')


def sweep_targets() -> Iterator[Target]:
    """Yield the rows of ``--sweep``; mmdet lacks b2_li, which meets Hugging Face's instead."""
    for arch in ARCHS:
        peer = 'mmdet' if has_arch('mmdet', arch) else 'huggingface'
        for size, batch in itertools.product(('64x64', '224x224', '512x512'), (1, 2, 8)):
            yield Target(Case(arch, size, batch), peer, 1.0)
        yield Target(Case(arch, '800x1344'), peer, 1.0)
        if arch in ('tiny', 'b0'):
            yield Target(Case(arch, '1600x1600'), peer, 1.0)


def judge(target: Target, row: Row | None) -> str:
    """Say how a row stands: ``aim``, ``least``, ``SHORT`` or ``not measured``."""
    figure = getattr(row, target.figure) if row else None
    memory = row.memory if row and target.memory else 0.0
    if figure is None or memory is None:
        return 'not measured'
    if figure < target.least or memory > (target.memory or 0.0):
        return 'SHORT'
    return 'aim' if figure >= (target.aim or target.least) else 'least'


def report(targets: Sequence[Target], rows: Sequence[Row], brief: bool) -> bool:
    """Print how each target stands, or only those not reached, and whether all are.

    Where a row was measured several times, the last counts.
    """
    found = {(row.case, row.peer): row for row in rows}
    lines, verdicts = [], []
    for target in targets:
        row = found.get((target.case, target.peer))
        verdicts.append(judge(target, row))
        if brief and verdicts[-1] in ('aim', 'least'):
            continue
        measured = getattr(row, target.figure) if row else None
        memory = row.memory if row and target.memory else None
        figures = (target.least, target.aim, measured, target.memory, memory)
        lines.append([*target.name, *map(number, figures), verdicts[-1]])
    if lines:
        head = ['work', 'against', 'least', 'aim', 'measured']
        print_table([*head, 'memory at most', 'memory', 'verdict'], lines)
    for target, verdict in zip(targets, verdicts):
        if verdict == 'SHORT':
            print(f'falls short: {" against ".join(target.name)}')
    counts = {verdict: verdicts.count(verdict) for verdict in ('aim', 'least', 'SHORT')}
    print(
        f'{len(targets)} rows: {counts["aim"]} reach the aim, {counts["least"]} the least, '
        f'{counts["SHORT"]} fall short, {verdicts.count("not measured")} not measured.'
    )
    return counts['aim'] + counts['least'] == len(targets)


def number(value: float | None) -> str:
    return '-' if value is None else f'{value:.2f}'


def print_rows(rows: Sequence[Row]) -> None:
    """Print the figures of all rows."""
    head = ['work', 'against', 'pvt_mm ms (range)', 'peer ms (range)', 'ratio']
    head += ['pvt_mm MiB', 'peer MiB', 'memory', 'GEMM share', 'other load']
    lines = [
        [
            str(row.case),
            row.peer,
            f'{row.ours_ms:.1f} ({row.ours_ms_low:.1f} to {row.ours_ms_high:.1f})',
            f'{row.peer_ms:.1f} ({row.peer_ms_low:.1f} to {row.peer_ms_high:.1f})',
            *map(number, (row.ratio, row.ours_mib, row.peer_mib, row.memory, row.gemm_share)),
            number(row.other_cores) + (' DISTURBED' if disturbed(row) else ''),
        ]
        for row in rows
    ]
    print_table(head, lines)


def disturbed(row: Row) -> bool:
    """Tell whether other processes were busy while a row was timed."""
    return (row.other_cores or 0.0) > BUSY


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, with a head where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    """Read what :func:`append_csv` wrote.

    Raises:
        UserError: Where the file is missing or another one.
    """
    if not path.is_file():
        raise UserError(f'There is no file {path}; --csv writes one.')
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}

    def value(name: str, text: str) -> Any:
        if kinds[name] in (int, str):
            return kinds[name](text)  # type: ignore[operator]
        return float(text) if text else None

    with path.open(newline='') as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(kinds):
            raise UserError(f'{path} is not a file that --csv wrote; its columns differ.')
        return [Row(**{name: value(name, text) for name, text in row.items()}) for row in reader]


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw time and memory over the image size: a column per arch, a line per side."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    archs = list(dict.fromkeys(row.arch for row in rows))
    figure, grid = plt.subplots(
        2, len(archs), figsize=(4.2 * len(archs) + 1, 6.4), layout='constrained', squeeze=False
    )
    for column, arch in enumerate(archs):
        lines: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row.arch == arch:
                lines.setdefault(OURS, {})[row.size] = (row.ours_ms / 1e3, row.ours_mib)
                lines.setdefault(row.peer, {})[row.size] = (row.peer_ms / 1e3, row.peer_mib)
        for index, axes in enumerate(grid[:, column]):
            sizes = sorted({size for points in lines.values() for size in points}, key=pixels)
            for side, points in lines.items():
                xs = [size for size in sizes if size in points and points[size][index]]
                ys = [points[size][index] for size in xs]
                axes.plot([pixels(size) for size in xs], ys, 'o-', markersize=4, label=side)
            axes.set(xscale='log', yscale='log', ylabel=('seconds', 'MiB over the model')[index])
            axes.set_xticks([pixels(size) for size in sizes], sizes, fontsize=8)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter('%g'))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.spines[['top', 'right']].set_visible(False)
        grid[0, column].set_title(arch)
    grid[0, -1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def pixels(size: str) -> int:
    height, width = parse_size(size)
    return height * width
