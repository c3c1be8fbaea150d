"""The contract of all exporters."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from pathlib import Path

from torch import Tensor

from mmbrecq.errors import ExportError
from mmbrecq.graph.units import is_below
from mmbrecq.quantizers.prepared import QuantizedModel
from mmbrecq.verify import ExpectedQuantization, check_file


class BaseExporter(metaclass=ABCMeta):
    """Writes a packed model and checks what it has written.

    Args:
        filename: Name of the file in the folder of the export.
    """

    suffix: str
    """Ending of the file, which tells the runtime that opens it."""

    def __init__(self, filename: str | None = None) -> None:
        self.filename = filename or f'model{self.suffix}'
        if not self.filename.endswith(self.suffix):
            raise ExportError(f"expected the exported file to end with '{self.suffix}', but got '{self.filename}'")

    def export(self, model: QuantizedModel, example: Tensor, folder: Path) -> Path:
        """Writes ``model`` below ``folder`` and verifies the file against the rules of its preset.

        Args:
            model: A packed model.
            example (Tensor): Preprocessed images, ``(N, 3, H, W)``; N stays free in the file.
            folder: Made where it is missing.

        Returns:
            The path of the file.

        Raises:
            ExportError: It cannot be written, or breaks a rule.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.filename
        self.write(model, example, path)
        check_file(path, model.preset.name, ExpectedQuantization(layers=count_quantized_calls(model)))
        return path

    @abstractmethod
    def write(self, model: QuantizedModel, example: Tensor, path: Path) -> None:
        """Writes ``model`` to ``path``."""


def count_quantized_calls(model: QuantizedModel) -> int:
    """Calls of quantized layers in the graph; a layer that several levels share counts once per call."""
    quantized = {layer.name for layer in model.layers if layer.weight_bits is not None}
    calls = [str(n.target) for n in model.arithmetic.graph.nodes if n.op == 'call_module']
    return sum(is_below(layer, target) for target in calls for layer in quantized)
