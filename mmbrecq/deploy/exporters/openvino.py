"""Export to OpenVINO's intermediate representation."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from mmbrecq.deploy.exporters.base import BaseExporter, expected_quantization
from mmbrecq.deploy.exporters.onnx import onnx_model
from mmbrecq.deploy.exporters.onnx_rewrite import clip_signed_values
from mmbrecq.deploy.verify import check_file
from mmbrecq.errors import ExportError, first_line
from mmbrecq.presets import IR_PRESET
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.registry import EXPORTERS


@EXPORTERS.register_module()
class OpenVINOExporter(BaseExporter):
    """Writes an IR, ``.xml`` and ``.bin``, converted from the ONNX graph; weights stay 8-bit integers.

    Its runtime information names the preset, at `IR_PRESET`.

    Args:
        filename: Name of the ``.xml``.
        opset: ONNX operator set of the graph that is converted.
    """

    suffix, packages = '.xml', ('onnx', 'openvino')

    def __init__(self, filename: str | None = None, opset: int = 17) -> None:
        super().__init__(filename)
        self.opset = opset

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
