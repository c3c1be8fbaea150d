"""Exporters: from a packed model to files that a runtime loads."""

from mmbrecq.deploy.exporters.onnx import ONNXExporter
from mmbrecq.deploy.exporters.openvino import OpenVINOExporter

__all__ = ['ONNXExporter', 'OpenVINOExporter']
