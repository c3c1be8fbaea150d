"""Export to OpenVINO's intermediate representation."""

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from mmbrecq.deploy.exporters.base import BaseExporter, expected_quantization
from mmbrecq.deploy.exporters.onnx import onnx_model
from mmbrecq.deploy.exporters.onnx_rewrite import clip_signed_values
from mmbrecq.deploy.verify import check_file
from mmbrecq.deploy.verify.ir import MOVE_OPS, UNROUNDED
from mmbrecq.errors import ExportError, first_line
from mmbrecq.presets import IR_PRESET
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.registry import EXPORTERS


@EXPORTERS.register_module()
class OpenVINOExporter(BaseExporter):
    """Writes an IR, ``.xml`` and ``.bin``, converted from the ONNX graph; weights stay 8-bit integers.

    Its runtime information names the preset, at `IR_PRESET`.
    """

    suffix, packages = '.xml', ('onnx', 'openvino')

    def write(self, graph: QuantizedGraph, example: Tensor, path: Path) -> None:
        import openvino

        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            source = Path(folder) / 'model.onnx'
            proto = onnx_model(graph, example, self.opset)
            clip_signed_values(proto)
            source.write_bytes(proto.SerializeToString())
            # the file is written in a folder below that in which it will lie
            shown_as = path.parents[1] / path.name
            check_file(source, graph.preset.name, expected_quantization(graph), shown_as)
            try:
                converted = convert(source)
                converted.set_rt_info(graph.preset.name, list(IR_PRESET))
                if graph.preset.name == 'openvino':
                    fuse_sums(converted)
                openvino.save_model(converted, path, compress_to_fp16=False)
            except Exception as error:  # its front end raises types of its own, none with a common base
                failed = [line for line in str(error).splitlines() if line.startswith('-- Conversion is failed for')]
                reason = failed[0].removeprefix('-- ') if failed else first_line(error)
                raise ExportError(f'OpenVINO cannot convert the graph: {reason}') from error


def convert(source: Path) -> Any:
    """The ``.onnx`` file at ``source`` as a model of OpenVINO."""
    import openvino

    # it reports its use over the network, and waits for that; not where it takes itself for CI
    with patch.dict(os.environ, {'CI': 'true'}):
        return openvino.convert_model(source)


def fuse_sums(model: Any) -> None:
    """Lets the CPU plugin compute each residual sum within the convolution that it reads, in place.

    It does so (seen with 2026.4) where a FakeQuantize stands between the two, and else writes float32 and adds in a
    pass of its own. This one has more levels than float32 tells apart, and cuts where the grid of the sum cuts anyhow.
    """
    from openvino import opset13

    for add in model.get_ordered_ops():
        operands = [add.input_value(index) for index in range(2)] if add.get_type_name() == 'Add' else []
        layers = [index for index, operand in enumerate(operands) if _is_convolution(operand)]
        reader = add
        while len(readers := reader.output(0).get_target_inputs()) == 1 and (reader is add or _cuts(reader)):
            reader = next(iter(readers)).get_node()
        if len(layers) != 1 or reader.get_type_name() != 'FakeQuantize':
            continue
        widths = [_width_of(op) for op in (reader, operands[1 - layers[0]].get_node())]
        if 0 in widths:
            continue
        limit = np.float32(sum(widths))
        cut = opset13.fake_quantize(operands[layers[0]], -limit, limit, -limit, limit, UNROUNDED)
        add.input(layers[0]).replace_source_output(cut.output(0))
    model.validate_nodes_and_infer_types()


def _cuts(op: Any) -> bool:
    return op.get_type_name() in ('Relu', 'Clamp')


def _is_convolution(value: Any) -> bool:
    """Returns whether a value is that of a quantized convolution with its bias, and has one reader."""
    node = value.get_node()
    if node.get_type_name() == 'Add' and node.input_value(1).get_node().get_type_name() == 'Constant':
        node = node.input_value(0).get_node()
    data = node.input_value(0).get_node() if node.get_type_name() == 'Convolution' else node
    return len(value.get_target_inputs()) == 1 and data is not node and data.get_type_name() == 'FakeQuantize'


def _width_of(op: Any) -> float:
    """Returns the width of the one range of a FakeQuantize, moved or not; 0 for another operation."""
    while op.get_type_name() in MOVE_OPS:
        op = op.input_value(0).get_node()
    ends = [op.input_value(index).get_node() for index in (3, 4)] if op.get_type_name() == 'FakeQuantize' else []
    low, high = [end.get_data() for end in ends if end.get_type_name() == 'Constant'] or [np.zeros(1)] * 2
    return float(high.item() - low.item()) if low.size == high.size == 1 else 0.0
