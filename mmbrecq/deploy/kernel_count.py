"""How many quantized layers a runtime computes in integers, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class KernelCount:
    """The quantized layers of a file, and those among them that its runtime executes with integer arithmetic.

    Args:
        quantized: Calls of convolutions and linear layers whose weight is stored as integers.
        integer: Those that the runtime's own execution graph computes in 8-bit integers.
        float_layers: Names of the others in the order of the file, each with the reason.
    """

    quantized: int = 0
    integer: int = 0
    float_layers: dict[str, str] = field(default_factory=dict)

    def describe(self, runtime: str) -> str:
        """Returns the count in words, with the layers that run in float and why."""
        floats = ', '.join(f'{name} ({why})' for name, why in self.float_layers.items())
        words = f'{runtime} runs {self.integer} of {self.quantized} quantized layers in integers'
        return f'{words}; in float: {floats}' if floats else words
