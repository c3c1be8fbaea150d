"""Latencies of layers as a runtime on this machine has them."""

import os
import platform
import re
import tempfile
from collections.abc import Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmbrecq.building import check_integer, expect
from mmbrecq.dependencies import require
from mmbrecq.deploy.backends import BaseBackend, ONNXRuntimeBackend, OpenVINOBackend
from mmbrecq.deploy.exporters.openvino import convert
from mmbrecq.mixed_precision.costs.models import BaseCostModel, Bits, Call, LayerShape, check_latencies
from mmbrecq.progress import track
from mmbrecq.registry import COST_MODELS
from mmbrecq.schema import load_json, save_json

FLOAT, INT8 = 'float', 'int8'
KINDS = (FLOAT, INT8)

RUNTIMES: dict[str, type[BaseBackend]] = {'openvino': OpenVINOBackend, 'onnxruntime': ONNXRuntimeBackend}


@COST_MODELS.register_module()
class MeasuredLatency(BaseCostModel):
    """Milliseconds of one image, each layer timed alone in a runtime on this machine.

    A layer is timed in float32 and with 8-bit integers. A figure is measured once and kept in a file, under the shape
    of the layer, the runtime and its version, the processor and the threads. Weights and inputs of fewer bits take the
    8-bit kernels, since the runtimes have no others, and a layer with a float weight or a float input takes the float
    kernel. What stands between the layers is not counted.

    Args:
        runtime: ``openvino`` or ``onnxruntime``.
        path: File of the figures; None for one in the cache folder.
        num_threads: Threads of one inference.
        rounds: How often every layer is timed, each time by the median of many runs; the least of them counts, since
            what else the machine does adds time in spells, and takes none away.

    Raises:
        TableError: The file at ``path`` has a figure that no latency can be.
    """

    name, unit = 'latency', 'ms'

    def __init__(
        self, runtime: str = 'openvino', path: str | None = None, num_threads: int = 1, rounds: int = 10
    ) -> None:
        expect(runtime in RUNTIMES, f'runtime of MeasuredLatency to be one of {sorted(RUNTIMES)}', runtime)
        check_integer(num_threads, 1, 'num_threads of MeasuredLatency')
        check_integer(rounds, 1, 'rounds of MeasuredLatency')
        self.backend, self.num_threads, self.rounds = RUNTIMES[runtime], num_threads, rounds
        for package in ('onnx', self.backend.package):
            require(package)
        version = metadata.version(self.backend.package)
        self._measured_on = f'{self.backend.name} {version} on {cpu_name()}, threads: {num_threads}'
        cache = Path(os.environ.get('MMBRECQ_CACHE') or Path.home() / '.cache' / 'mmbrecq')
        self.path = Path(path) if path is not None else cache / 'latency.json'
        self.figures: dict[str, dict[str, float]] = {}
        if self.path.exists():
            self.figures = load_json(dict[str, dict[str, float]], self.path, 'MeasuredLatency')
            check_latencies(self.figures, self.path)

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        self.prepare([layer])
        kind = FLOAT if None in bits else INT8
        return sum(self.figures[self._key(layer, call)][kind] for call in layer.calls)

    def prepare(self, layers: Sequence[LayerShape]) -> None:
        """Times the layers whose shapes have no figure, and keeps the figures in the file."""
        calls = {self._key(layer, call): (layer, call) for layer in layers for call in layer.calls}
        missing = {key: calls[key] for key in calls if not {*KINDS} <= {*self.figures.get(key, ())}}
        if not missing:
            return
        times: dict[tuple[str, str], list[float]] = {(key, kind): [] for key in missing for kind in KINDS}
        with tempfile.TemporaryDirectory() as folder:
            files = {
                (key, kind): self._write(Path(folder) / f'{i}-{kind}.onnx', layer, call, kind == INT8)
                for i, (key, (layer, call)) in enumerate(missing.items())
                for kind in KINDS
            }
            # round by round, so that a busy spell of the machine falls on one round of many layers, not on one layer
            for key, kind in track([*times] * self.rounds, f'layers in {self.backend.name}'):
                layer, call = missing[key]
                example = torch.rand(call.times, *call.inputs) * 4 - 2
                spent = self.backend(files[key, kind], self.num_threads).seconds(example)
                times[key, kind].append(1e3 * spent / copies_of(layer, call))
        for key in missing:
            self.figures[key] = {kind: min(times[key, kind]) for kind in KINDS}
        save_json(self.figures, self.path)

    def _key(self, layer: LayerShape, call: Call) -> str:
        return f'{shape_key(layer, call)}, in {self._measured_on}'

    def _write(self, path: Path, layer: LayerShape, call: Call, integer: bool) -> Path:
        """Writes the file of a layer, in the form that the runtime reads."""
        import onnx

        onnx.save(layer_graph(layer, call, integer), str(path))
        if self.backend is OpenVINOBackend:
            import openvino

            openvino.save_model(convert(path), path.with_suffix('.xml'), compress_to_fp16=False)
            return path.with_suffix('.xml')
        return path


