"""Finds the modules that hold the arithmetic of a model, and lets graphs run instead of them.

Any model whose ``forward`` reads images is replaced as a whole. An OpenMMLab model has components: each (backbone,
neck, head) goes on owning its parameters and its ``predict``, ``loss`` and post-processing; only its ``forward`` is
replaced. The components that follow from the image alone are one graph: the first computes it all, the others return
its result. The heads of a two-stage detector, which read what was cut out of the features, are one graph each.

A detector with a transformer (DETR and what followed it) also reads the sizes of the images, and masks what a batch was
padded with. Its graph reads images alone, so it is that of images without padding; a batch with padding is refused.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn

from mmbrecq.errors import DataError, GraphError
from mmbrecq.graph.structure import split_outputs

COMPONENTS = ('backbone', 'neck', 'rpn_head', 'head', 'bbox_head')
"""Attributes of a model whose ``forward`` follows from the image alone, in the order in which they run."""


@dataclass(frozen=True)
class RegionHead:
    """Paths of a head that reads features of regions, and of the module that cuts them out of the feature maps."""

    path: str
    extractor: str


class Features(tuple[Tensor, ...]):
    """Feature maps, and the outputs of the RPN head as an attribute."""

    rpn_outputs: Any


class ImageForward(nn.Module):
    """Computes all that follows from the image alone, as a module of one argument.

    For a two-stage detector it returns the feature maps that the heads read, and the outputs of the RPN head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        """Returns raw outputs for preprocessed images, ``(N, 3, H, W)``, as nested tuples, lists and dicts.

        The attribute ``restore`` becomes a function that makes of such what the model itself returns.
        """
        outputs, self.restore = split_outputs(self._outputs(inputs))
        return outputs

    def _outputs(self, inputs: Tensor) -> Any:
        model: Any = self.model
        if not has_modes(model):
            return model(inputs)
        if has_transformer(model):
            return _predictions(model, inputs)
        if not is_two_stage(model):
            return model(inputs, mode='tensor')
        features = model.extract_feat(inputs)
        read = max(model.get_submodule(head.extractor).num_inputs for head in region_heads(model))
        return tuple(features)[:read], model.rpn_head(features)


