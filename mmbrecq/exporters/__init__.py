"""Exporters: from a packed model to files that a runtime loads."""

from mmbrecq.exporters.onnx import ONNXExporter
from mmbrecq.exporters.openvino import OpenVINOExporter

__all__ = ['ONNXExporter', 'OpenVINOExporter']
