"""The contract of all exporters."""

import os
import tempfile
from abc import ABCMeta, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from mmbrecq.dependencies import require
from mmbrecq.deploy.verify import ExpectedQuantization, Grid, check_file
from mmbrecq.errors import ExportError, StorageError
from mmbrecq.fake_quants.weight import PackedWeight
from mmbrecq.graph.components import head_file
from mmbrecq.graph.units import is_below
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel
from mmbrecq.runs.storage import replacing


class BaseExporter(metaclass=ABCMeta):
    """Writes a packed model and checks what it has written.

    Args:
        filename: Name of the file in the folder of the export.
        opset: Version of the ONNX operator set, 13 to 20; per-channel scales came with 13.
    """

    suffix: str
    """Ending of the file, which tells the runtime that opens it."""
    packages: ClassVar[tuple[str, ...]] = ('onnx',)
    """Packages that writing and verifying take; they are looked for before there is anything to write."""

    def __init__(self, filename: str | None = None, opset: int = 17) -> None:
        for package in self.packages:
            require(package)
        self.filename = filename or f'model{self.suffix}'
        if not self.filename.endswith(self.suffix):
            raise ExportError(f"expected the exported file to end with '{self.suffix}', but got '{self.filename}'")
        if not 13 <= opset <= 20:
            raise ExportError(f'expected opset in 13..20, but got {opset!r}')
        self.opset = opset

    def export_all(self, model: QuantizedModel, example: Tensor, folder: Path) -> list[Path]:
        """Writes ``model`` and its heads, see :meth:`export`, to files named by :func:`head_file`; returns them."""
        examples = [example, *(head.traced.example for head in model.region_graphs)]
        return [self.export(graph, of, folder) for graph, of in zip(model.graphs, examples, strict=True)]

    def export(self, graph: QuantizedGraph, example: Tensor, folder: Path) -> Path:
        """Writes ``graph`` below ``folder`` and verifies the file against the rules of its preset.

        A file that fails is not left behind, and does not replace one of an earlier export.

        Args:
            graph: A graph of a packed model.
            example (Tensor): Preprocessed images, ``(N, 3, H, W)``; N stays free in the file.
            folder: Made where it is missing.

        Returns:
            The path of the file.

        Raises:
            ExportError: It has no form in the file's format, or breaks a rule.
            StorageError: The system refused to write.
        """
        path = folder / self.filename
        path = head_file(path, graph.path) if graph.is_region else path
        for opaque in sorted(graph.traced.value_dependent):
            raise ExportError(
                f"expected '{opaque}' to compute alike for all inputs, but its Python follows the values of tensors, "
                f'which no file can express: {graph.traced.opaque[opaque]}'
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix='.export-', dir=folder) as beside:
                written = Path(beside) / path.name
                self.write(graph, example, written)
                check_file(written, graph.preset.name, expected_quantization(graph), shown_as=path)
                # in the order of their names a .bin comes before the .xml that points at it
                for made in sorted(Path(beside).iterdir()):
                    with replacing(folder / made.name) as partial:
                        os.replace(made, partial)
        except OSError as error:
            raise StorageError(f'cannot write {path}: {error.strerror or error}') from error
        return path

    @abstractmethod
    def write(self, graph: QuantizedGraph, example: Tensor, path: Path) -> None:
        """Writes ``graph`` to ``path``, and nothing else that stays but files to be kept beside it."""


def expected_quantization(graph: QuantizedGraph) -> ExpectedQuantization:
    """Returns what the verifier compares the ONNX file of a packed model with: its layers and all their grids."""
    weights = {
        path.partition('.parametrizations.')[0]: (module.qtype.quant_min, module.qtype.quant_max)
        for path, module in graph.model.named_modules()
        if isinstance(module, PackedWeight)
    }
    grids = []
    for quantizer in graph.quantizers.values():
        scales = tuple(quantizer.scale.detach().reshape(-1).double().tolist())
        zero_points = tuple(quantizer.zero_point.reshape(-1).tolist())
        if quantizer.scale.dim() and graph.preset.folds_channel_scales:
            scales, zero_points = (1.0,), zero_points[:1]
        if graph.preset.folds_zero_points:
            zero_points = (0,) * len(zero_points)
        grids.append(Grid(scales, zero_points, quantizer.qtype.quant_min, quantizer.qtype.quant_max))
    return ExpectedQuantization(count_quantized_calls(graph), weights, frozenset(grids))


def count_quantized_calls(graph: QuantizedGraph) -> int:
    """Calls of quantized layers in the graph; a layer that several levels share counts once per call."""
    quantized = {layer.name for layer in graph.layers if layer.weight_bits is not None}
    calls = [str(n.target) for n in graph.traced.graph.nodes if n.op == 'call_module']
    return sum(is_below(layer, target) for target in calls for layer in quantized)
