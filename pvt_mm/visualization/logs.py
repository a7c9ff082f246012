"""What trainings logged: figures and curves of one or several work dirs.

mmdet's analyze_logs plots keys of single log files. This joins the starts of a resumed training,
puts scores at their iterations, and compares trainings in a table.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines
from matplotlib.figure import Figure

from pvt_mm.errors import UserError

INK, MUTED, ACCENT = '#1f2933', '#7b8794', '#1d6fd8'
COLOURS = (ACCENT, '#d9822b', '#0f7b45', '#a23b8f', '#7b6a3a', '#2aa1b3', '#d64545', '#52606d')
STYLE: Any = {
    'axes.edgecolor': '#cbd2d9',
    'axes.grid': True,
    'axes.labelcolor': MUTED,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlecolor': INK,
    'axes.titlesize': 11,
    'font.size': 9,
    'grid.color': '#e4e7eb',
    'savefig.dpi': 130,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
}
#: Scores by the end of their names, the most important first; higher is better.
MAIN_SCORES = ('bbox_mAP', 'segm_mAP', 'mIoU', 'PQ', 'accuracy/top1', 'mAcc', 'aAcc')
#: What an evaluation logs besides scores.
NO_SCORES = ('step', 'time', 'data_time', 'epoch', 'iter', 'memory')

Curve = list[tuple[int, float]]


@dataclass
class Run:
    """A training with all its starts joined.

    Args:
        name: For legends and tables.
        steps: Log entries of the training, by iteration.
        scores: Log entries of evaluations, by iteration.
        skipped: Number of lines that could not be read.
    """

    name: str
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)
    skipped: int = 0

    def curve(self, key: str) -> Curve:
        """Return (iteration, value) of what was logged as ``key``, in order."""
        rows = self.steps if any(key in row for row in self.steps.values()) else self.scores
        return [(step, float(rows[step][key])) for step in sorted(rows) if _number(rows[step], key)]

    def score_names(self) -> list[str]:
        """Return the main scores of the evaluations; without one, their first score."""
        names = {
            key: None
            for row in self.scores.values()
            for key in row
            if key not in NO_SCORES and _number(row, key)
        }
        main = [key for end in MAIN_SCORES for key in names if f'/{key}'.endswith(f'/{end}')]
        return main or list(names)[:1]


# Reading


def read_run(work_dir: str | Path, name: str = '') -> Run:
    """Read what mmengine logged in a training and in its resumed starts.

    A later start replaces the entries of earlier ones from its first iteration on.

    Args:
        work_dir: Of a training.
        name: For legends and tables (default: the folder's).

    Raises:
        UserError: Where there is no such folder, or it holds no logged iterations.
    """
    folder = Path(work_dir)
    if not folder.is_dir():
        raise UserError(f'There is no folder {folder}; give the --work-dir of a training.')
    # Folders are named by the time of their start.
    files = sorted(folder.glob('*/vis_data/scalars.json')) or list(
        folder.glob('vis_data/scalars.json')
    )
    run = Run(name or folder.resolve().name)
    for file in files:
        _join(run, file)
    if not run.steps and not run.scores:
        found = f'{len(files)} file(s) without an entry' if files else 'no vis_data/scalars.json'
        raise UserError(f'{folder} holds {found}; give the --work-dir of a training.')
    return run


def _join(run: Run, file: Path) -> None:
    """Add a start of a training to the starts before it."""
    entries, skipped = _entries(file)
    run.skipped += skipped
    trained = [entry['step'] for entry in entries if 'loss' in entry]
    last = max(run.steps, default=0)
    if trained:
        first = min(trained)
        run.steps = {step: row for step, row in run.steps.items() if step < first}
        run.scores = {step: row for step, row in run.scores.items() if step < first}
        last = max(run.steps, default=0)
    # In trainings by epoch, evaluations log the epoch: they get the iteration before them.
    by_epoch = any('epoch' in entry for entry in entries)
    for entry in entries:
        if 'loss' in entry:
            last = entry['step']
            run.steps[last] = entry
        elif any(key not in NO_SCORES for key in entry):
            run.scores[last if by_epoch or not trained else entry['step']] = entry


def _entries(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a file and the number of its broken lines."""
    entries, skipped = [], 0
    for line in file.read_text(encoding='utf-8', errors='replace').splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and type(entry.get('step')) is int:
            entries.append(entry)
        else:
            skipped += 1
    return entries, skipped


def _number(row: dict[str, Any], key: str) -> bool:
    return isinstance(row.get(key), (int, float)) and not isinstance(row[key], bool)


def run_names(work_dirs: Sequence[str | Path]) -> list[str]:
    """Return the shortest ends of paths that differ from each other."""
    paths = [Path(work_dir).resolve() for work_dir in work_dirs]
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ['/'.join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


# Figures


def summary(run: Run) -> dict[str, Any]:
    """Return the figures of a run; None for what was not logged."""
    losses = run.curve('loss')
    finite = [(value, step) for step, value in losses if math.isfinite(value)]
    times = [value for _, value in run.curve('time') if math.isfinite(value)]
    memory = [value for _, value in run.curve('memory')]
    low, low_step = min(finite, default=(None, None))
    row: dict[str, Any] = {
        'run': run.name,
        'iterations': max([*run.steps, *run.scores], default=0),
        'epochs': max((int(value) for _, value in run.curve('epoch')), default=None),
        'first_loss': losses[0][1] if losses else None,
        'last_loss': losses[-1][1] if losses else None,
        'min_loss': low,
        'min_loss_at': low_step,
        'seconds_per_iteration': statistics.median(times) if times else None,
        'hours': _hours(run) if times else None,
        'peak_memory_mb': max(memory, default=None),
    }
    for key in run.score_names():
        values = [(value, -step) for step, value in run.curve(key) if math.isfinite(value)]
        if values:
            best, step = max(values)
            row[f'best {key}'], row[f'best {key} at'] = best, -step
    return row


def _hours(run: Run) -> float:
    """Return the hours in training: an entry's time is a mean since the last entry."""
    total, last = 0.0, 0
    for step, seconds in run.curve('time'):
        total += (step - last) * seconds if math.isfinite(seconds) else 0.0
        last = step
    return total / 3600


def table(runs: Iterable[Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the names of the columns, and a row of text for each run."""
    head: tuple[str, ...] = (
        'run', 'iterations', 'epochs', 'loss first', 'last', 'min', 'best score', 's/iteration',
        'hours', 'MB peak',
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for run in runs:
        row = summary(run)
        best = [
            f'{key.split("/", 1)[-1]} {row[f"best {key}"]:.4g} at {row[f"best {key} at"]}'
            for key in run.score_names()
            if f'best {key}' in row
        ]
        cells = (
            run.name,
            str(row['iterations']),
            _text(row['epochs'], 'd'),
            _text(row['first_loss'], '.4g'),
            _text(row['last_loss'], '.4g'),
            _text(row['min_loss'], '.4g'),
            ', '.join(best) or '-',
            _text(row['seconds_per_iteration'], '.3f'),
            _text(row['hours'], '.2f'),
            _text(row['peak_memory_mb'], '.0f'),
        )
        rows.append(cells)
    return head, rows


def _text(value: Any, form: str) -> str:
    return '-' if value is None else format(value, form)


# Pictures


def plot_runs(runs: Sequence[Run], out: str | Path) -> None:
    """Draw what runs logged: one panel per quantity, one colour per run."""
    scores = list(dict.fromkeys(key for run in runs for key in run.score_names()))
    scores.sort(key=lambda key: next(
        (i for i, end in enumerate(MAIN_SCORES) if key.endswith(end)), len(MAIN_SCORES)
    ))  # fmt: skip
    panels = [('loss', 'training loss')]
    panels += [(key, f'{key.split("/", 1)[-1]} in validation') for key in scores[:3]]
    panels += [('lr', 'learning rate'), ('time', 'time per iteration (s)')]
    panels += [('memory', 'peak memory (MB)')]
    panels = [(key, title) for key, title in panels if any(run.curve(key) for run in runs)]
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.4), layout='constrained')
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes, (key, title) in zip(grid.flat, panels):
            for number, run in enumerate(runs):
                plot_curve(axes, run.curve(key), COLOURS[number % len(COLOURS)], key in scores)
            axes.set_title(title)
            axes.set_ylim(0, None)
            axes.ticklabel_format(axis='y', scilimits=(-2, 5))
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for column in range(columns):
            lowest = [axes for axes in grid[:, column] if axes.get_visible()][-1]
            lowest.set_xlabel('iteration')
            lowest.tick_params(labelbottom=True)
        handles = [
            matplotlib.lines.Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2.5)
            for i in range(len(runs))
        ]
        figure.legend(
            handles, [run.name for run in runs], loc='outside upper center',
            ncols=min(len(runs), 4), frameon=False,
        )  # fmt: skip
        figure.savefig(out)


def plot_curve(axes: Any, curve: Curve, colour: str = ACCENT, marked: bool = False) -> None:
    """Draw a curve; a long one in a light colour, with its running median over it."""
    if not curve:
        return
    steps, values = zip(*curve)
    marker = dict(marker='o', markersize=4) if marked else {}
    if marked or len(curve) < 100:
        axes.plot(steps, values, color=colour, linewidth=1.8, **marker)
        return
    half = max(len(values) // 100, 2)
    smooth = [
        statistics.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))
    ]
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth, color=colour, linewidth=1.8)
