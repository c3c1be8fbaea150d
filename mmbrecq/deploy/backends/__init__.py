"""Runtimes that execute exported files."""

from mmbrecq.deploy.backends.base import BaseBackend
from mmbrecq.deploy.backends.factory import DeployedModel, as_forward, build_exporters, open_backend
from mmbrecq.deploy.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.deploy.backends.openvino import OpenVINOBackend
from mmbrecq.deploy.kernel_count import KernelCount

__all__ = [
    'BaseBackend',
    'DeployedModel',
    'KernelCount',
    'ONNXRuntimeBackend',
    'OpenVINOBackend',
    'as_forward',
    'build_exporters',
    'open_backend',
]
