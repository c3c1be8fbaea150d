"""Runs tools/ptq.py over and over, kills it a random moment after a line of its log, each time a later one, and lets
it go on.

Called by a test as ``killing.py PROCESSES WORK_DIR LINES ARGUMENTS...``, where LINES are beginnings of messages, with
a ``;`` between them. Each run is a fork of this process, which has imported everything.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LATEST = 0.01
"""A kill follows a line of the log by at most this part of a whole run: some 80 ms, a unit or two."""


def start(processes: int, arguments: list[str]) -> tuple[list[int], int]:
    """Starts the tool in so many processes; returns their numbers, and where to read what the first of them says."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    children = []
    reader, writer = os.pipe()
    # what is not written yet would be written by each fork
    sys.stdout.flush()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if rank == 0:
                os.dup2(writer, 1)
            os.close(reader)
            os.close(writer)
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
    os.close(writer)
    return children, reader


def run(processes: int, arguments: list[str], lines: Sequence[str] = (), delay: float = 0.0) -> list[int]:
    """Runs the tool, to its end or until it is killed so many seconds after the first of these lines.

    Returns how the processes ended.
    """
    children, reader = start(processes, arguments)
    with open(reader) as said:
        for text in said:
            sys.stdout.write(text)
            if any(f' - INFO - {line}' in text for line in lines):
                time.sleep(delay)
                for child in children:
                    os.kill(child, signal.SIGKILL)
                sys.stdout.write(said.read() + '\n')
    return [os.waitpid(child, 0)[1] for child in children]


def main() -> None:
    """Ends with status 0 where each run but the last was killed, and the last and the whole one succeed."""
    processes, folder, lines, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(';'), sys.argv[4:]
    import sklearn.datasets  # noqa: F401
    from mmpretrain.utils import register_all_modules

    import mmbrecq.engine.ptq_loop  # noqa: F401
    from mmbrecq.kernels.native import kernels

    register_all_modules(init_default_scope=False)
    # compiled once, for all that are forked
    kernels()
    rng = random.Random(0)
    begin = time.perf_counter()
    statuses = run(processes, ['--work-dir', f'{folder}-whole', *arguments])
    whole = time.perf_counter() - begin
    resumed = ['--work-dir', folder, *arguments, '--resume']
    for index, line in enumerate(lines):
        # a run that was killed late may have come past the next line
        ended = run(processes, resumed, lines[index:], rng.uniform(0, LATEST) * whole)
        if not any(map(os.WIFSIGNALED, ended)):
            sys.exit(f'the run ended before it was killed after {line!r}')
    statuses += run(processes, resumed)
    print(f'a whole run takes {whole:.1f} s')
    sys.exit(any(statuses))


if __name__ == '__main__':
    main()
