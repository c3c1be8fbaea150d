"""Small models with random weights for the tests of graphs, quantizers and exporters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel

_GAP = {'type': 'GlobalAveragePooling'}


def _head(channels: int) -> dict[str, Any]:
    return {'type': 'LinearClsHead', 'num_classes': 10, 'in_channels': channels}


CLASSIFIERS: dict[str, dict[str, Any]] = {
    'resnet': {
        'backbone': {'type': 'ResNet', 'depth': 18, 'stem_channels': 8, 'base_channels': 8},
        'neck': _GAP,
        'head': _head(64),
    },
    'mobilenetv2': {
        'backbone': {'type': 'MobileNetV2', 'widen_factor': 0.1},
        'neck': _GAP,
        'head': _head(1280),
    },
    'regnet': {
        'backbone': {
            'type': 'RegNet',
            'arch': {'w0': 8, 'wa': 8, 'wm': 1.5, 'group_w': 4, 'depth': 5, 'bot_mul': 1.0},
            'stem_channels': 8,
            'base_channels': 8,
        },
        'neck': _GAP,
        'head': _head(40),
    },
    'vgg': {
        'backbone': {'type': 'VGG', 'depth': 11, 'norm_cfg': {'type': 'BN'}},
        'neck': _GAP,
        'head': _head(512),
    },
}


class Net(nn.Module):
    """A backbone behind the call of an OpenMMLab model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> Any:
        assert mode == 'tensor'
        return self.backbone(inputs)


class Apply(nn.Module):
    """Owns modules and calls a function of them: ``forward(x) = function(self, x)``."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def net(function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> Net:
    torch.manual_seed(0)
    for module in modules.values():
        randomize(module)
    return Net(Apply(function, **modules)).eval()


def conv(c_in: int = 3, c_out: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def residual() -> Net:
    """Stem, a block with a projecting shortcut, classifier; the nodes carry these names in the graph."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem_relu(self.stem(x))
        y = self.conv2(self.relu1(self.conv1(x)))
        x = self.out_relu(y + self.down(x))
        return self.fc(torch.flatten(self.gap(x), 1))

    return net(
        forward, stem=conv(), stem_relu=nn.ReLU(), conv1=conv(4, 4), relu1=nn.ReLU(), conv2=conv(4, 6),
        down=conv(4, 6, 1), out_relu=nn.ReLU(), gap=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(6, 5),
    )  # fmt: skip


def randomize(module: nn.Module) -> None:
    """Gives every normalisation statistics and an affine map other than the initial 0 and 1."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.7, 1.3)
                nn.init.uniform_(norm.bias, -0.3, 0.3)


def classifier(name: str) -> nn.Module:
    """A small model of mmpretrain in evaluation mode."""
    import mmpretrain.models  # noqa: F401 - registers the types
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS

    torch.manual_seed(0)
    cfg = {'type': 'ImageClassifier', **CLASSIFIERS[name]}
    init_default_scope('mmpretrain')
    model: nn.Module = MODELS.build(cfg)
    randomize(model)
    return model.eval()


def images(count: int = 4, seed: int = 0, size: int = 32) -> Tensor:
    """Normalised images, ``(count, 3, size, size)``."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prepare(
    model: nn.Module,
    preset: str,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    symmetric: bool | None = None,
    **options: Any,
) -> QuantizedModel:
    """Prepares ``model`` with min-max grids; ``symmetric`` is that of activations."""
    observer = {'type': 'MinMaxObserver'}
    activation = {'bits': activation_bits, 'observer': observer, 'symmetric': symmetric}
    weight = {'bits': weight_bits, 'observer': observer}
    return BRECQQuantizer(weight, None if activation_bits is None else activation, preset, **options).prepare(
        model, images(2)
    )


def calibrate(model: QuantizedModel, batches: Sequence[Tensor] | None = None) -> QuantizedModel:
    calibrate_weights(model)
    calibrate_activations(model, [images()] if batches is None else batches)
    return model


def packed(
    model: nn.Module, preset: str, weight_bits: int = 8, activation_bits: int | None = 8, **options: Any
) -> QuantizedModel:
    """Prepared, calibrated and packed."""
    prepared = calibrate(prepare(model, preset, weight_bits, activation_bits, **options))
    prepared.pack()
    return prepared


def run(model: Callable[..., Any], *inputs: Any) -> Any:
    with torch.no_grad():
        return model(*inputs)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
