"""Runtimes that execute exported files."""

from mmbrecq.deploy.backends.base import BaseBackend, KernelCount
from mmbrecq.deploy.backends.factory import DeployedModel, as_forward, build_exporters, open_backend
from mmbrecq.deploy.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.deploy.backends.openvino import OpenVINOBackend

__all__ = [
    'BaseBackend', 'DeployedModel', 'KernelCount', 'ONNXRuntimeBackend', 'OpenVINOBackend', 'as_forward',
    'build_exporters', 'open_backend',
]  # fmt: skip
