"""Shares of images, and what a launcher must have told."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest

from mmbrecq import distributed
from mmbrecq.distributed import (
    aligned_batches,
    average,
    batch_number,
    gather,
    join_processes,
    mean_over,
    on_main,
    share_of,
)
from mmbrecq.errors import ConfigError


def as_process(monkeypatch: pytest.MonkeyPatch, index: int, count: int) -> None:
    monkeypatch.setattr(distributed, 'process_index', lambda: index)
    monkeypatch.setattr(distributed, 'process_count', lambda: count)


@pytest.mark.parametrize(('count', 'processes'), [(10, 1), (10, 2), (11, 4), (7, 7), (1024, 8)])
def test_shares_are_runs_of_alike_lengths(monkeypatch: pytest.MonkeyPatch, count: int, processes: int) -> None:
    shares = []
    for index in range(processes):
        as_process(monkeypatch, index, processes)
        shares.append(share_of(count))
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(('count', 'size', 'processes'), [(24, 10, 2), (64, 64, 2), (1000, 64, 3), (5, 1, 2)])
def test_batches_of_shares_end_where_those_of_the_whole_do(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int, processes: int
) -> None:
    whole = {(part.start, part.stop) for part in aligned_batches(count, size)}
    assert sorted(whole) == [(start, min(start + size, count)) for start in range(0, count, size)]
    ends = {stop for _, stop in whole}
    for index in range(processes):
        as_process(monkeypatch, index, processes)
        share = share_of(count)
        parts = [(share.start + p.start, share.start + p.stop) for p in aligned_batches(len(share), size, share.start)]
        assert [i for start, stop in parts for i in range(start, stop)] == list(share)
        assert {stop for _, stop in parts[:-1]} <= ends
        assert {start // size for start, _ in parts} == {i // size for i in share}


@pytest.mark.parametrize(('ends', 'size'), [([7, 24], 10), ([3, 9, 24], 4), ([24], 5), ([], 5)])
@pytest.mark.parametrize('processes', [1, 2, 5])
def test_batches_of_shares_end_where_groups_do(
    monkeypatch: pytest.MonkeyPatch, ends: list[int], size: int, processes: int
) -> None:
    bounds = [0, *(ends or [24])]
    whole = [i for start, stop in pairwise(bounds) for i in range(start, stop, size)]
    for index in range(processes):
        as_process(monkeypatch, index, processes)
        share = share_of(24)
        parts = aligned_batches(len(share), size, share.start, ends)
        starts = [share.start + part.start for part in parts]
        assert starts == sorted({share.start, *(i for i in whole if i in share)})
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(share)))
        assert batch_number(share.start, size, ends) == sum(i <= share.start for i in whole) - 1


def test_one_process_has_everything_to_itself() -> None:
    assert share_of(5) == range(5)
    assert gather('a') == ['a']
    assert mean_over(6.0, 3) == 2.0
    assert on_main(lambda: 7) == 7
    average([None])
    with pytest.raises(ZeroDivisionError):
        on_main(lambda: 1 // 0)


@pytest.mark.parametrize(
    ('launcher', 'said'),
    [
        ('pytorch', 'expected RANK in the environment with --launcher pytorch: start it by torchrun'),
        ('slurm', 'expected SLURM_PROCID in the environment with --launcher slurm: start it by srun'),
        ('mpi', 'expected OMPI_COMM_WORLD_RANK in the environment with --launcher mpi: start it by mpirun'),
    ],
)
def test_a_launcher_that_did_not_start_it(monkeypatch: pytest.MonkeyPatch, launcher: str, said: str) -> None:
    for name in list(os.environ):
        if name.endswith(('RANK', 'PROCID', 'WORLD_SIZE')):
            monkeypatch.delenv(name)
    with pytest.raises(ConfigError) as error:
        join_processes(launcher)
    assert str(error.value) == said


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_what_the_launcher_told_is_passed_on(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    joined: list[Any] = []
    monkeypatch.setattr(
        distributed.torch_dist, 'init_process_group', lambda backend, timeout: joined.append((backend, timeout))
    )
    monkeypatch.setattr(distributed.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(os, 'environ', dict.fromkeys(distributed._LAUNCHERS[launcher][1:], '3'))
    join_processes(launcher, {'backend': 'nccl', 'timeout': 60})
    assert joined == [('gloo', timedelta(seconds=60))]
    assert {os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')} == {'3'}
    assert os.environ['MASTER_ADDR'] and os.environ['MASTER_PORT'] == '29500'


def test_gpus_are_joined_as_mmengine_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Any] = []
    monkeypatch.setattr(distributed.dist, 'init_dist', lambda launcher, **options: joined.append((launcher, options)))
    monkeypatch.setattr(distributed.torch.cuda, 'is_available', lambda: True)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '1')
    join_processes('pytorch', {'backend': 'nccl'})
    assert joined == [('pytorch', {'backend': 'nccl'})]


def test_no_launcher_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.torch_dist, 'init_process_group', lambda *args, **options: pytest.fail('joined'))
    join_processes('none')
