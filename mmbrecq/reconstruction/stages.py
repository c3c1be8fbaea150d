"""What one pass over all units learns, and how."""

from __future__ import annotations

from dataclasses import dataclass

from mmbrecq.errors import ConfigError


@dataclass(frozen=True)
class StageOptions:
    """Options of one pass, as a config gives them.

    Args:
        iterations: Optimisation steps per unit.
        batch_size: Images per step.
        lr: Adam's learning rate of the rounding variables.
        bias_lr: Adam's learning rate of the bias corrections, falling to 0 along a cosine; 0 leaves biases alone.
        weight_scale_lr: Adam's learning rate of a factor on every weight scale, likewise; 0 leaves scales alone.
        activation_lr: Adam's learning rate of the activation step sizes, falling to 0 along a cosine.
        round_weight: Weight of the rounding regulariser.
        beta: Exponent of the regulariser after the warm-up and at the end.
        warmup: Fraction of the steps without regulariser.
        drop_prob: Probability, per element, of passing a float activation on instead of its quantized value, and of
            reading a unit's float input instead of the quantized one (QDrop, Wei et al., ICLR 2022).
    """

    iterations: int = 20000
    batch_size: int = 32
    lr: float = 1e-3
    bias_lr: float = 1e-3
    weight_scale_lr: float = 3e-4
    activation_lr: float = 4e-4
    round_weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    drop_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ('iterations', 'batch_size'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f'expected {name} of a reconstruction to be an integer >= 1, but got {value!r}')
        for name in ('lr', 'bias_lr', 'weight_scale_lr', 'activation_lr', 'round_weight'):
            value = getattr(self, name)
            if not 0 <= value < float('inf'):
                raise ConfigError(f'expected {name} of a reconstruction to be >= 0 and finite, but got {value!r}')
        if len(self.beta) != 2 or min(self.beta) <= 1:
            raise ConfigError(f'expected beta of a reconstruction to be two numbers above 1, but got {self.beta!r}')
        for name in ('warmup', 'drop_prob'):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f'expected {name} of a reconstruction to be in [0, 1), but got {value!r}')


@dataclass(frozen=True)
class Stage:
    """One pass over all units.

    Args:
        name: ``weights``, ``activations`` or ``joint``.
        options: Its options.
        learns_rounding: Optimises the rounding of weights.
        learns_scale: Optimises the step sizes of activations.
    """

    name: str
    options: StageOptions
    learns_rounding: bool
    learns_scale: bool

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized during the pass."""
        return self.learns_scale
