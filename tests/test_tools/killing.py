"""Runs tools/ptq.py over and over, kills it at random moments and lets it go on, until it was killed often enough.

Called by a test as ``killing.py PROCESSES KILLS WORK_DIR ARGUMENTS...``. Each run is a fork of this process, which has
imported everything, so that most of the moments lie within the work.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(processes: int, arguments: list[str]) -> list[int]:
    """Starts the tool in so many processes; returns their numbers."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                arguments = [*arguments, '--launcher', 'pytorch']
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1',
                    MASTER_PORT=str(port), OMP_NUM_THREADS='1',
                )  # fmt: skip
            sys.argv = ['ptq.py', *arguments]
            try:
                runpy.run_path(str(ROOT / 'tools' / 'ptq.py'), run_name='__main__')
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(int(end.code or 0))
            os._exit(1)
        children.append(child)
    return children


def main() -> None:
    """Ends with status 0 where the last run does."""
    processes, kills, arguments = int(sys.argv[1]), int(sys.argv[2]), ['--work-dir', *sys.argv[3:], '--resume']
    import sklearn.datasets  # noqa: F401
    from mmpretrain.utils import register_all_modules

    import mmbrecq.engine.ptq_loop  # noqa: F401
    from mmbrecq.kernels.native import kernels

    register_all_modules(init_default_scope=False)
    # compiled once, for all that are forked
    kernels()
    rng = random.Random(0)
    begin = time.perf_counter()
    statuses = [
        os.waitpid(child, 0)[1] for child in start(processes, ['--work-dir', sys.argv[3] + '-whole', *sys.argv[4:]])
    ]
    whole = time.perf_counter() - begin
    killed = 0
    while killed < kills and not any(statuses):
        children = start(processes, arguments)
        time.sleep(rng.uniform(0.1, 1) * whole)
        for child in children:
            os.kill(child, signal.SIGKILL)
        ended = [os.waitpid(child, 0)[1] for child in children]
        killed += any(os.WIFSIGNALED(status) for status in ended)
        if not any(ended):
            # it was done before: from the beginning again, for more moments to be killed at
            Path(sys.argv[3], 'reconstruction.pth').unlink(missing_ok=True)
    statuses += [os.waitpid(child, 0)[1] for child in start(processes, arguments)]
    print(f'killed {killed} times, a whole run takes {whole:.1f} s')
    sys.exit(any(statuses))


if __name__ == '__main__':
    main()
