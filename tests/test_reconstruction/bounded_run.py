"""Reconstructs a model under a limit of memory, enforced by the system; prints what it took.

python bounded_run.py PLACE FOLDER
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights
from mmbrecq.errors import StorageError
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.reconstruction import QDropReconstructor, Task

IMAGES, LIMIT = 800, 48 * 2**20
SLACK = 8 * 2**20
"""Address space beside the limit: the stack of the thread that reads."""


class Network(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 16)
        self.backbone = nn.Sequential(*[nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)])
        self.head = nn.Linear(16, 10)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        return self.head(self.backbone(inputs).relu().mean((2, 3)))


class Silent:
    """Listens to nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def status(key: str) -> int:
    """Bytes of an entry of this process."""
    (line,) = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def task_of(count: int, folder: Path) -> Task:
    torch.manual_seed(0)
    weight = {'bits': 4, 'observer': {'type': 'MinMaxObserver'}}
    quantizer = BRECQQuantizer(weight=weight, activation={**weight, 'bits': 8}, granularity='layer')
    images = torch.randn(count, 3, 32, 32)
    model = quantizer.prepare(Network().eval(), images[:2])
    calibrate_weights(model)
    calibrate_activations(model, images[:16].split(8))
    return Task(model, images, list, None, 0, folder)


def main() -> None:
    place, folder = sys.argv[1], Path(sys.argv[2])
    options = {'iterations': 30, 'batch_size': 4}
    warm = QDropReconstructor(options, cache='disk')
    # what torch loads at its first step is no part of what is measured
    first = task_of(16, folder)
    warm.run(first, warm.plan(first), Silent())
    del first
    task = task_of(IMAGES, folder)
    reconstructor = QDropReconstructor(options, cache=place, memory_limit=LIMIT)
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    resident, address_space = status('VmRSS'), status('VmSize')
    Path('/proc/self/clear_refs').write_text('5')
    resource.setrlimit(resource.RLIMIT_AS, (address_space + LIMIT + SLACK,) * 2)
    try:
        plan = reconstructor.plan(task)
    except StorageError as error:
        print(json.dumps({'refused': str(error)}))
        return
    results = reconstructor.run(task, plan, Silent())
    grown = status('VmHWM') - resident
    print(json.dumps({'place': plan.place, 'cached': plan.peak_bytes, 'working': plan.working_bytes, 'grown': grown,
                      'observed': plan.observed, 'units': len(results)}))  # fmt: skip


if __name__ == '__main__':
    main()
