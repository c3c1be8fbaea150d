"""The files that a run of quantization leaves in its work dir."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import master_only
from torch import Tensor

from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.report import Summary, write_report
from mmbrecq.runs.grids import grids_of
from mmbrecq.runs.storage import save_atomic, write_text_atomic


class RunFiles:
    """Writes them, in the first process; each is written whole or stays as it was.

    Args:
        folder: The work dir.
        summary: Of the run; it is written as it then is.
        config_text: The config.
    """

    def __init__(self, folder: Path, summary: Summary, config_text: str) -> None:
        self.folder, self.summary, self.config_text = folder, summary, config_text

    @master_only
    def write_summary(self) -> None:
        """Writes ``summary.json`` and ``report.html``."""
        self.summary.save(self.folder / 'summary.json')
        write_report(self.summary, self.folder / 'report.html', time.strftime('%Y-%m-%d'))

    @master_only
    def write_inputs(self, model: QuantizedModel, ids: Sequence[str]) -> None:
        """Writes the first files, once config, checkpoint and images are known to be good.

        Until here the files of an earlier run stay as they are.
        """
        if self.summary.config:
            write_text_atomic(self.config_text, self.folder / Path(self.summary.config).name)
        write_text_atomic(_layer_list(model), self.folder / 'layers.txt')
        write_text_atomic('\n'.join(ids) + '\n', self.folder / 'calibration_ids.txt')
        self.summary.calibration.num_samples = len(ids)
        self.summary.calibration.ids_file = 'calibration_ids.txt'
        self.write_summary()

    @master_only
    def write_checkpoint(self, model: QuantizedModel, example: Tensor) -> None:
        """Writes ``quantized.pth`` of a packed model."""
        meta = {
            'config': self.config_text,
            'seed': self.summary.seed,
            'versions': self.summary.versions,
            'bits': {name: [bits.weight, bits.activation] for name, bits in self.summary.bits.items()},
            'grids': grids_of(model.model),
            'calibration_ids_file': self.summary.calibration.ids_file,
            'example_shape': list(example.shape),
        }
        save_atomic({'state_dict': model.model.state_dict(), 'meta': meta}, self.folder / 'quantized.pth')


def _layer_list(model: QuantizedModel) -> str:
    """A line for every convolution and linear layer: bits, unit, or why it stayed in float."""
    width = max(len(layer.name) for layer in model.layers)
    lines = []
    for layer in model.layers:
        bits = f'W{layer.weight_bits or 32}A{layer.activation_bits or 32}'
        tail = f'float: {layer.float_reason}' if layer.float_reason else f'unit {layer.unit}'
        lines.append(f'{layer.name:<{width}}  {layer.kind:<12}  {bits:<7}  {tail}')
    return '\n'.join(lines) + '\n'
