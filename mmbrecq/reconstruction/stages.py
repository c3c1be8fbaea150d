"""Defines what a reconstruction works on, what each of its passes over all units learns, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmbrecq.building import check_integer, check_number, expect
from mmbrecq.calibration.regions import RegionCapture
from mmbrecq.data.groups import Images
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel
from mmbrecq.reconstruction.losses import TaskLoss
from mmbrecq.reconstruction.results import FinishedUnit

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


@dataclass
class Task:
    """Holds what a reconstruction works on.

    Args:
        model: Prepared, with calibrated grids.
        images: Preprocessed calibration images, ``(N, 3, H, W)``, or groups of them.
        batches: Gives the calibration data with annotations again, in the order of ``images``.
        task_loss: The task loss through the model; only a Fisher-weighted loss needs it, which without it weighs by the
            distance of the outputs.
        seed: Seed of all random draws.
        directory: Where a cache on disk is written.
        done: Pass and name of the units that are reconstructed already, their state in the model: they are skipped.
        first: Number of the first image among those of all processes.
        resumed: By pass and name, the units that an interrupted run has done. Each gets its state when its turn comes,
            so that all that is computed in between meets the model as it was then.
        observed: Images that the interrupted run observed at once; None for as many as have room.
    """

    model: QuantizedModel
    images: Images
    batches: Callable[[], Iterable[Any]]
    task_loss: TaskLoss | None
    seed: int
    directory: Path
    done: frozenset[tuple[str, str]] = frozenset()
    first: int = 0
    resumed: Mapping[tuple[str, str], FinishedUnit] = field(default_factory=dict)
    observed: int | None = None

    @property
    def regions(self) -> RegionCapture:
        """Captures the inputs of the heads of a two-stage detector."""
        return RegionCapture(self.model, self.images, self.batches, self.seed, self.first)
