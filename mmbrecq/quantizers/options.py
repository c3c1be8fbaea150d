"""Checks the options of a quantizer in a config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from mmbrecq.building import check_integer, check_number, expect
from mmbrecq.errors import PatternError
from mmbrecq.qtype import MAX_BITS, MIN_BITS

FLOAT = 'float'
"""Value of an option for bits that leaves the values in float."""


@dataclass(frozen=True)
class _GridOptions:
    bits: int | None
    per_channel: bool = False
    symmetric: bool | None = None
    observer: Mapping[str, Any] = field(default_factory=lambda: {'type': 'MSEObserver', 'p': 2.4})


@dataclass(frozen=True)
class WeightOptions(_GridOptions):
    """Holds the options of weights.

    Args:
        bits: Bit-width, 2 to 8.
        per_channel: One scale per output channel, else one per tensor.
        symmetric: Zero-point 0; None is the preset's choice.
        observer: Config of the range estimator.
        rounding: Config of the fake quantizer that rounds.
    """

    per_channel: bool = True
    rounding: Mapping[str, Any] = field(default_factory=lambda: {'type': 'AdaRound'})


@dataclass(frozen=True)
class ActivationOptions(_GridOptions):
    """Holds those of :class:`WeightOptions` for activations, with the config of a fake quantizer for ``rounding``."""

    fake_quant: Mapping[str, Any] = field(default_factory=lambda: {'type': 'LSQ'})


@dataclass(frozen=True)
class Override:
    """Sets bits of the layers that a pattern matches; None leaves them as they are.

    Args:
        pattern: Glob over layer paths, such as ``backbone.layer4.*``.
        weight_bits: Bit-width of the weights, or ``'float'``.
        activation_bits: Bit-width of the layer's input, or ``'float'``.
        reason: Why, where mmbrecq has set them itself.
    """

    pattern: str
    weight_bits: int | str | None = None
    activation_bits: int | str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class FallbackOptions:
    """Holds the options of layers whose inputs are hurt: by 8 bits, so that they stay in float, or by fewer bits.

    Args:
        bound: Loss of the outputs, see :class:`~mmbrecq.mixed_precision.sensitivity.measure.OutputLoss`, that all
            activations at 8 bits may have together; above it the layers behind the worst ones stay in float.
        limit: Largest share of the layers that stay in float for it, 0 to 1; 0 for none.
        low_bound: Loss that a single activation below 8 bits may have; the layers behind one that has more read 8 bits,
            the worst first. None for no such.
        low_limit: Largest share of the layers that read 8 bits for it, 0 to 1, rounded up.
        images: Most calibration images that are looked at; large ones are fewer.
    """

    bound: float = 0.02
    limit: float = 0.1
    low_bound: float | None = 0.05
    low_limit: float = 0.1
    images: int = 16

    def __post_init__(self) -> None:
        intervals = {'bound': '[0, inf]', 'limit': '[0, 1]', 'low_bound': '[0, inf]', 'low_limit': '[0, 1]'}
        for name, interval in intervals.items():
            if name != 'low_bound' or self.low_bound is not None:
                check_number(getattr(self, name), interval, f'quantizer.fallback.{name}')
        check_integer(self.images, 1, 'quantizer.fallback.images')


def check_bits(bits: Any, where: str) -> int | None:
    """Returns a bit-width, or None for ``'float'`` and None; ConfigError names ``where``."""
    if bits is None or bits == FLOAT:
        return None
    valid = type(bits) is int and MIN_BITS <= bits <= MAX_BITS
    expect(valid, f"{where} to be in {MIN_BITS}..{MAX_BITS} or '{FLOAT}'", bits)
    return int(bits)


def with_bits(config: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """Returns the config of a quantizer with all weights and activations at ``bits``, but for what stays in float."""
    kinds = ('weight_bits', 'activation_bits')
    kept = [{k: v for k, v in o.items() if k not in kinds or v == FLOAT} for o in config.get('overrides', ())]
    activation = {**(config.get('activation') or {}), 'bits': bits}
    return {**config, 'weight': {**config['weight'], 'bits': bits}, 'activation': activation, 'overrides': kept}


def assign_bits(
    layers: list[str],
    first_last: set[str],
    weight_bits: int | None,
    activation_bits: int | None,
    overrides: list[Override],
) -> dict[str, tuple[int | None, int | None]]:
    """Returns ``{path: (weight bits, activation bits)}`` of the layers; None is float.

    These are the defaults, then 8 bits for the layers ``first_last``, then the overrides in order, of which later ones
    win; PatternError is raised if one matches no layer.
    """
    eight = [None if default is None else MAX_BITS for default in (weight_bits, activation_bits)]
    bits = {layer: (eight[0], eight[1]) if layer in first_last else (weight_bits, activation_bits) for layer in layers}
    for index, override in enumerate(overrides):
        matching = [layer for layer in layers if fnmatchcase(layer, override.pattern)]
        if not matching:
            raise PatternError(
                f"expected quantizer.overrides[{index}].pattern to match a layer, but '{override.pattern}' matches "
                f'none of {len(layers)} (the first is {layers[0]})'
            )
        weight = check_bits(override.weight_bits, f'quantizer.overrides[{index}].weight_bits')
        activation = check_bits(override.activation_bits, f'quantizer.overrides[{index}].activation_bits')
        for layer in matching:
            old = bits[layer]
            given = (override.weight_bits is not None, override.activation_bits is not None)
            bits[layer] = (weight if given[0] else old[0], activation if given[1] else old[1])
    return bits
