"""Runtimes that execute exported files."""

from mmbrecq.backends.base import BaseBackend, KernelCount
from mmbrecq.backends.factory import DeployedModel, as_arithmetic, open_backend
from mmbrecq.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.backends.openvino import OpenVINOBackend

__all__ = [
    'BaseBackend',
    'DeployedModel',
    'KernelCount',
    'ONNXRuntimeBackend',
    'OpenVINOBackend',
    'as_arithmetic',
    'open_backend',
]
