"""Fixtures: the generated data set, and the tools run inside this process."""

import copy
import functools
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.utils import ManagerMixin
from reference import REPO, SMALL

from pvt_mm.config import load_config, set_data_root
from pvt_mm.engine import runtime

#: What makes a demo config small enough for a test, besides its backbone.
SHORT = """
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)
test_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)
"""
DETECTION = """
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
"""
RETINANET = """
model = dict(
    test_cfg=dict(score_thr=0.0, max_per_img=5),
    neck=dict(out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1))
"""
MASK_RCNN = """
model = dict(
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)),
    neck=dict(out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        mask_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64),
        mask_head=dict(in_channels=32, num_convs=1, conv_out_channels=32)))
"""
SEMANTIC_FPN = """
train_cfg = dict(max_iters=3, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=3), logger=dict(interval=1))
model = dict(
    neck=dict(out_channels=32), decode_head=dict(in_channels=[32, 32, 32, 32], channels=32))
"""
TASKS = {
    'det': ('demo_retinanet_pvt_t.py', 'PVT', DETECTION + RETINANET),
    'ins': ('demo_mask_rcnn_pvt_v2_b0.py', 'PVTv2', DETECTION + MASK_RCNN),
    'seg': ('demo_fpn_pvt_t.py', 'PVT', SEMANTIC_FPN),
}


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory):
    """A small generated data set, in COCO's layout (coco) and ADE20K's (ade)."""
    root = tmp_path_factory.mktemp('data')
    make = [sys.executable, 'tools/demo/make_demo_data.py', '--out', str(root / 'demo')]
    subprocess.run([*make, '--train', '6', '--val', '2'], cwd=REPO, check=True)
    return root / 'demo'


def write_config(folder, task, extra=''):
    """Write a demo config with a small backbone and head, and return its path."""
    base, backbone, schedule = TASKS[task]
    path = folder / f'{task}.py'
    path.write_text(
        f'_base_ = {str(REPO / "configs" / base)!r}\n{SHORT}{schedule}\n'
        f'model["backbone"] = dict(_delete_=True, type={backbone!r}, arch={SMALL!r})\n'
        f'model["neck"]["in_channels"] = {list(SMALL["dims"])!r}\n{extra}\n'
    )
    return path


@pytest.fixture
def small_config(tmp_path):
    """Write a small config: small_config('det') -> its path."""
    return functools.partial(write_config, tmp_path)


@pytest.fixture(scope='session')
def config(tmp_path_factory):
    """Load each task's small config once: config('det', ROOT) -> a copy with its data there."""
    folder = tmp_path_factory.mktemp('configs')
    load = functools.cache(lambda task: load_config(str(write_config(folder, task))))

    def copied(task, root):
        cfg = copy.deepcopy(load(task))
        set_data_root(cfg, str(root))
        return cfg

    return copied


def forget_runs(cls):
    """Drop the loggers and visualisers that mmengine keeps for the life of a process."""
    getattr(cls, '_instance_dict', {}).clear()
    for child in cls.__subclasses__():
        forget_runs(child)


def load_tool(name):
    """Import a tool of any folder as a module."""
    (file,) = [*REPO.glob(f'tools/**/{name}.py'), *REPO.glob(f'tests/stress/{name}.py')]
    spec = importlib.util.spec_from_file_location(f'tool_{name}', file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # tools import their neighbours
        patch.syspath_prepend(str(file.parent))
        spec.loader.exec_module(module)
    return module


def run_main(folder, name, *arguments):
    """Run a tool's main in this process and in a folder."""
    forget_runs(ManagerMixin)
    module = load_tool(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
        module.main()


@pytest.fixture
def run_tool(tmp_path):
    """Run a tool in an empty folder: run_tool('train', CONFIG, ...)."""
    return functools.partial(run_main, tmp_path)


@pytest.fixture
def failing(run_tool, capsys):
    """Run a tool that must fail: failing('train', ...) -> what it prints."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            run_tool(*arguments)
        assert stop.value.code == 1
        captured = capsys.readouterr()
        assert 'Traceback' not in captured.err
        (line,) = [line for line in captured.err.splitlines() if line.startswith('error: ')]
        assert captured.err.rstrip().endswith(line), 'one line, and the last'
        return line

    return run


class Trained(NamedTuple):
    """A finished short training; copy the work dir before going on in it."""

    config: Path
    data: tuple
    work_dir: Path
    checkpoint: Path


@pytest.fixture(scope='session')
def trained(tmp_path_factory, demo_data):
    """Train a task once for three iterations with seed 1: trained('det')."""

    @functools.cache
    def run(task):
        folder = tmp_path_factory.mktemp(f'trained_{task}')
        config = write_config(folder, task)
        data = ('--data-root', demo_data / ('ade' if task == 'seg' else 'coco'))
        work_dir = folder / 'run'
        run_main(folder, 'train', config, *data, '--work-dir', work_dir, '--seed', 1)
        name = 'iter_3.pth' if task == 'seg' else 'epoch_1.pth'
        return Trained(config, data, work_dir, work_dir / name)

    return run


def scalars(work_dir):
    """Read the newest log of a work dir: one dict an entry."""
    newest = max(work_dir.glob('*/vis_data/scalars.json'), key=os.path.getmtime)
    return [json.loads(line) for line in newest.read_text().splitlines()]


def losses(work_dir):
    return [entry['loss'] for entry in scalars(work_dir) if 'loss' in entry]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files, but only half of those named cut-*."""

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        if self.path.startswith('/cut-'):
            content = content[: len(content) // 2]
        outputfile.write(content)


class Site(NamedTuple):
    """A folder served on this machine, its address, and torch.hub's folder for what is fetched."""

    folder: Path
    address: str
    cache: Path


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Serve an empty folder, with an empty cache."""
    folder, cache = tmp_path / 'site', tmp_path / 'hub'
    folder.mkdir()
    monkeypatch.setattr(torch.hub, '_hub_dir', str(cache))
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    runtime.setup()
    yield Site(folder, f'http://127.0.0.1:{server.server_port}', cache / 'checkpoints')
    server.shutdown()
    server.server_close()
