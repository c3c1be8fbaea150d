"""What the verifier is told to expect, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
class ExpectedQuantization:
    """What the quantized torch model says about the file that was written from it.

    The two mappings are keyed by names of ONNX nodes. OpenVINO renames nodes, so an IR is held against
    ``layers`` alone.

    Args:
        layers: Number of convolution and linear calls with quantized weights; a layer that is called
            once per pyramid level counts once per call.
        weight_bits: Name of a Conv, ConvTranspose, Gemm or MatMul node -> bits of its weight, 2 to 8.
        activation_ranges: Name of a QuantizeLinear node -> ``(quant_min, quant_max)`` of its activation,
            integers in the node's 8-bit container.
    """

    layers: int
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    activation_ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
