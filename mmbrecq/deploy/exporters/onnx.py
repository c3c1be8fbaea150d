"""Export to ONNX with QuantizeLinear and DequantizeLinear."""

import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbrecq.deploy.exporters.base import BaseExporter
from mmbrecq.deploy.exporters.onnx_rewrite import rewrite_for
from mmbrecq.deploy.verify.onnx_graph import STANDARD_DOMAINS
from mmbrecq.errors import ExportError, first_line
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.registry import EXPORTERS

INPUT_NAME = 'images'


@EXPORTERS.register_module()
class ONNXExporter(BaseExporter):
    """Writes one ONNX file: integer weights with their scales, Q/DQ on activations, float biases."""

    suffix = '.onnx'

    def write(self, graph: QuantizedGraph, example: Tensor, path: Path) -> None:
        path.write_bytes(onnx_model(graph, example, self.opset).SerializeToString())


def onnx_model(graph: QuantizedGraph, example: Tensor, opset: int) -> Any:
    """The packed model as an ``onnx.ModelProto``.

    The batch axis is free, height and width where outputs and graph follow them. ExportError is raised if an operator
    has no ONNX form.
    """
    import onnx

    buffer = io.BytesIO()
    sink: Any = buffer
    compiled = graph.compiled.eval()
    outputs, traced = graph.traced.example_outputs(), graph.traced
    try:
        with torch.no_grad(), warnings.catch_warnings(), _nothing_printed():
            # the TorchScript exporter announces its successor, which has no public hook for Q/DQ with given integers
            warnings.simplefilter('ignore')
            torch.onnx.export(
                compiled, (example,), sink, input_names=[INPUT_NAME], output_names=list(outputs),
                dynamic_axes=_free_axes(outputs, traced.free_size and traced.sizes_vary), opset_version=opset,
                do_constant_folding=False, dynamo=False,
            )  # fmt: skip
    except Exception as error:
        # without the request for a pull request, and the scope of the value
        reason = first_line(error).partition('. Please feel free')[0].partition('  [Caused by')[0]
        if 'incompatible function arguments' in reason:
            reason = 'an operation computes an argument that its ONNX form has as a constant'
        calls = ''.join(f"; '{path}' is one call ({why})" for path, why in graph.traced.opaque.items())
        raise ExportError(f'the graph cannot be written as ONNX: {reason}{calls}') from error
    proto = onnx.load_from_string(buffer.getvalue())
    _expect_standard_operations(proto)
    rewrite_for(proto, graph.preset)
    onnx.checker.check_model(proto)
    return proto


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Keeps Python and the libraries below it from printing: where it fails, the exporter prints its whole graph."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, 'w') as nothing, redirect_stdout(nothing):
            os.dup2(nothing.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _expect_standard_operations(proto: Any) -> None:
    """No runtime has the operations that mmcv compiles for torch."""
    for node in proto.graph.node:
        if node.domain not in STANDARD_DOMAINS:
            place = node.name.strip('/').rpartition('/')[0].replace('/', '.')
            operation = f"'{node.domain}.{node.op_type}'" + (f' in {place}' if place else '')
            raise ExportError(f'the graph cannot be written as ONNX: no standard operation does what {operation} does')


def _free_axes(outputs: Mapping[str, Tensor], free_size: bool) -> dict[str, dict[int, str]]:
    """Names of the axes that may have any length in the file.

    A classifier's scores say nothing of height and width; the maps of a detector follow them, where the graph does.
    """
    axes = {name: {0: 'batch'} for name in (INPUT_NAME, *outputs)}
    for name in [name for name, output in outputs.items() if output.dim() == 4 and free_size]:
        axes[name].update({2: f'{name}_height', 3: f'{name}_width'})
    if free_size:
        axes[INPUT_NAME].update({2: 'height', 3: 'width'})
    return axes
