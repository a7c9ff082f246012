"""Builds mmcv by tools/build_mmcv.py and by plain pip, one after the other, and prints both times.

Needs an idle machine and half an hour on two cores. Nothing is installed and no kept wheel is used.

Example:
    python tests/stress/mmcv_build_time.py --stack openmmlab
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))
import build_mmcv  # noqa: E402


def time_ours(pin: str, jobs: int) -> float:
    """Return the seconds of the script's build."""
    start = time.monotonic()
    build_mmcv.build(pin, 'cpu', build_mmcv.build_number('cpu'), jobs=jobs)
    return time.monotonic() - start


def time_pip(pin: str, jobs: int, folder: str) -> float:
    """Return the seconds of `pip wheel` with the same number of compilers."""
    start = time.monotonic()
    subprocess.run(
        [
            *(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-build-isolation', '--no-deps'),
            *('--no-cache-dir', '--no-binary', pin.partition('==')[0], '-w', folder, pin),
        ],
        env=dict(os.environ, MAX_JOBS=str(jobs), CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0'),
        check=True,
    )
    return time.monotonic() - start


def main() -> None:
    """Time both, and print them and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    build_mmcv.add_build_arguments(parser)
    args = parser.parse_args()
    pin = build_mmcv.read_pin(args.stack)
    with tempfile.TemporaryDirectory() as folder:
        build_mmcv.CACHE = Path(folder)
        build_mmcv.fetch_source(pin)
        ours = time_ours(pin, args.jobs)
        plain = time_pip(pin, args.jobs, folder)
    print(f'{pin}, compilers at a time: {args.jobs}')
    print(f'tools/build_mmcv.py {ours:.0f} s, pip wheel {plain:.0f} s, ratio {ours / plain:.2f}')


if __name__ == '__main__':
    main()
