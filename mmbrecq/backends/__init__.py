"""Runtimes that execute exported files."""

from mmbrecq.backends.base import BaseBackend, KernelCount
from mmbrecq.backends.factory import as_arithmetic, open_backend
from mmbrecq.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.backends.openvino import OpenVINOBackend

__all__ = ['BaseBackend', 'KernelCount', 'ONNXRuntimeBackend', 'OpenVINOBackend', 'as_arithmetic', 'open_backend']
