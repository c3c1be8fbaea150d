"""Lets several processes work as one: each has a share of the images, and their results are combined.

The functions are thin ones over mmengine's; in a single process each does nothing, or returns its argument.
"""

import hashlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
from mmengine import dist
from torch import Tensor, nn
from torch import distributed as torch_dist

from mmbrecq.errors import ConfigError, ProcessError

T = TypeVar('T')

_LAUNCHERS = {
    'pytorch': ('torchrun', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('srun', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('mpirun', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
"""Command of a launcher, and its environment variables: number of the process, number of processes, number on its
machine."""


def join_processes(launcher: str, options: Mapping[str, Any] | None = None) -> None:
    """Joins the processes of a launcher, on GPUs as mmengine does, on CPUs through gloo.

    ``options`` are the config's ``env_cfg.dist_cfg``; ConfigError if the launcher did not start this process.
    """
    if launcher == 'none' or torch_dist.is_initialized():
        return
    command, *variables = _LAUNCHERS[launcher]
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise ConfigError(f'expected {missing[0]} in the environment with --launcher {launcher}: start it by {command}')
    options = dict(options or {})
    if torch.cuda.is_available():
        dist.init_dist(launcher, **options)
        return
    # mmengine's start sets the GPU of each process, and fails where there is none
    rank, count, local = (os.environ[name] for name in variables)
    os.environ.update(RANK=rank, WORLD_SIZE=count, LOCAL_RANK=local)
    if 'MASTER_ADDR' not in os.environ:
        # the machine of the first process: the first in slurm's list, else this one
        hosts = os.environ.get('SLURM_NODELIST')
        first = hosts and subprocess.getoutput(f'scontrol show hostname {hosts} | head -n1')
        os.environ['MASTER_ADDR'] = first or socket.gethostname()
    os.environ.setdefault('MASTER_PORT', '29500')
    timeout = options.get('timeout')
    torch_dist.init_process_group('gloo', timeout=None if timeout is None else timedelta(seconds=timeout))


def leave_processes() -> None:
    """Leaves the processes that :func:`join_processes` joined; torch warns at exit without it."""
    if torch_dist.is_available() and torch_dist.is_initialized():
        torch_dist.destroy_process_group()


process_count: Callable[[], int] = dist.get_world_size
process_index: Callable[[], int] = dist.get_rank


def processes_here() -> int:
    """Returns the number of processes on this machine, as far as the launcher says."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', process_count())) if process_count() > 1 else 1


def share_of(count: int) -> range:
    """Returns the indices, of ``count``, of this process; the lengths of shares differ by one at most."""
    processes, own = process_count(), process_index()
    return range(count * own // processes, count * (own + 1) // processes)


def aligned_batches(count: int, size: int, first: int = 0, ends: Sequence[int] = ()) -> list[slice]:
    """Returns slices of a share into batches of ``size`` that end where those of a single process would.

    Args:
        count: Length of the share.
        size: Size of a batch.
        first: Index of the share's first element in the whole.
        ends: Indices in the whole, rising, at which a batch ends whatever its size.

    Example:
        >>> aligned_batches(5, 4, first=2)
        [slice(0, 2, None), slice(2, 5, None)]
    """
    parts = pairwise([0, *ends, first + count])
    stops = [min(stop, end) - first for start, end in parts for stop in range(start + size, end + size, size)]
    stops = [*(stop for stop in stops if 0 < stop < count), count]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False) if stop > start]


def batch_number(index: int, size: int, ends: Sequence[int] = ()) -> int:
    """Returns the number of the batch of an element of the whole, see :func:`aligned_batches`."""
    return len(aligned_batches(index + 1, size, ends=ends)) - 1


def gather(value: T) -> list[T]:
    """Returns the values of all processes, in their order."""
    return dist.all_gather_object(value)


def on_main(function: Callable[[], T]) -> T:
    """Calls ``function`` in the first process alone; every process returns its result, or raises its error."""
    if process_count() == 1:
        return function()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.is_main_process():
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def mean_over(total: float, count: int) -> float:
    """Returns the sum of the ``total`` of all processes over the sum of their ``count``."""
    totals, counts = zip(*gather((total, count)), strict=True)
    return sum(totals) / sum(counts)


def average(tensors: Iterable[Tensor | None]) -> None:
    """Replaces each tensor by its mean over the processes, in one message; None stands for no tensor."""
    dist.all_reduce_params([tensor for tensor in tensors if tensor is not None], op='mean')


def copy_from_main(model: nn.Module) -> None:
    """Copies the first process's model into that of every process: kinds of processors differ in last bits."""
    if process_count() > 1:
        model.load_state_dict(on_main(lambda: {name: value.cpu() for name, value in model.state_dict().items()}))


def check_same_bits(model: nn.Module) -> str:
    """Returns the hash of a model; ProcessError where it is not the same in every process."""
    own = hash_of(model)
    for index, other in enumerate(gather(own)):
        if other != own:
            raise ProcessError(f'expected the same model in all processes, but {process_index()} and {index} differ')
    return own


def hash_of(model: nn.Module) -> str:
    """Returns a hash of the names and the bits of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
