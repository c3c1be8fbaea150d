"""Defines the rules of each deployment target for grids and for the positions of activation quantizers.

A preset is chosen before calibration, because positions and symmetry decide what the reconstruction has to learn.
"""

from dataclasses import dataclass
from typing import Literal

from mmbrecq.errors import ConfigError
from mmbrecq.qtype import MAX_BITS, QType


@dataclass(frozen=True)
class Preset:
    """Holds the rules of one target.

    Args:
        name: Name of the preset in a config.
        weight_symmetric: Zero-point 0 for weights.
        activation: ``unsigned`` (zero-point 0 where values cannot be negative, else any, or int8 with zero-point 0 if
            symmetric grids are asked for) or ``int8``.
        fuses: Activation functions that the target computes within the convolution, so that nothing is quantized
            between the two; None for all of them.
        computes: Activation functions that it computes with integers, apart from convolutions.
        fuses_beside: What it computes within a layer even where the value of the layer has other readers.
        add_operands: Which convolution outputs are quantized that feed a residual add alone.
        conv_outputs: Quantizes the output of every convolution, the network's own outputs excepted.
        equal_concat: All inputs of a concatenation share one scale.
        quantizes_concat: Quantizes what a layer reads behind a concatenation once more, on a grid of its own.
        spare_weight_bit: Keeps 8-bit weights within 7 bits of their container. Kernels for CPUs without VNNI add two
            products of 8 bits in 16; with weights in -64..63 the sum cannot overflow.
        integer_clip: A grid smaller than its container is cut by a Clip of integers, between Q and DQ, which leaves
            the convolution before it in integer arithmetic; else by a Clip of real values before Q.
        bias_apart: Which layers have their bias added by a node of its own: ``none``, ``linear`` or ``all`` layers.
            ONNX Runtime rounds the bias of a quantized layer to int32 in units of input scale times weight scale,
            which is coarse at low bits; it leaves a bias alone that is added apart.
        bias_rounded: Rounds the other biases to just that grid, so that the simulation has them as the target does, or
            as ONNX Runtime has them, where files for TensorRT are checked.
        depthwise_per_channel: Gives the channels of a value that depthwise convolutions alone read a scale each.
        folds_channel_scales: Such scales become part of the layers around, since the target computes with one scale per
            tensor; the channels then share their zero-point.
        folds_zero_points: Zero-points that the target does not have become part of the layers around, where these pad
            nothing with zeros.
        products: Products of activations of which both operands are quantized: ``all``, or ``scores``, those that a
            softmax reads: OpenVINO computes an attention faster whose queries and keys are int8 with zero-point 0, and
            slower one with more grids. The other targets compute a fused attention in float.
        falls_back: Leaves the layers in float whose inputs 8 bits hurt most, see
            :mod:`mmbrecq.mixed_precision.diagnosis`; papers quantize them all.
    """

    name: str
    weight_symmetric: bool
    activation: Literal['unsigned', 'int8']
    fuses: tuple[str, ...] | None = None
    computes: tuple[str, ...] = ()
    fuses_beside: tuple[str, ...] = ()
    add_operands: Literal['none', 'shortcut', 'all'] = 'none'
    conv_outputs: bool = False
    equal_concat: bool = True
    quantizes_concat: bool = False
    spare_weight_bit: bool = False
    integer_clip: bool = True
    bias_apart: Literal['none', 'linear', 'all'] = 'none'
    bias_rounded: bool = False
    depthwise_per_channel: bool = False
    folds_channel_scales: bool = False
    folds_zero_points: bool = False
    products: Literal['none', 'scores', 'all'] = 'none'
    falls_back: bool = True

    def weight_qtype(self, bits: int, per_channel: bool, ch_axis: int, symmetric: bool | None) -> QType:
        """Returns the grid of a weight whose output channels lie on ``ch_axis``; ``symmetric`` None is the default."""
        symmetric = self.weight_symmetric if symmetric is None else symmetric
        if self.weight_symmetric and not symmetric:
            raise ConfigError(f"expected symmetric weights for the preset '{self.name}', but got symmetric=False")
        spare_bits = int(self.spare_weight_bit and bits == MAX_BITS)
        return QType(bits, symmetric, symmetric, ch_axis if per_channel else None, spare_bits=spare_bits)

    def activation_qtype(self, bits: int, non_negative: bool, symmetric: bool | None, per_channel: bool) -> QType:
        """Returns the grid of an activation tensor ``(N, C, ...)``.

        Args:
            bits: Bit-width.
            per_channel: One scale per channel; only simulated, no target computes with it.
            non_negative: Whether the graph shows that the values cannot be negative.
            symmetric: Zero-point 0; None for the default of the preset.
        """
        kind, ch_axis = self.activation, 1 if per_channel else None
        if per_channel and self.name != 'academic':
            raise ConfigError(f"expected activations per tensor for the preset '{self.name}', but got per_channel=True")
        if symmetric is False and kind == 'int8':
            raise ConfigError(f"expected symmetric activations for the preset '{self.name}', but got symmetric=False")
        if kind == 'int8':
            # an int8 container has room for an unsigned grid of up to 7 bits
            unsigned = non_negative and bits < MAX_BITS
            return QType(bits, symmetric=True, signed=not unsigned, ch_axis=ch_axis, int8_only=True)
        if not symmetric and not non_negative:
            return QType(bits, symmetric=False, signed=False, ch_axis=ch_axis)
        return QType(bits, symmetric=True, signed=not non_negative, ch_axis=ch_axis)


# names of operations, see `mmbrecq.graph.symbolic.operation`
_RELU = ('relu', 'relu6')
_NORMS = ('batchnorm', 'batchnorm1d', 'batchnorm2d', 'batchnorm3d')
_BESIDE = (*_RELU, *_NORMS, 'leakyrelu', 'prelu', 'hardtanh', 'clamp')

_ALL = (
    Preset(
        'academic', weight_symmetric=False, activation='unsigned', equal_concat=False, bias_apart='all',
        products='all', falls_back=False,
    ),
    Preset(
        'onnxruntime', weight_symmetric=True, activation='unsigned', fuses=_RELU, computes=('leakyrelu', 'sigmoid'),
        add_operands='all', conv_outputs=True, equal_concat=False, quantizes_concat=True, spare_weight_bit=True,
        bias_apart='linear', bias_rounded=True, depthwise_per_channel=True, folds_channel_scales=True,
    ),
    Preset(
        'openvino', weight_symmetric=True, activation='unsigned', spare_weight_bit=True, depthwise_per_channel=True,
        products='scores',
    ),
    Preset(
        'tensorrt', weight_symmetric=True, activation='int8', fuses=_RELU, fuses_beside=_BESIDE,
        add_operands='shortcut', integer_clip=False, bias_rounded=True, depthwise_per_channel=True,
        folds_channel_scales=True, folds_zero_points=True,
    ),
)  # fmt: skip

PRESETS = {preset.name: preset for preset in _ALL}
"""The presets by name."""


def get_preset(name: str) -> Preset:
    """Returns the preset of that name; ConfigError lists the valid ones.

    Example:
        >>> get_preset('openvino').weight_qtype(8, per_channel=True, ch_axis=0, symmetric=None).quant_max
        63
    """
    if name not in PRESETS:
        raise ConfigError(f'expected preset to be one of {sorted(PRESETS)}, but got {name!r}')
    return PRESETS[name]


IR_PRESET = ('mmbrecq', 'preset')
"""Path of the preset's name in the runtime information of an OpenVINO IR."""
