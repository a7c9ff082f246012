"""Processes find each other over the right interface, and say in a sentence when they lose one."""

import os
import socket
import sys
from datetime import timedelta

import pytest
import torch
from mmengine.config import Config

from pvt_mm.engine import distributed, resume
from pvt_mm.errors import CheckpointMismatchError, UserError

linux = pytest.mark.skipif(sys.platform != 'linux', reason='interfaces are read as Linux has them')


@pytest.fixture
def machines(monkeypatch):
    """Set what torchrun sets: machines(processes, of them here, address of the first)."""
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'x')  # so that it is restored, whatever a test does
    monkeypatch.delenv('GLOO_SOCKET_IFNAME')

    def say(world, local, master):
        for name, value in dict(
            WORLD_SIZE=world, LOCAL_WORLD_SIZE=local, MASTER_ADDR=master
        ).items():
            monkeypatch.setenv(name, str(value))

    return say


@pytest.fixture
def started(monkeypatch):
    """What the process group is started with; none is."""
    calls = []

    def start(backend, **options):
        calls.append((backend, options, os.environ.get('GLOO_SOCKET_IFNAME')))

    monkeypatch.setattr(torch.distributed, 'init_process_group', start)
    return calls


def test_one_machine_talks_to_itself(machines):
    """Whatever the machine is called, and whether that resolves."""
    machines(2, 2, 'no-such-name.invalid')
    assert distributed._interface().startswith('lo')


@linux
def test_several_machines_take_the_interface_of_the_route(machines):
    """The first machine has the address itself; each of its addresses leads to its interface."""
    found = {address: name for name, address in distributed._addresses()}
    assert found['127.0.0.1'] == 'lo'
    for address, name in found.items():
        if not address.startswith('fe80'):  # needs a scope
            machines(4, 2, address)
            assert distributed._interface() == name, address
    assert set(found.values()) <= {name for _, name in socket.if_nameindex()}


def test_an_address_that_leads_nowhere_sets_nothing(machines, monkeypatch):
    """The connection itself then says what is wrong; nor where interfaces cannot be read."""
    machines(4, 2, 'no-such-name.invalid')
    assert distributed._interface() is None
    machines(4, 2, '127.0.0.1')
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert distributed._interface() is None


@linux
def test_the_users_own_interface_stays(machines, started, monkeypatch):
    """GLOO_SOCKET_IFNAME is set only where it is not."""
    machines(4, 2, '127.0.0.1')
    distributed.launch_gloo(Config(dict(launcher='pytorch')))
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'ib0')
    distributed.launch_gloo(Config(dict(launcher='pytorch')))
    assert [interface for _, _, interface in started] == ['lo', 'ib0']


@pytest.mark.parametrize(
    ('env_cfg', 'options'),
    [
        (None, {'timeout': None}),
        (dict(dist_cfg=dict(backend='nccl')), {'timeout': None}),
        (dict(dist_cfg=dict(timeout=90)), {'timeout': timedelta(seconds=90)}),
    ],
)
def test_the_configs_timeout_holds_for_gloo(env_cfg, options, machines, started):
    """Its key and unit are mmengine's, which reads it for NCCL."""
    machines(2, 2, '127.0.0.1')
    distributed.launch_gloo(Config(dict(launcher='pytorch', env_cfg=env_cfg)))
    assert started[0][:2] == ('gloo', options)


@pytest.mark.parametrize(
    ('message', 'shown'),
    [
        (
            '[/x/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting '
            '20000ms for recv operation to complete',
            '(Timed out waiting 20000ms for recv operation to complete)',
        ),
        ('[/x/gloo/pair.cc:534] Connection closed by peer [192.0.2.2]:1', 'by peer [192.0.2.2]:1)'),
        ('Application timeout caused pair closure', '(Application timeout caused pair closure)'),
        ('Gloo connectFullMesh failed with [/x/pair.cc:152] timed out\nmore', 'with timed out)'),
    ],
)
def test_a_lost_process_is_a_sentence(message, shown, tmp_path):
    """What gloo says when a machine is cut off, dies or cannot be reached, and how to go on."""
    with pytest.raises(UserError) as refusal, resume.clear_errors(tmp_path):
        raise RuntimeError(message)
    said = str(refusal.value)
    assert f'The training in {tmp_path} stopped, because the connection to another' in said
    assert shown in said and said.endswith('then go on with --resume on every machine.')
    assert '\n' not in said


def test_pytorchs_own_class_is_one_too():
    """As NCCL and the store raise it."""
    told = pytest.raises(UserError, match=r'The test stopped.*\(store is gone\).*start it again')
    with told, distributed.clear_losses('The test'):
        raise torch.distributed.DistBackendError('store is gone')


@pytest.mark.parametrize('error', [RuntimeError('shape mismatch'), CheckpointMismatchError('bad')])
def test_other_errors_stay_what_they_are(error, tmp_path):
    """A fault of the model is no fault of the network."""
    with pytest.raises(type(error)) as raised, resume.clear_errors(tmp_path):
        raise error
    assert raised.value is error


def resuming(epoch):
    sampler = dict(epoch=epoch, iteration=8)
    return Config(
        dict(
            resume=epoch is not None,
            load_from=f'run/epoch_{epoch}.pth',
            train_dataloader=dict(batch_sampler=sampler),
        )
    )


@pytest.mark.parametrize(
    ('other', 'told'),
    [
        ('no checkpoint', 'in process 0, no checkpoint in process 1; copy it'),
        (
            'epoch_1.pth of epoch 1, iteration 4,',
            'epoch_1.pth of epoch 1, iteration 4, in process 1',
        ),
    ],
)
def test_processes_resume_from_one_checkpoint_or_not_at_all(other, told, monkeypatch):
    """Machines without shared storage have work dirs of their own."""
    monkeypatch.setattr(distributed, 'get_world_size', lambda: 2)
    monkeypatch.setattr(distributed, 'all_gather_object', lambda own: [own, other])
    with pytest.raises(UserError, match='would not resume from the same') as refusal:
        resume.check_same(resuming(2))
    assert told in str(refusal.value)
    monkeypatch.setattr(distributed, 'all_gather_object', lambda own: [own, own])
    resume.check_same(resuming(2))
    resume.check_same(resuming(None))


def test_one_process_agrees_with_itself():
    """And asks nobody."""
    resume.check_same(resuming(2))
