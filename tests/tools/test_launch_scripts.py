"""The shell launchers: what they run, and how they refuse."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'
SCRIPTS = sorted(path.name for path in TOOLS.glob('*.sh'))
LAUNCH_VARIABLES = (
    'NNODES',
    'NODE_RANK',
    'MASTER_ADDR',
    'PORT',
    'OMP_NUM_THREADS',
    'GPUS',
    'GPUS_PER_NODE',
    'CPUS_PER_TASK',
    'SRUN_ARGS',
)
pytestmark = pytest.mark.skipif(shutil.which('bash') is None, reason='the launchers need bash')


@pytest.fixture
def run(tmp_path):
    """Run a launcher from a folder with a space; python and srun print their arguments."""
    tools = tmp_path / 'a clone' / 'tools'
    tools.mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(TOOLS / name, tools)
    fakes = tmp_path / 'bin'
    fakes.mkdir()
    say = 'printf "%s\\n" "$@"'
    # `python -c` is real: it is how a launcher looks for a free port.
    (fakes / 'python').write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" "$@"\n{say}\n'
    )
    (fakes / 'srun').write_text(f'#!/bin/sh\n{say}\n')
    for fake in fakes.iterdir():
        fake.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}

    def call(script, *arguments, **environment):
        done = subprocess.run(
            ['bash', str(tools / script), *arguments],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            env={**clean, 'PATH': f'{fakes}{os.pathsep}{clean["PATH"]}', **environment},
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    call.tools = tools
    return call


def after(words, start):
    """The words from `start` on."""
    return words[words.index(str(start)) :]


@pytest.mark.parametrize('script', SCRIPTS)
def test_syntax(script):
    """Every launcher parses."""
    subprocess.run(['bash', '-n', str(TOOLS / script)], check=True)


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', ['config.py']),
        ('dist_test.sh', ['config.py', '2']),
        ('slurm_train.sh', ['partition', 'job']),
        ('slurm_test.sh', ['partition', 'job', 'config.py']),
        ('dist_launch.sh', []),
        ('slurm_launch.sh', []),
    ],
)
def test_too_few_arguments(run, script, arguments):
    """A missing argument gives the usage line and exit code 1, and starts nothing."""
    code, out, err = run(script, *arguments)
    assert code == 1
    assert out == []
    assert 'usage: bash tools/' + script in err
    assert len(err.splitlines()) == 1


def test_dist_train(run):
    """Arguments with spaces arrive whole, on one machine and with a free port."""
    code, out, _ = run('dist_train.sh', 'my configs/a.py', '2', '--work-dir', 'to here')
    assert code == 0
    assert out[:2] == ['-m', 'torch.distributed.run']
    assert {'--nnodes=1', '--node_rank=0', '--nproc_per_node=2'} < set(out)
    assert '--master_addr=127.0.0.1' in out
    port = next(word for word in out if word.startswith('--master_port='))
    assert 1024 <= int(port.partition('=')[2]) <= 65535
    assert after(out, run.tools / 'train.py') == [
        str(run.tools / 'train.py'),
        'my configs/a.py',
        '--work-dir',
        'to here',
        '--launcher',
        'pytorch',
    ]


def test_dist_test(run):
    """The checkpoint comes before the number of processes; PORT is taken as given."""
    code, out, _ = run('dist_test.sh', 'a.py', 'last one.pth', '8', PORT='29511')
    assert code == 0
    assert {'--nproc_per_node=8', '--master_port=29511'} < set(out)
    assert after(out, run.tools / 'test.py') == [
        str(run.tools / 'test.py'),
        'a.py',
        'last one.pth',
        '--launcher',
        'pytorch',
    ]


def test_two_machines(run):
    """NNODES, NODE_RANK and MASTER_ADDR reach torchrun, and all machines agree on the port."""
    machines = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.7')
    code, out, _ = run('dist_train.sh', 'a.py', '8', **machines)
    assert code == 0
    assert {'--nnodes=2', '--node_rank=1'} < set(out)
    assert {'--master_addr=10.0.0.7', '--master_port=29500'} < set(out)


@pytest.mark.parametrize(
    ('gpus', 'environment', 'message'),
    [
        ('two', {}, "not 'two'"),
        ('0', {}, "not '0'"),
        ('2', dict(NNODES='x'), "NNODES must be a positive integer, not 'x'"),
        ('2', dict(NNODES='2'), 'needs MASTER_ADDR'),
        ('2', dict(PORT='http'), "PORT must be a number below 65536, not 'http'"),
        ('2', dict(PORT='70000'), "not '70000'"),
    ],
)
def test_bad_numbers(run, gpus, environment, message):
    """A wrong number of processes, a port that is none, half an address: refused in a sentence."""
    code, out, err = run('dist_train.sh', 'a.py', gpus, **environment)
    assert (code, out) == (1, [])
    assert err.startswith('error: ')
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize('environment', [{}, dict(NNODES='2', NODE_RANK='0', MASTER_ADDR='a')])
def test_a_busy_port_is_named(run, environment):
    """A port that something else listens at is refused, with the way out."""
    with socket.create_server(('', 0)) as server:
        port = str(server.getsockname()[1])
        code, out, err = run('dist_train.sh', 'a.py', '2', PORT=port, **environment)
    assert (code, out) == (1, [])
    assert f'error: port {port} cannot be used (Address already in use)' in err
    assert 'without PORT, a free one is taken' in err and len(err.splitlines()) == 1


def test_the_port_is_the_first_machines_affair(run):
    """The others do not listen, so what listens there is no matter to them."""
    with socket.create_server(('', 0)) as server:
        port = str(server.getsockname()[1])
        code, out, _ = run(
            'dist_train.sh', 'a.py', '2', PORT=port, NNODES='2', NODE_RANK='1', MASTER_ADDR='a'
        )
    assert code == 0 and f'--master_port={port}' in out


def test_slurm_train(run):
    """One task a GPU, no more GPUS_PER_NODE than GPUS, and SRUN_ARGS split at spaces."""
    code, out, _ = run(
        'slurm_train.sh',
        'gpu',
        'my job',
        'a b.py',
        '--amp',
        GPUS='4',
        SRUN_ARGS='--time=1:00 --quiet',
    )
    assert code == 0
    assert {
        '--job-name=my job',
        '--ntasks=4',
        '--ntasks-per-node=4',
        '--gres=gpu:4',
        '--cpus-per-task=5',
        '--time=1:00',
        '--quiet',
    } < set(out)
    assert out[:2] == ['-p', 'gpu']
    assert after(out, run.tools / 'train.py') == [
        str(run.tools / 'train.py'),
        'a b.py',
        '--amp',
        '--launcher',
        'slurm',
    ]


def test_slurm_test(run):
    """Sixteen GPUs are two machines of eight; config and checkpoint reach test.py."""
    code, out, _ = run('slurm_test.sh', 'gpu', 'job', 'a.py', 'b.pth', GPUS='16', CPUS_PER_TASK='3')
    assert code == 0
    assert {'--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8', '--cpus-per-task=3'} < set(out)
    assert after(out, run.tools / 'test.py') == [
        str(run.tools / 'test.py'),
        'a.py',
        'b.pth',
        '--launcher',
        'slurm',
    ]
