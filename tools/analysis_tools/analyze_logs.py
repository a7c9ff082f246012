"""Compare trainings by what they logged: a table, and a picture of their curves.

Reads the scalars of work dirs of mmengine, those of resumed trainings joined.

Example:
    python tools/analysis_tools/analyze_logs.py work_dirs/run_a work_dirs/run_b --out curves.png
"""

import argparse
import sys
from pathlib import Path

from pvt_mm import cli
from pvt_mm.errors import UserError
from pvt_mm.tables import text_table
from pvt_mm.visualization import logs

PICTURES = ('.png', '.pdf', '.svg')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='of a training')
    parser.add_argument('-o', '--out', metavar='FILE', help='draw the curves: .png, .pdf or .svg')
    parser.add_argument('--csv', metavar='FILE', help='write the figures, one row a run')
    return parser.parse_args()


def check_out(file: str | None) -> None:
    """Check that a file can be written, before anything is."""
    if file and not Path(file).parent.is_dir():
        raise UserError(f'There is no folder {Path(file).parent}; make it first.')


@cli.main_errors
def main() -> None:
    args = parse_args()
    check_out(args.out)
    check_out(args.csv)
    if args.out and Path(args.out).suffix not in PICTURES:
        raise UserError(f'--out {args.out}: end the name in {", ".join(PICTURES)}.')
    names = logs.run_names(args.work_dirs)
    runs = [logs.read_run(*place) for place in zip(args.work_dirs, names)]
    for run in runs:
        if run.skipped:
            print(f'warning: {run.name}: skipped {run.skipped} broken line(s)', file=sys.stderr)
    print(text_table(*logs.table(runs)))
    if args.out:
        logs.plot_runs(runs, args.out)
        print(f'wrote {args.out}')
    if args.csv:
        figures = [logs.summary(run) for run in runs]
        names = list(dict.fromkeys(name for row in figures for name in row))
        cli.write_csv(args.csv, names, [[row.get(name) for name in names] for row in figures])
        print(f'wrote {args.csv}')


if __name__ == '__main__':
    main()
