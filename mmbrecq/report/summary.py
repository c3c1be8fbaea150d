"""Holds the content of ``summary.json``: everything a run measured, as typed values.

Each field may still be empty, so that an unfinished run can be saved, read and reported.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from mmbrecq.deploy.backends.base import KernelCount
from mmbrecq.mixed_precision.diagnosis import GridLosses
from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.results import UnitResult

# Metric names are the evaluator's own, such as 'accuracy/top1' or 'coco/bbox_mAP'.
MetricValues = dict[str, float]


@dataclass
class Metrics:
    """Holds the metrics of each stage of the run; empty while a stage has not been evaluated.

    Attributes:
        float: The float model.
        nearest: Round-to-nearest at the bits of the run.
        weights: After weight reconstruction, with float activations.
        quantized: The whole quantized model, simulated.
        deployed: The exported graph in its runtime, per runtime name.
    """

    float: MetricValues = field(default_factory=dict)
    nearest: MetricValues = field(default_factory=dict)
    weights: MetricValues = field(default_factory=dict)
    quantized: MetricValues = field(default_factory=dict)
    deployed: dict[str, MetricValues] = field(default_factory=dict)


@dataclass
class Seconds:
    """Holds the wall-clock seconds of each phase of the run; None while it has not ended."""

    prepare: float | None = None
    calibrate: float | None = None
    reconstruct: float | None = None
    evaluate: float | None = None
    export: float | None = None
    total: float | None = None


@dataclass
class PeakMemory:
    """Holds the peak bytes in use, on the host (resident) and on the device (allocated); None where unknown."""

    host: int | None = None
    device: int | None = None


@dataclass
class ModelSize:
    """Holds the bytes of the model's parameters, in float and at the bits of the run; None where unknown."""

    float: int | None = None
    quantized: int | None = None


@dataclass
class LayerBits:
    """Holds the bits of one layer, 2 to 8: of its weight and of its input activation; None for float."""

    weight: int | None = None
    activation: int | None = None


@dataclass
class Calibration:
    """Holds the number of calibration images, and the file that lists their ids."""

    num_samples: int = 0
    ids_file: str = ''


@dataclass
class Summary:
    """Holds all values of ``summary.json``.

    Attributes:
        config: Path of the config file.
        model: Short name of the model, for titles.
        float_layers: ``'<layer>: reason'`` for each convolution or linear layer that stays in float.
        loss: The reconstruction loss and its weights.
        verify: Exported file to ``'passed'`` or to the rule it breaks.
        integer_kernels: Runtime name to kernel count.
        grids: What single grids cost the outputs after the calibration, the worst first; None before it.
        search: The chosen bits; None without a search.
        pictures: Paths, from the run's folder, of pictures of float and quantized predictions.
    """

    config: str = ''
    model: str = ''
    preset: str = ''
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    seconds: Seconds = field(default_factory=Seconds)
    peak_memory_bytes: PeakMemory = field(default_factory=PeakMemory)
    model_size_bytes: ModelSize = field(default_factory=ModelSize)
    units: list[UnitResult] = field(default_factory=list)
    bits: dict[str, LayerBits] = field(default_factory=dict)
    float_layers: list[str] = field(default_factory=list)
    calibration: Calibration = field(default_factory=Calibration)
    loss: str = ''
    warnings: list[str] = field(default_factory=list)
    verify: dict[str, str] = field(default_factory=dict)
    integer_kernels: dict[str, KernelCount] = field(default_factory=dict)
    grids: GridLosses | None = None
    search: SearchResult | None = None
    pictures: list[str] = field(default_factory=list)

    def add_model(self, model: QuantizedModel, size: ModelSize) -> None:
        """Records the layers of a prepared model, their bits, and the modules that stay in float or are one call."""
        self.bits = {layer.name: LayerBits(layer.weight_bits, layer.activation_bits) for layer in model.layers}
        self.float_layers = [f'{layer.name}: {layer.float_reason}' for layer in model.layers if layer.float_reason]
        self.model_size_bytes = size
        for graph in model.graphs:
            self.warnings += [f'{path} stays one call: {why}' for path, why in graph.traced.opaque.items()]

    def add_unit(self, result: UnitResult) -> None:
        """Records a finished unit."""
        self.units.append(result)
        if result.images_at_once is not None:
            self.warnings.append(
                f'the GPU had no room for a batch of {result.name} ({result.stage}): '
                f'{result.images_at_once} images were computed at once, their gradients added up'
            )

    @property
    def bits_label(self) -> str:
        """The bits of most layers, as ``'W2A4'``; float is 32; empty while no layer is known.

        Where layers have three or more numbers of bits, the label is a range: ``'W2-8A4'``.
        """
        if not self.bits:
            return ''
        weight, activation = (_shown_bits(getattr(b, kind) for b in self.bits.values()) for kind in vars(LayerBits()))
        return f'W{weight}A{activation}'


def _shown_bits(bits: Iterable[int | None]) -> str:
    counts = Counter(32 if b is None else b for b in bits)
    if len(counts) > 2:
        return f'{min(counts)}-{max(counts)}'
    return str(min(counts, key=lambda b: (-counts[b], b)))
