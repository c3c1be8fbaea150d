"""Which modules of a model hold its arithmetic, and how a graph takes their place.

Any model whose ``forward`` takes images is replaced as a whole. An OpenMMLab model has components: each (backbone,
neck, head) goes on owning its parameters and its ``predict``, ``loss`` and post-processing; only its ``forward`` is
replaced. The components that follow from the image alone are one graph: the first computes it all,
the others hand its result through. The heads of a two-stage detector, which read what was cut out of the features along
the way, are one graph each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.modules import set_forward

COMPONENTS = ('backbone', 'neck', 'rpn_head', 'head', 'bbox_head')
"""Attributes of a model whose ``forward`` follows from the image alone, in the order in which they run."""

REGION_KINDS = ('bbox', 'mask')
"""What a RoI head has a head and an extractor of features for."""


@dataclass(frozen=True)
class RegionHead:
    """A head that reads features of regions.

    Args:
        path: Of the head below the model.
        extractor: Path of what cuts its input out of the feature maps.
    """

    path: str
    extractor: str


class Features(tuple[Tensor, ...]):
    """Feature maps that bring the outputs of the RPN head along."""

    rpn_outputs: Any

    @classmethod
    def of(cls, features: Iterable[Tensor], rpn_outputs: Any) -> Features:
        made = cls(features)
        made.rpn_outputs = rpn_outputs
        return made


class ImageForward(nn.Module):
    """All that follows from the image alone, as a module of one argument.

    Of a two-stage detector these are the feature maps that its heads read, and the outputs of the RPN head.

    Args:
        model: An OpenMMLab model, or any whose ``forward`` takes images alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        """From preprocessed images, ``(N, 3, H, W)``, to raw outputs."""
        model: Any = self.model
        if not has_modes(model):
            return model(inputs)
        if not is_two_stage(model):
            return model(inputs, mode='tensor')
        features = model.extract_feat(inputs)
        read = max(model.get_submodule(head.extractor).num_inputs for head in region_heads(model))
        return tuple(features)[:read], model.rpn_head(features)


class RegionForward(nn.Module):
    """One head of a two-stage detector as a module of one argument.

    Args:
        model: The detector.
        path: Of the head below it.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, inputs: Tensor) -> Any:
        """From features of regions, ``(R, C, h, w)``, to raw outputs."""
        return self.model.get_submodule(self.path)(inputs)


def has_modes(model: nn.Module) -> bool:
    """Whether ``forward`` has the modes of an OpenMMLab model, of which ``tensor`` is the arithmetic."""
    mode = inspect.signature(type(model).forward).parameters.get('mode')
    return mode is not None and mode.default in (inspect.Parameter.empty, 'tensor')


def is_two_stage(model: nn.Module) -> bool:
    """Whether regions that an RPN head proposes are looked at by heads of their own."""
    heads = [getattr(model, name, None) for name in ('rpn_head', 'roi_head')]
    return has_modes(model) and all(isinstance(head, nn.Module) for head in heads)


def region_heads(model: nn.Module) -> list[RegionHead]:
    """The heads of a two-stage detector that read features of regions, in the order in which they run.

    Raises:
        GraphError: The features of regions pass another module before they reach a head.
    """
    if not is_two_stage(model):
        return []
    roi_head: Any = model.roi_head
    if isinstance(getattr(roi_head, 'shared_head', None), nn.Module):
        raise GraphError('expected heads that read the features of regions, but roi_head.shared_head comes before them')
    found = []
    for kind in REGION_KINDS:
        head, extractor = f'{kind}_head', f'{kind}_roi_extractor'
        module = getattr(roi_head, head, None)
        if isinstance(module, nn.ModuleList):
            found += [RegionHead(f'roi_head.{head}.{i}', f'roi_head.{extractor}.{i}') for i in range(len(module))]
        elif isinstance(module, nn.Module):
            found.append(RegionHead(f'roi_head.{head}', f'roi_head.{extractor}'))
    return found


def region_shape(model: nn.Module, head: RegionHead) -> tuple[int, int, int]:
    """Shape of the features of one region, ``(C, h, w)``."""
    extractor: Any = model.get_submodule(head.extractor)
    size = extractor.roi_layers[0].output_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(extractor.out_channels), int(height), int(width)


def head_file(image_file: Path, path: str) -> Path:
    """Where the head ``path`` is exported to: beside the graph that reads images, its path in the name."""
    return image_file.with_name(f'{image_file.stem}.{path}{image_file.suffix}')


def components_of(model: nn.Module) -> list[nn.Module]:
    """The components that follow from the image alone, in the order in which they run."""
    found = [getattr(model, name, None) for name in COMPONENTS] if has_modes(model) else []
    return [component for component in found if isinstance(component, nn.Module)]


def attach(model: nn.Module, arithmetic: Callable[[Tensor], Any]) -> None:
    """Makes ``model`` compute ``arithmetic`` in place of its ``forward``, or of those of its components.

    Raises:
        GraphError: An OpenMMLab model has none of the known components.
    """
    if not has_modes(model):
        set_forward(model, arithmetic)
        return
    if not components_of(model):
        raise GraphError(f'expected {type(model).__name__} to have one of {list(COMPONENTS)}, but found none')
    first, *others = components_of(model)
    if is_two_stage(model):
        set_forward(first, lambda inputs: Features.of(*arithmetic(inputs)))
    else:
        set_forward(first, lambda inputs: arithmetic(inputs))
    for component in others:
        is_rpn = is_two_stage(model) and component is model.rpn_head
        set_forward(component, _rpn_outputs if is_rpn else _hand_through)


def _hand_through(value: Any) -> Any:
    return value


def _rpn_outputs(features: Features) -> Any:
    return features.rpn_outputs
