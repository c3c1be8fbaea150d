"""The methods of reconstruction that a config can name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmbrecq.building import parse_options
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.stages import Stage, StageOptions
from mmbrecq.registry import RECONSTRUCTORS


@RECONSTRUCTORS.register_module()
@dataclass(eq=False)
class BRECQReconstructor(BaseReconstructor):
    """Learns weights first, with float activations; then the step sizes of activations (Li et al., ICLR 2021).

    Its other options are those of :class:`BaseReconstructor`.

    Args:
        weights: Options of :class:`StageOptions` for the first pass.
        activations: Options for the second.

    Example:
        >>> reconstructor = BRECQReconstructor({'iterations': 2000}, {'iterations': 500})
        >>> [(stage.name, stage.options.iterations) for stage in reconstructor.stages]
        [('weights', 2000), ('activations', 500)]
    """

    weights: Mapping[str, Any] | None = None
    activations: Mapping[str, Any] | None = None

    def own_stages(self) -> Sequence[Stage]:
        first = parse_options(StageOptions, self.weights or {}, 'reconstructor.weights')
        second = parse_options(StageOptions, self.activations or {}, 'reconstructor.activations', iterations=5000)
        return Stage('weights', first, True, False), Stage('activations', second, False, True)


@RECONSTRUCTORS.register_module()
@dataclass(eq=False)
class QDropReconstructor(BaseReconstructor):
    """Learns rounding and step sizes together, with random dropping of quantization (Wei et al., ICLR 2022).

    Its other options are those of :class:`BaseReconstructor`.

    Args:
        joint: Options of :class:`StageOptions` for the one pass.
    """

    joint: Mapping[str, Any] | None = None

    def own_stages(self) -> Sequence[Stage]:
        joint = self.joint or {}
        options = parse_options(StageOptions, joint, 'reconstructor.joint', drop_prob=0.5)
        return (Stage('joint', options, True, True),)