def shape_key(layer: LayerShape, call: Call) -> str:
    """Names what a latency depends on: layers that share it share their figure."""
    options = ', '.join(f'{name} {value}' for name, value in layer.options)
    sizes = ['x'.join(map(str, shape)) for shape in (layer.weight, (call.times, *call.inputs))]
    return f'{layer.kind} {sizes[0]} of {sizes[1]}' + (f' ({options})' if options else '')


def cpu_name() -> str:
    """Returns the name of this machine's processor."""
    try:
        found = re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


OPSET = 17
COPIES, COPIED_BYTES = 16, 64e6
"""A graph has so many copies of the layer, which share the cost of calling the runtime; fewer where their weights and
outputs would have more bytes."""

ACTIVATION_SCALE, WEIGHT_SCALE, OUTPUT_SCALE = 0.02, 0.01, 0.05


def copies_of(layer: LayerShape, call: Call) -> int:
    """Returns how often the graph of :func:`layer_graph` has the layer."""
    own = 4 * (layer.weights + prod(call.outputs) * call.times)
    return int(max(1, min(COPIES, COPIED_BYTES // own)))


def layer_graph(layer: LayerShape, call: Call, integer: bool) -> Any:
    """Returns an ``onnx.ModelProto`` of copies of a layer, each with its own weights, that read the float ``input``.

    The batch is ``call.times``. With ``integer``, input, weights and outputs have 8 bits by QuantizeLinear and
    DequantizeLinear, and outputs stay integers, as they do between two layers of a network; else all is float.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, constants, outputs = [], [], []
    generator = np.random.default_rng(0)
    shape = [call.times, *call.inputs]
    op, attributes, axis = _operator(layer, len(shape))

    def constant(name: str, values: NDArray[Any] | np.generic) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(op_type: str, inputs: list[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], name=output, **options))
        return output

    source = 'input'
    if integer:
        grid = [constant('scale', np.float32(ACTIVATION_SCALE)), constant('zero', np.uint8(128))]
        source = add('DequantizeLinear', [add('QuantizeLinear', ['input', *grid], 'codes'), *grid], 'values')
        output_grid = [constant('output_scale', np.float32(OUTPUT_SCALE)), constant('output_zero', np.uint8(128))]
    weight_shape = layer.weight if op != 'MatMul' else layer.weight[::-1]
    for i in range(copies_of(layer, call)):
        if integer:
            codes = generator.integers(-64, 64, weight_shape).astype(np.int8)
            scales = np.full(weight_shape[axis], WEIGHT_SCALE, np.float32)
            weight_grid = [constant(f'scale{i}', scales), constant(f'zero{i}', np.zeros(len(scales), np.int8))]
            weight = add('DequantizeLinear', [constant(f'codes{i}', codes), *weight_grid], f'weight{i}', axis=axis)
        else:
            weight = constant(f'weight{i}', generator.normal(0, 0.3, weight_shape).astype(np.float32))
        result = add(op, [source, weight], f'layer{i}', **attributes)
        if integer:
            result = add('QuantizeLinear', [result, *output_grid], f'output{i}')
        kind = TensorProto.UINT8 if integer else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(result, kind, [call.times, *call.outputs]))
    inputs = [helper.make_tensor_value_info('input', TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, 'layer', inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=8)
    checker.check_model(model)
    return model


def _operator(layer: LayerShape, rank: int) -> tuple[str, dict[str, Any], int]:
    """Returns the ONNX operator of a layer, its attributes, and the axis of its weight's output channels."""
    options = dict(layer.options)
    if 'Linear' in layer.kind:
        return ('Gemm', {'transB': 1}, 0) if rank == 2 else ('MatMul', {}, 1)
    spatial = len(layer.weight) - 2
    padding = options.get('padding', 0)
    names = (('strides', 'stride'), ('dilations', 'dilation'))
    attributes = {name: np.broadcast_to(options.get(own, 1), spatial).tolist() for name, own in names}
    attributes['group'] = options.get('groups', 1)
    if padding == 'same':
        attributes['auto_pad'] = 'SAME_LOWER'
    elif padding != 'valid':
        attributes['pads'] = np.broadcast_to(padding, spatial).tolist() * 2
    transposed = 'Transpose' in layer.kind
    return ('ConvTranspose' if transposed else 'Conv'), attributes, int(transposed)
