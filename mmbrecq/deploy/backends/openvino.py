"""OpenVINO on the CPU."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from mmbrecq.deploy.backends.base import BaseBackend, KernelCount
from mmbrecq.deploy.verify.ir import INTEGER_OPS, LAYERS, SHAPE_OPS
from mmbrecq.errors import BackendError
from mmbrecq.presets import IR_PRESET
from mmbrecq.registry import BACKENDS

# Their layer types in the plugin's execution graph
WEIGHTED_LAYERS = frozenset({'Convolution', 'Deconvolution', 'FullyConnected', 'MatMul'})
INTEGER_PRECISIONS = frozenset({'u8', 'i8'})
INTEGER_TYPES = frozenset({'i8', 'u8', 'i4', 'u4'})


@cache
def _core() -> Any:
    """Returns the one core of this process.

    With its CPU plugin a core brings a signal stack for the thread, and puts the one before back when it goes (seen
    with 2026.4). Of two that go in the order in which they came, the second puts back what the first has unmapped: the
    next signal ends the process without a word.
    """
    import openvino

    return openvino.Core()


@BACKENDS.register_module()
class OpenVINOBackend(BaseBackend):
    """Runs an OpenVINO IR (``.xml`` with its ``.bin`` beside it) in the CPU plugin, compiled once.

    All that is not quantized runs in float32, never in the plugin's default bfloat16. A file of ours that was made for
    another preset than ``openvino`` runs as it is written, without the plugin's low-precision transformations: those
    take the inputs of a concatenation to one scale, which is another network where the preset gave each its own.

    Its arguments are those of `BaseBackend`.
    """

    name, suffix, package = 'OpenVINO', '.xml', 'openvino'

    def _load(self) -> None:
        weights = self.path.with_suffix('.bin')
        if not weights.is_file():
            raise BackendError(f'{self.name} cannot open {self.path}: its weights file {weights} does not exist')
        core = _core()
        options: dict[str, Any] = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
        if self.num_threads is not None:
            options['INFERENCE_NUM_THREADS'] = self.num_threads
        self._model = core.read_model(str(self.path))
        if self._model.has_rt_info(list(IR_PRESET)):
            preset = self._model.get_rt_info(list(IR_PRESET)).astype(str)
            options['LP_TRANSFORMS_MODE'] = preset == 'openvino'
        self._compiled = core.compile_model(self._model, 'CPU', options)
        # a compiled output has the names of all operations that were brought together in it
        self.input_names = [_port_name(port) for port in self._model.inputs]
        self.output_names = [_port_name(port) for port in self._model.outputs]

    def _run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> Sequence[np.ndarray[Any, Any]]:
        results = self._compiled(list(arrays))
        return [results[port] for port in self._compiled.outputs]

    def _bound(self, arrays: Sequence[np.ndarray[Any, Any]]) -> Callable[[], object]:
        import openvino

        request = self._compiled.create_infer_request()
        for i, array in enumerate(arrays):
            request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
        return request.infer

    def integer_kernels(self) -> KernelCount:
        """Counts the quantized layers whose execution graph node computes in u8 or i8."""
        quantized = [
            node.get_friendly_name()
            for node in self._model.get_ordered_ops()
            if node.get_type_name() in LAYERS and _has_quantized_weight(node)
        ]
        integer: set[str] = set()
        others: dict[str, str] = {}
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            if info['layerType'].astype(str) not in WEIGHTED_LAYERS:
                continue
            # A dequantization moved behind the layer takes its name, with this word appended
            originals = info['originalLayersNames'].astype(str).split(',')
            names = {name.removesuffix('/DequantizationMultiply') for name in originals}
            if (precision := info['runtimePrecision'].astype(str)) in INTEGER_PRECISIONS:
                integer |= names
            else:
                others |= dict.fromkeys(names, f'{self.name} computes it in {precision}')
        # `openvino.convert_model` gives an operator's own name to the bias addition behind it
        float_layers = {
            name.removesuffix('/WithoutBiases'): others.get(name, f'{self.name} fuses it into another operation')
            for name in quantized
            if name not in integer
        }
        return KernelCount(len(quantized), len(quantized) - len(float_layers), float_layers)


def _port_name(port: Any) -> str:
    """A tensor's name; a model built by hand may have none, then its node's."""
    names: set[str] = port.get_names()
    return min(names) if names else str(port.get_node().get_friendly_name())


def _has_quantized_weight(node: Any) -> bool:
    """Whether the weight of ``node`` is stored as integers, or is a constant behind a FakeQuantize."""
    source = node.input_value(1).get_node()
    while source.get_type_name() in (*SHAPE_OPS, *INTEGER_OPS):
        source = source.input_value(0).get_node()
    if source.get_type_name() == 'FakeQuantize':
        return bool(source.input_value(0).get_node().get_type_name() == 'Constant')
    if source.get_type_name() != 'Constant':
        return False
    return source.get_output_element_type(0).to_string() in INTEGER_TYPES
