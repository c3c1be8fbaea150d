"""What one pass over all units learns, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmbrecq.errors import ConfigError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedGraph

AUTOCAST = {'bfloat16': torch.bfloat16}
"""Dtypes that layers may multiply in, by their names in a config."""


SCALE_LR = 5e-3
"""Learning rate of a step size by default, as a fraction of it: in one network they differ by a factor of a hundred."""


@dataclass(frozen=True)
class StageOptions:
    """Options of one pass, as a config gives them.

    Args:
        iterations: Iterations of the optimiser for each unit.
        batch_size: Images of an iteration.
        lr: Adam's learning rate of the rounding variables; None for 1e-3 with 20,000 iterations, and the more the fewer
            there are, so that a short run rounds as far away: ``1e-3 * sqrt(20000 / iterations)``.
        bias_lr: Adam's learning rate of the bias corrections, falling to 0 along a cosine; 0 leaves biases alone.
        weight_scale_lr: Adam's learning rate of a factor on every weight scale, likewise; 0 leaves scales alone.
        activation_lr: Adam's learning rate of the activation step sizes, falling to 0 along a cosine; None for 1/200 of
            each.
        round_weight: Weight of the rounding regulariser.
        beta: Exponent of the regulariser after the warm-up and at the end.
        warmup: Fraction of the iterations without regulariser.
        drop_prob: Probability, per element, of passing a float activation on instead of its quantized value, and of
            reading a unit's float input instead of the quantized one (QDrop, Wei et al., ICLR 2022).
        plateau: Fraction by which the mean loss of 100 iterations must fall below the best before. If it does not, a
            unit is done early, or where rounding is learned its warm-up is; 0 for never.
        fit_ranges: Whether step sizes start from the multiple of the observed one with which the unit computes its
            outputs best; None for where all its outputs are tokens, ``(N, T, C)``.
        autocast: ``'bfloat16'`` for layers that multiply in it while they are trained; None for float32. Fake
            quantization, losses and all that is learned are float32 either way, and so are the losses that decide
            what is kept.
    """

    iterations: int = 20000
    batch_size: int = 32
    lr: float | None = None
    bias_lr: float = 1e-3
    weight_scale_lr: float = 3e-4
    activation_lr: float | None = None
    round_weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    drop_prob: float = 0.0
    plateau: float = 0.0
    fit_ranges: bool | None = None
    autocast: str | None = None

    def __post_init__(self) -> None:
        for name in ('iterations', 'batch_size'):
            value = getattr(self, name)
            self._expect(type(value) is int and value >= 1, name, 'an integer >= 1')
        for name in ('lr', 'bias_lr', 'weight_scale_lr', 'activation_lr', 'round_weight'):
            value = getattr(self, name)
            if name not in ('lr', 'activation_lr') or value is not None:
                self._expect(_is_number(value) and 0 <= value < math.inf, name, 'a finite number >= 0')
        for name in ('warmup', 'drop_prob', 'plateau'):
            value = getattr(self, name)
            self._expect(_is_number(value) and 0 <= value < 1, name, 'a number in [0, 1)')
        pair = isinstance(self.beta, Sequence) and len(self.beta) == 2 and all(map(_is_number, self.beta))
        self._expect(pair and min(self.beta) > 1, 'beta', 'two numbers above 1')
        self._expect(self.fit_ranges is None or isinstance(self.fit_ranges, bool), 'fit_ranges', 'None or a boolean')
        self._expect(self.autocast in (None, *AUTOCAST), 'autocast', f'None or one of {list(AUTOCAST)}')

    @property
    def rounding_lr(self) -> float:
        """Returns the learning rate of the rounding variables."""
        return 1e-3 * math.sqrt(20000 / self.iterations) if self.lr is None else self.lr

    def _expect(self, valid: bool, name: str, what: str) -> None:
        if not valid:
            raise ConfigError(f'expected {name} of a reconstruction to be {what}, but got {getattr(self, name)!r}')


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Stage:
    """One pass over all units.

    Args:
        name: ``weights``, ``activations``, ``joint`` or ``network``.
        options: Its options.
        learns_rounding: Optimises the rounding of weights.
        quantizes_activations: Quantizes activations, and optimises their step sizes.
        granularity: Into what the network is cut for this pass; None for the units of the quantizer.
        observes: Step sizes start from the observer's range over the quantized stream, not from where they are.
        independent: Every unit reads the float stream, so that what it learns does not depend on the units before it.
    """

    name: str
    options: StageOptions
    learns_rounding: bool
    quantizes_activations: bool
    granularity: str | None = None
    observes: bool = True
    independent: bool = False


def stage_units(graph: QuantizedGraph, stage: Stage) -> list[ReconstructionUnit]:
    """Returns the units that a graph is cut into for a pass."""
    return graph.units if stage.granularity is None else graph.cut(stage.granularity)
