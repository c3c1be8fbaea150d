"""Finds how many threads may compute: in a container torch and OpenMP see all processors of the host."""

import math
import os
from pathlib import Path

import torch

CGROUPS = Path('/sys/fs/cgroup')


def limit_threads() -> None:
    """Limits torch's threads to the processors that the process may use, unless OMP_NUM_THREADS says how many."""
    if not os.environ.get('OMP_NUM_THREADS'):
        torch.set_num_threads(max(1, min(torch.get_num_threads(), processors())))


def processors(root: Path = CGROUPS, membership: Path = Path('/proc/self/cgroup')) -> int:
    """Returns how many processors this process may use, by its affinity and by the quota of its control groups.

    A quota of one and a half counts as two. The groups are mounted at ``root``; the file ``membership`` names that of
    this process.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min([allowed, *(math.ceil(share) for share in _quotas(root, membership))])


def _quotas(root: Path, membership: Path) -> list[float]:
    """Returns the quotas in processors of the group and of those around it, in either version of control groups."""
    groups = [line.split(':', 2)[1:] for line in _read(membership).splitlines() if line.count(':') >= 2]
    shares = []
    for controllers, path in groups:
        if controllers not in ('', 'cpu', 'cpu,cpuacct'):
            continue
        mount = root / controllers
        # in a container the path of the host may not be there, but the mount is the group itself
        for folder in (mount / path.lstrip('/'), *(mount / path.lstrip('/')).parents):
            limit = (
                _read(folder / 'cpu.max')
                or f'{_read(folder / "cpu.cfs_quota_us")} {_read(folder / "cpu.cfs_period_us")}'
            )
            quota, _, period = ' '.join(limit.split()).partition(' ')
            if quota.isdigit() and period.isdigit() and int(quota) > 0:
                shares.append(int(quota) / int(period))
            if folder == mount:
                break
    return shares


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ''
