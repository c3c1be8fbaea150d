"""Checks an exported file, without running it, against the rules of its preset: the table says where each is from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmbrecq.deploy.verify import onnx_openvino, onnx_ort, onnx_structure, onnx_tensorrt, onnx_values
from mmbrecq.deploy.verify.ir import read_ir, verify_ir
from mmbrecq.deploy.verify.onnx_graph import ExpectedQuantization, Faults, OnnxGraph, read_onnx
from mmbrecq.errors import ConfigError, ExportError

NAMED = 3
"""Violations that an error names."""


@dataclass(frozen=True)
class Violation:
    """One broken rule.

    Args:
        rule: Id of the rule, such as ``'C1'``.
        node: Name of the node that breaks it; the graph's name where no single node does.
        message: One sentence: what is expected, what was found.
    """

    rule: str
    node: str
    message: str

    def __str__(self) -> str:
        return f'{self.rule} {self.node}: {self.message}'


@dataclass(frozen=True)
class Rule:
    """A rule: one line that states it, its source, its check of an ONNX file, and whether an IR is held against it."""

    description: str
    source: str
    onnx: Callable[[OnnxGraph], Faults] | None = None
    ir: bool = False


_ONNX = 'ONNX operator specification'
_TRT = 'NVIDIA TensorRT guide, Explicit Quantization'
_ORT = 'ONNX Runtime, Q/DQ transformer'
_OV = 'OpenVINO, FakeQuantize and low-precision transformations'

RULES: dict[str, Rule] = {
    'C1': Rule('scales are constant, finite and > 0', _ONNX, onnx_structure.check_scales, ir=True),
    'C2': Rule('a zero-point is given, of the shape of the scale', _ONNX, onnx_structure.check_zero_points),
    'C3': Rule('per-channel axis explicit, its length that of the scale, output channels for a weight', _ONNX,
               onnx_structure.check_axes),
    'C4': Rule('the opset allows the types used', _ONNX, onnx_structure.check_opset),
    'C5': Rule('every Q feeds one DQ of the same grid, no pair follows another, all quantized layers are there', _ONNX,
               onnx_structure.check_pairs),
    'C6': Rule('weights lie on the grid of their bits', _ONNX, onnx_values.check_weights),
    'C7': Rule('grids of activations are those of the model and hold 0; a Clip before Q cuts at '
               '(integer - zero_point) * scale, one between Q and DQ at integers', _ONNX, onnx_values.check_grids),
    'C8': Rule('biases stay float32', _ONNX, onnx_values.check_biases),
    'C9': Rule('biases fit int32 in units of input scale times weight scale', _ORT, onnx_values.check_bias_range),
    'T1': Rule('int8 only, zero-points 0, no Clip of integers', _TRT, onnx_tensorrt.check_int8),
    'T2': Rule('activations per tensor', _TRT, onnx_tensorrt.check_per_tensor),
    'T3': Rule('Q/DQ on input and weight of Conv, ConvTranspose, Gemm and MatMul, or, left in float, on neither', _TRT,
               onnx_tensorrt.check_inputs),
    'T4': Rule('no Q/DQ between a convolution and its BatchNorm, ReLU or Pad', _TRT, onnx_tensorrt.check_fusions),
    'T5': Rule('residual add: Q/DQ on the shortcut, none between the convolution and the add', _TRT,
               onnx_tensorrt.check_residuals),
    'T6': Rule('concat inputs: all quantized with equal scales, or none', _TRT, onnx_tensorrt.check_concats),
    'O1': Rule('a Q after each quantized convolution, or after its ReLU; network outputs are exempt', _ORT,
               onnx_ort.check_outputs),
    'O2': Rule('uint8 with zero-point 0 after a ReLU', _ORT, onnx_ort.check_relu_grids),
    'O3': Rule('max-pool has one scale and zero-point on both sides', _ORT, onnx_ort.check_pools),
    'V1': Rule('255 or 256 levels', _OV, onnx_openvino.check_levels, ir=True),
    'V2': Rule('ranges below 0 have 0 among 256 levels, int8 at zero-point 0, or are symmetric in 255', _OV,
               onnx_openvino.check_signed, ir=True),
    # an unsigned zero-point is a level, so no file in ONNX can break it
    'V3': Rule('ranges without values below 0 start at 0', _OV, ir=True),
    'V4': Rule('input and weight of a layer are both quantized, or neither, and weights are symmetric', _OV,
               onnx_openvino.check_layer_inputs, ir=True),
    'V5': Rule('activations per tensor, or per channel where of all layers depthwise convolutions read them', _OV,
               onnx_openvino.check_per_tensor, ir=True),
    'V6': Rule('no quantization on the network output', _OV, onnx_openvino.check_network_outputs, ir=True),
    'V7': Rule('quantized inputs of a concatenation have one grid', _OV, onnx_structure.check_concat_grids),
}  # fmt: skip

# Preset -> first letters of the rules it asks for.
PRESETS: dict[str, str] = {'academic': 'C', 'onnxruntime': 'CO', 'openvino': 'CV', 'tensorrt': 'CT'}


def rules_of(preset: str, suffix: str | None = None) -> dict[str, Rule]:
    """Rules that ``preset`` asks for, by id; with ``suffix`` those that a file of this kind is held against."""
    asked = {name: rule for name, rule in RULES.items() if name[0] in PRESETS[preset]}
    return {
        name: rule for name, rule in asked.items() if suffix is None or (rule.onnx if suffix == '.onnx' else rule.ir)
    }


def verify_file(path: str | Path, preset: str, expected: ExpectedQuantization | None = None) -> list[Violation]:
    """Applies the rules of ``preset`` to an exported file.

    Args:
        path: ``.onnx`` with Q/DQ nodes, or ``.xml``, an OpenVINO IR, which shows whether C1 and V1 to V6 hold.
        preset: ``'academic'``, ``'onnxruntime'``, ``'openvino'`` or ``'tensorrt'``.
        expected: What the quantized torch model says of an ONNX file; None checks the file on its own.

    Returns:
        Broken rules in the order of their ids; empty if the file is fine.

    Raises:
        ConfigError: Unknown preset.
        ExportError: The file is missing, cannot be read, or is of another kind.
        DependencyError: The package that reads the file is not installed.
    """
    path = Path(path)
    if preset not in PRESETS:
        raise ConfigError(f'expected a preset of {", ".join(PRESETS)}, but got {preset!r}')
    if path.suffix not in ('.onnx', '.xml'):
        raise ExportError(f'{path}: expected an .onnx or .xml file, but got suffix {path.suffix!r}')
    if not path.is_file():
        raise ExportError(f'{path}: expected an exported file, but there is none')
    rules = rules_of(preset, path.suffix)
    if path.suffix == '.xml':
        found = [Violation(*fault) for fault in verify_ir(read_ir(path))]
        return sorted((v for v in found if v.rule in rules), key=lambda violation: violation.rule)
    graph = read_onnx(path, expected)
    return [Violation(name, *fault) for name, rule in rules.items() if rule.onnx for fault in rule.onnx(graph)]


def check_file(
    path: str | Path,
    preset: str,
    expected: ExpectedQuantization | None = None,
    shown_as: str | Path | None = None,
) -> None:
    """Raises ExportError where :func:`verify_file` finds anything.

    The message names the file, as ``shown_as`` where given, and the first rules and nodes, and counts the others.
    """
    violations = verify_file(path, preset, expected)
    if violations:
        named = '; '.join(str(violation) for violation in violations[:NAMED])
        others = f'; and {len(violations) - NAMED} more' if len(violations) > NAMED else ''
        raise ExportError(f'{shown_as or path} breaks the rules of preset {preset!r}: {named}{others}')
