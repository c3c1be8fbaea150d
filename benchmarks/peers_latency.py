"""Latencies of one image on several files, in turn, and the operations of OpenVINO's execution graphs."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.deploy.backends.openvino import _core
from mmbrecq.presets import IR_PRESET

COLUMNS = ('float32, ms', 'bfloat16, ms', "the peer's int8, ms", 'mmbrecq int8, ms', 'mmbrecq / peer')
BURST, FEWEST_ROUNDS = 0.02, 5

Array = np.ndarray[Any, Any]


def compiled(path: Path, precision: str, threads: int, shape: Sequence[int] | None, **options: Any) -> Any:
    """Compiles a file for OpenVINO's CPU plugin.

    Args:
        path: The ``.xml``.
        precision: Of all that is not quantized, ``f32`` or ``bf16``.
        threads: Threads of one inference; 0 leaves it to the runtime.
        shape: Shape of the images; None leaves the free axes free.
        **options: More options of the plugin.
    """
    model = _core().read_model(path)
    if shape is not None:
        model.reshape(list(shape))
    options |= {'INFERENCE_PRECISION_HINT': precision, 'PERFORMANCE_HINT': 'LATENCY'}
    if threads:
        options['INFERENCE_NUM_THREADS'] = threads
    if model.has_rt_info(list(IR_PRESET)):
        # as mmbrecq opens its own files
        options['LP_TRANSFORMS_MODE'] = model.get_rt_info(list(IR_PRESET)).astype(str) == 'openvino'
    return _core().compile_model(model, 'CPU', options)


def runner(path: Path, precision: str, threads: int, image: Array, dynamic: bool) -> Callable[[], object]:
    """Returns a function that runs a file on an image; neither its copy nor that of the outputs is part of it."""
    if path.suffix == '.xml':
        import openvino

        request = compiled(path, precision, threads, None if dynamic else image.shape).create_infer_request()
        request.set_input_tensor(openvino.Tensor(image, shared_memory=True))
        return request.infer
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, image)
    for value in session.get_outputs():
        binding.bind_output(value.name)
    return lambda: session.run_with_iobinding(binding)


def burst(run: Callable[[], object]) -> float:
    """Returns the median seconds of the runs of 20 ms, two at least, after one that is not timed."""
    run()
    spent: list[float] = []
    while len(spent) < 2 or sum(spent) < BURST:
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def in_turn(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Lets all take turns, each round from another one on, for ``seconds``, five rounds at least."""
    names, times = list(runs), {name: [] for name in runs}
    stop = time.perf_counter() + seconds
    while len(times[names[0]]) < FEWEST_ROUNDS or time.perf_counter() < stop:
        for name in names:
            times[name].append(burst(runs[name]))
        names = [*names[1:], names[0]]
    return times


def measure(
    files: Mapping[str, Path], image: Array, threads: int, seconds: float, dynamic: bool
) -> dict[str, list[float]]:
    """Returns the seconds of every round for each file; the one called ``bfloat16`` runs in that precision."""
    runs = {
        name: runner(path, 'bf16' if name == 'bfloat16' else 'f32', threads, image, dynamic)
        for name, path in files.items()
    }
    return in_turn(runs, seconds)


def cells(times: Mapping[str, Sequence[float]]) -> list[str]:
    """Returns the cells of :data:`COLUMNS`: medians, and the median and quartiles of the ratios within a round."""
    medians = [
        f'{statistics.median(times[name]) * 1e3:.2f}' if name in times else ''
        for name in ('float32', 'bfloat16', 'peer', 'mmbrecq')
    ]
    ratios = [own / peer for own, peer in zip(times['mmbrecq'], times['peer'], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [*medians, f'{middle:.2f} ({low:.2f} to {high:.2f})']


def operations(path: Path, shape: Sequence[int] | None) -> Counter[tuple[str, str]]:
    """Counts the operations of a file's execution graph by type and precision."""
    graph = compiled(path, 'f32', 0, shape).get_runtime_model()
    found = (node.get_rt_info() for node in graph.get_ordered_ops())
    return Counter((info['layerType'].astype(str), info['runtimePrecision'].astype(str)) for info in found)
