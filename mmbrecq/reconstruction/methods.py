"""The methods of reconstruction that a config can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmbrecq.building import parse_options
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.stages import Stage, StageOptions
from mmbrecq.registry import RECONSTRUCTORS


@RECONSTRUCTORS.register_module()
class BRECQReconstructor(BaseReconstructor):
    """Learns weights first, with float activations; then the step sizes of activations (Li et al., ICLR 2021).

    Args:
        weights: Options of :class:`StageOptions` for the first pass.
        activations: Options for the second.
        **common: As in :class:`BaseReconstructor`.

    Example:
        >>> reconstructor = BRECQReconstructor({'iterations': 2000}, {'iterations': 500})
        >>> [(stage.name, stage.options.iterations) for stage in reconstructor.stages]
        [('weights', 2000), ('activations', 500)]
    """

    def __init__(
        self,
        weights: Mapping[str, Any] | None = None,
        activations: Mapping[str, Any] | None = None,
        network: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        mirror: bool = False,
        cache: str = 'auto',
        cache_dtype: str = 'float32',
        memory_limit: int | str | None = None,
    ) -> None:
        second = parse_options(StageOptions, activations or {}, 'reconstructor.activations', iterations=5000)
        stages = (
            Stage('weights', parse_options(StageOptions, weights or {}, 'reconstructor.weights'), True, False),
            Stage('activations', second, False, True),
        )
        super().__init__(stages, network, loss, mirror, cache, cache_dtype, memory_limit)


@RECONSTRUCTORS.register_module()
class QDropReconstructor(BaseReconstructor):
    """Learns rounding and step sizes together, with random dropping of quantization (Wei et al., ICLR 2022).

    Args:
        joint: Options of :class:`StageOptions` for the one pass.
        **common: As in :class:`BaseReconstructor`.
    """

    def __init__(
        self,
        joint: Mapping[str, Any] | None = None,
        network: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        mirror: bool = False,
        cache: str = 'auto',
        cache_dtype: str = 'float32',
        memory_limit: int | str | None = None,
    ) -> None:
        where = 'reconstructor.joint'
        options = parse_options(StageOptions, joint or {}, where, activation_lr=4e-5, drop_prob=0.5)
        stages = [Stage('joint', options, True, True)]
        super().__init__(stages, network, loss, mirror, cache, cache_dtype, memory_limit)
