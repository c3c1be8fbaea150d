"""What one pass over all units learns, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmbrecq.building import check_integer, check_number, expect
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
            check_integer(getattr(self, name), 1, f'{name} of a reconstruction')
        rates = ('lr', 'bias_lr', 'weight_scale_lr', 'activation_lr', 'round_weight')
        intervals = {**dict.fromkeys(rates, '[0, inf)'), **dict.fromkeys(('warmup', 'drop_prob', 'plateau'), '[0, 1)')}
        for name, interval in intervals.items():
            value = getattr(self, name)
            if value is not None or name not in ('lr', 'activation_lr'):
                check_number(value, interval, f'{name} of a reconstruction')
        pair = isinstance(self.beta, (list, tuple)) and len(self.beta) == 2
        valid = pair and all(isinstance(value, (int, float)) and value > 1 for value in self.beta)
        expect(valid, 'beta of a reconstruction to be two numbers above 1', self.beta)
        fits = self.fit_ranges is None or isinstance(self.fit_ranges, bool)
        expect(fits, 'fit_ranges of a reconstruction to be None or a boolean', self.fit_ranges)
        known = self.autocast in (None, *AUTOCAST)
        expect(known, f'autocast of a reconstruction to be None or one of {list(AUTOCAST)}', self.autocast)

    @property
    def rounding_lr(self) -> float:
        """Returns the learning rate of the rounding variables."""
        return 1e-3 * math.sqrt(20000 / self.iterations) if self.lr is None else self.lr


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
