"""ONNX Runtime on the CPU."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.dependencies import require
from mmbrecq.deploy.backends.base import BaseBackend, KernelCount
from mmbrecq.deploy.verify.onnx_graph import QUANTIZATION_OPS, Layer, OnnxGraph
from mmbrecq.registry import BACKENDS

# What the optimizer makes of convolutions and linear layers when they shall run in integers
INTEGER_OPS = frozenset(
    {'QLinearConv', 'ConvInteger', 'QGemm', 'QLinearMatMul', 'MatMulInteger', 'MatMulIntegerToFloat'}
)
PROVIDERS = ['CPUExecutionProvider']


@BACKENDS.register_module()
class ONNXRuntimeBackend(BaseBackend):
    """Runs an ``.onnx`` file in ONNX Runtime's CPU provider.

    On x86 without VNNI its fast uint8 x int8 kernels add pairs of products in 16 bits, which saturate once weights use
    all 8 bits; it is asked for the kernels that do not. The other arguments are those of `BaseBackend`.

    Args:
        optimize: False switches graph optimization off: every Q/DQ pair is then executed as written, in float, which
            is what a simulation is compared with exactly. True runs integer kernels.
    """

    name, suffix, package = 'ONNX Runtime', '.onnx', 'onnxruntime'

    def __init__(self, path: str | Path, num_threads: int | None = None, optimize: bool = True) -> None:
        self.optimize = optimize
        super().__init__(path, num_threads)

    def _load(self) -> None:
        import onnxruntime

        options = self._options()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if self.optimize else levels.ORT_DISABLE_ALL
        model = require('onnx').load(str(self.path))
        # to be exact, ONNX Runtime moves int8 constants to uint8 on processors without VNNI, once per reader, and
        # refuses the file (seen with 1.31) when it meets one that it has moved: the weights of a head that all levels
        # share, and the zero-point of several constants that layers read
        source = model.SerializeToString() if unshare_weights(model) else str(self.path)
        self._session = onnxruntime.InferenceSession(source, options, providers=PROVIDERS)
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [value.name for value in self._session.get_outputs()]

    def _options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings concern fusions, which integer_kernels counts
        if self.num_threads is not None:
            options.intra_op_num_threads = self.num_threads
        options.add_session_config_entry('session.x64quantprecision', '1')
        return options

    def _run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> Sequence[np.ndarray[Any, Any]]:
        feed = dict(zip(self.input_names, arrays, strict=True))
        return self._session.run(self.output_names, feed)

    def _bound(self, arrays: Sequence[np.ndarray[Any, Any]]) -> Callable[[], object]:
        binding = self._session.io_binding()
        for name, array in zip(self.input_names, arrays, strict=True):
            binding.bind_cpu_input(name, array)
        for name in self.output_names:
            binding.bind_output(name)
        return lambda: self._session.run_with_iobinding(binding)

    def integer_kernels(self) -> KernelCount:
        """Counts the quantized layers that ONNX Runtime's optimizer turned into integer operators.

        The optimized graph is written out and read back; with ``optimize=False`` no layer runs in integers.
        """
        import onnx

        model = onnx.load(str(self.path))
        unshare_weights(model)
        # Nodes are matched by name, and ONNX does not ask for names
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f'{node.op_type}_{index}'
        graph = OnnxGraph(model, str(self.path))
        layers = [layer for layer in graph.layers() if layer.weight_dq is not None]
        integer = self._integer_names(model.SerializeToString()) if self.optimize else set()
        float_layers = {
            layer.node.name: self._float_reason(graph, layer) for layer in layers if layer.node.name not in integer
        }
        return KernelCount(len(layers), len(layers) - len(float_layers), float_layers)

    def _float_reason(self, graph: OnnxGraph, layer: Layer) -> str:
        """Why a quantized layer has no integer kernel, as far as the file shows it."""
        if not self.optimize:
            return 'graph optimization is off'
        maker = graph.producer(layer.data)
        if graph.quantized_sources(layer.data) is None:
            return f'its input, from {"the input" if maker is None else maker.op} of the graph, is not quantized'
        readers = graph.consumers(layer.node.outputs[0])
        if len(readers) == 1 and readers[0].op in ('Relu', 'Clip'):
            readers = graph.consumers(readers[0].outputs[0])
        if layer.node.op == 'Gemm' and layer.node.input(2):
            return 'its bias is not added apart from a result in float'
        if layer.node.op == 'Conv' and not any(reader.op == 'QuantizeLinear' for reader in readers):
            found = readers[0].op if readers else 'the caller'
            return f'its output goes to {found} in float'
        if maker is not None and maker.op != 'DequantizeLinear':
            return f'{maker.op} stands between the quantization of its input and the layer'
        return f'{self.name} has no integer kernel for this {layer.node.op}'

    def _integer_names(self, model: bytes) -> set[str]:
        """Names of the integer operators in the optimized graph; a fusion appends ``/What`` to the first name."""
        import onnx
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            # The level above changes layouts only, and renames nodes on the way
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.optimized_model_filepath = str(Path(folder) / 'optimized.onnx')
            onnxruntime.InferenceSession(model, options, providers=PROVIDERS)
            optimized = onnx.load(options.optimized_model_filepath)
        names = {node.name for node in optimized.graph.node if node.op_type in INTEGER_OPS}
        return names | {name.rsplit('/', 1)[0] for name in names if name.endswith('Fusion')}


def unshare_weights(model: Any) -> bool:
    """Gives every Q and DQ int8 constants of its own; tells whether there was something to copy."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == tensor.INT8}
    read: set[str] = set()
    count = len(model.graph.initializer)
    for index, node in enumerate(model.graph.node):
        inputs = node.input if node.op_type in QUANTIZATION_OPS else []
        for place, name in enumerate(list(inputs)):
            if name in read:
                copy = model.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = inputs[place] = f'{name}/{index}'
            read |= {name} & constants.keys()
    return len(model.graph.initializer) > count