def _predictions(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    """Returns what the head of a transformer makes results of: scores and boxes of the last layer, ``(N, L, C)``."""
    size = tuple(images.shape[-2:])
    samples = [SimpleNamespace(img_shape=size, batch_input_shape=size, metainfo={}) for _ in range(images.shape[0])]
    read = model.forward_transformer(model.extract_feat(images), samples)
    own = vars(model.bbox_head).copy()
    object.__setattr__(model.bbox_head, 'predict_by_feat', lambda *outputs, **_: outputs)
    try:
        outputs = model.bbox_head.predict(**read, batch_data_samples=samples)
    finally:
        vars(model.bbox_head).clear()
        vars(model.bbox_head).update(own)
    return tuple(layers[-1] for layers in outputs)


class RegionForward(nn.Module):
    """Computes the head ``path`` of a two-stage detector, as a module of one argument."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, inputs: Tensor) -> Any:
        """Returns raw outputs for features of regions, ``(R, C, h, w)``."""
        return self.model.get_submodule(self.path)(inputs)


def has_modes(model: nn.Module) -> bool:
    """Returns whether ``forward`` has the modes of an OpenMMLab model, of which ``tensor`` is the arithmetic."""
    mode = inspect.signature(type(model).forward).parameters.get('mode')
    return mode is not None and mode.default in (inspect.Parameter.empty, 'tensor')


def is_two_stage(model: nn.Module) -> bool:
    """Returns whether regions that an RPN head proposes are read by heads of their own."""
    heads = [getattr(model, name, None) for name in ('rpn_head', 'roi_head')]
    return has_modes(model) and all(isinstance(head, nn.Module) for head in heads)


def has_transformer(model: nn.Module) -> bool:
    """Returns whether the head reads what a transformer computes of the features and of the sizes of the images."""
    return has_modes(model) and hasattr(model, 'forward_transformer')


def region_heads(model: nn.Module) -> list[RegionHead]:
    """Returns the heads of a two-stage detector that read features of regions, in the order in which they run.

    GraphError is raised if the features of regions pass another module before they reach a head.
    """
    if not is_two_stage(model):
        return []
    roi_head: Any = model.roi_head
    if isinstance(getattr(roi_head, 'shared_head', None), nn.Module):
        raise GraphError('expected heads that read the features of regions, but roi_head.shared_head comes before them')
    found = []
    for kind in ('bbox', 'mask'):
        head, extractor = f'{kind}_head', f'{kind}_roi_extractor'
        module = getattr(roi_head, head, None)
        if isinstance(module, nn.ModuleList):
            found += [RegionHead(f'roi_head.{head}.{i}', f'roi_head.{extractor}.{i}') for i in range(len(module))]
        elif isinstance(module, nn.Module):
            found.append(RegionHead(f'roi_head.{head}', f'roi_head.{extractor}'))
    return found


def region_shape(model: nn.Module, head: RegionHead) -> tuple[int, int, int]:
    """Returns the shape of the features of one region, ``(C, h, w)``."""
    extractor: Any = model.get_submodule(head.extractor)
    size = extractor.roi_layers[0].output_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(extractor.out_channels), int(height), int(width)


def head_file(image_file: Path, path: str) -> Path:
    """Returns the file of the head ``path``: beside the graph that reads images, with the path in its name."""
    return image_file.with_name(f'{image_file.stem}.{path}{image_file.suffix}')


def components_of(model: nn.Module) -> list[nn.Module]:
    """Returns the components that follow from the image alone, in the order in which they run."""
    found = [getattr(model, name, None) for name in COMPONENTS] if has_modes(model) else []
    return [component for component in found if isinstance(component, nn.Module)]


def attach(model: nn.Module, arithmetic: Callable[[Tensor], Any]) -> None:
    """Makes ``model`` compute ``arithmetic`` instead of its ``forward``, or of those of its components."""
    if not has_modes(model):
        set_forward(model, arithmetic)
        return
    if not components_of(model):
        raise GraphError(f'expected {type(model).__name__} to have one of {list(COMPONENTS)}, but found none')
    two_stage = is_two_stage(model)

    def compute(inputs: Tensor) -> Any:
        if not two_stage:
            return arithmetic(inputs)
        maps, rpn_outputs = arithmetic(inputs)
        features = Features(maps)
        features.rpn_outputs = rpn_outputs
        return features

    first, *others = components_of(model)
    set_forward(first, compute)
    for component in others:
        is_rpn = two_stage and component is model.rpn_head
        set_forward(component, (lambda features: features.rpn_outputs) if is_rpn else (lambda value: value))
    if has_transformer(model):
        _attach_transformer(model, model.bbox_head)


def _attach_transformer(model: Any, head: Any) -> None:
    """Makes the head of a transformer take what the first component has computed as its own outputs."""

    def outputs(value: tuple[Tensor, ...]) -> list[Tensor]:
        # of one layer
        return [output.unsqueeze(0) for output in value]

    def predict(value: tuple[Tensor, ...], batch_data_samples: Any, rescale: bool = True) -> Any:
        for sample in batch_data_samples:
            _refuse_padding(model, sample)
        metas = [sample.metainfo for sample in batch_data_samples]
        return head.predict_by_feat(*outputs(value), batch_img_metas=metas, rescale=rescale)

    def loss(value: tuple[Tensor, ...], batch_data_samples: Any) -> Any:
        # the graph takes padding for a part of the image
        metas = [{**sample.metainfo, 'img_shape': sample.batch_input_shape} for sample in batch_data_samples]
        known = {'batch_img_metas': metas, 'batch_gt_instances': [s.gt_instances for s in batch_data_samples]}
        names = list(inspect.signature(head.loss_by_feat).parameters.values())[2:]
        others = {p.name: known.get(p.name) for p in names if p.default is inspect.Parameter.empty}
        return head.loss_by_feat(*outputs(value), **others)

    for owner, name, method in (
        (model, 'forward_transformer', lambda value, _=None: {'value': value}),
        (head, 'predict', predict), (head, 'loss', loss),
    ):  # fmt: skip
        object.__setattr__(owner, name, method)


def _refuse_padding(model: nn.Module, sample: Any) -> None:
    if tuple(sample.img_shape[:2]) != tuple(sample.batch_input_shape):
        found, batch = (' x '.join(map(str, shape[:2])) for shape in (sample.img_shape, sample.batch_input_shape))
        raise DataError(
            f'expected images without padding, which {type(model).__name__} masks and a graph of images cannot, but '
            f'got one of {found} in a batch of {batch}; set batch_size=1 in its dataloader, and pad_size_divisor=1'
        )


@contextmanager
def pre_hooks(modules: Mapping[str, nn.Module], note: Callable[[str, tuple[Any, ...]], object]) -> Iterator[None]:
    """Calls ``note(path, args)`` before every forward pass of a module within the block."""

    def call(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        note(path, args)

    with ExitStack() as hooks:
        for path, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(call, path)))
        yield


class _Running(threading.local):
    """Counts the graphs that run within each other on this thread."""

    depth = 0


_running = _Running()


def graph_module(model: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Returns a module of the class ``name`` that runs ``graph`` on the modules of ``model``."""
    module = fx.GraphModule(model, graph, class_name=name)
    module.register_forward_pre_hook(lambda *_: _move(1))
    module.register_forward_hook(lambda *_: _move(-1), always_call=True)
    return module


def _move(by: int) -> None:
    _running.depth += by


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Makes ``module`` compute ``forward``, except where a graph calls it: a component that could not be traced."""
    present = vars(module).get('forward')
    own = getattr(present, 'own', present) or partial(type(module).forward, module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (own if _running.depth else forward)(*args, **kwargs)

    setattr(call, 'own', own)  # noqa: B010 - a function's attribute
    for hooks in ('_forward_hooks', '_forward_pre_hooks'):
        # the graph has their effect
        vars(module)[hooks].clear()
    object.__setattr__(module, 'forward', call)
