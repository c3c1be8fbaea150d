"""Small detectors of mmdet with random weights; their post-processing needs mmcv's compiled operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HEIGHT, WIDTH = 64, 96
BACKBONE = {
    'type': 'ResNet', 'depth': 18, 'base_channels': 8, 'stem_channels': 8, 'num_stages': 4, 'out_indices': (0, 1, 2, 3),
    'norm_cfg': {'type': 'BN'}, 'style': 'pytorch',
}  # fmt: skip
FILES = {
    'retinanet': '_base_/models/retinanet_r50_fpn.py',
    'faster_rcnn': '_base_/models/faster-rcnn_r50_fpn.py',
    'mask_rcnn': '_base_/models/mask-rcnn_r50_fpn.py',
    'fcos': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ssdlite': 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
    'yolox': 'yolox/yolox_tiny_8xb8-300e_coco.py',
    'rtmdet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'vfnet': 'vfnet/vfnet_r50_fpn_1x_coco.py',
    'detr': 'detr/detr_r50_8xb2-150e_coco.py',
    'conditional': 'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
    'dab': 'dab_detr/dab-detr_r50_8xb2-50e_coco.py',
    'deformable': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'dino': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
}
TRANSFORMERS = ('detr', 'conditional', 'dab', 'deformable', 'dino')
QUERIES = 6
NECK = {'in_channels': [8, 16, 32, 64], 'out_channels': 8}


def config(name: str) -> dict[str, Any]:
    """mmdet's own config of a detector, its layers made narrow."""
    from mmengine.config import Config

    model: dict[str, Any] = Config.fromfile(_path(FILES[name])).model
    if name == 'rtmdet':
        model['backbone'].update(init_cfg=None, deepen_factor=0.1, widen_factor=0.125)
        model['neck'].update(in_channels=[32, 64, 128], out_channels=32)
        model['bbox_head'].update(in_channels=32, feat_channels=16, num_classes=3)
    if name in ('ssdlite', 'yolox', 'rtmdet'):
        return model
    model['backbone'] = BACKBONE
    if name in TRANSFORMERS:
        return _with_small_transformer(name, model)
    model['neck'].update(NECK)
    if name in ('retinanet', 'fcos', 'vfnet'):
        model['bbox_head'].update(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=3)
        if name != 'retinanet':
            # groups of one channel have nothing to normalise on a level of one pixel
            model['bbox_head']['norm_cfg'] = {'type': 'GN', 'num_groups': 2}
        return model
    model['rpn_head'].update(in_channels=8, feat_channels=8)
    model['test_cfg']['rpn'].update(nms_pre=40, max_per_img=12)
    model['test_cfg']['rcnn'].update(score_thr=0.0, max_per_img=10)
    heads = model['roi_head']
    heads['bbox_roi_extractor'].update(out_channels=8)
    heads['bbox_head'].update(in_channels=8, fc_out_channels=16, num_classes=3)
    if name == 'mask_rcnn':
        heads['mask_roi_extractor'].update(out_channels=8)
        heads['mask_head'].update(in_channels=8, conv_out_channels=8, num_convs=2, num_classes=3)
    return model


def _with_small_transformer(name: str, model: dict[str, Any]) -> dict[str, Any]:
    one_level = name in TRANSFORMERS[:3]
    model['backbone'] = {**BACKBONE, 'out_indices': (3,) if one_level else (1, 2, 3)}
    model['neck']['in_channels'] = [64] if one_level else [16, 32, 64]
    for part in ('encoder', 'decoder'):
        # the first attention of this decoder reads constants alone, and adds nothing that a layer has computed
        model[part]['num_layers'] = 2 if (name, part) == ('deformable', 'decoder') else 1
        model[part]['layer_cfg']['ffn_cfg']['feedforward_channels'] = 32
    model['num_queries'] = QUERIES
    model['bbox_head']['num_classes'] = 3
    model['test_cfg'] = {'max_per_img': QUERIES}
    return model


def _path(name: str) -> str:
    import mmdet

    return str(Path(mmdet.__file__).parent / '.mim' / 'configs' / name)


def build(name: str) -> nn.Module:
    pytest.importorskip('mmcv.ops', reason='mmcv is installed without its compiled operations')
    import mmdet.models  # noqa: F401 - registers the types
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    torch.manual_seed(0)
    model: nn.Module = MODELS.build(config(name))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    for layer in model.modules():
        # as they are made, heads start so near to 0 that all scores are alike
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and name not in ('ssdlite', 'yolox'):
            nn.init.kaiming_normal_(layer.weight)
    for path, parameter in model.named_parameters():
        if path.endswith('level_embed'):
            # mmdet leaves it as the memory was
            nn.init.zeros_(parameter)
    return model.eval()


def data(count: int = 4, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> dict[str, Any]:
    """A batch as mmdet's pipeline packs it."""
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, height // 8, width // 8, generator=generator)
    images = nn.functional.interpolate(coarse, (height, width), mode='bilinear') * 60 + 120
    meta = {'img_shape': (height, width), 'ori_shape': (height, width), 'scale_factor': (1.0, 1.0), 'img_id': 0}
    return {
        'inputs': [image.clamp(0, 255).to(torch.uint8) for image in images],
        'data_samples': [DetDataSample(metainfo=dict(meta)) for _ in range(count)],
    }


def predict(model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Boxes, scores, labels and masks of every image, as ``model.test_step`` gives them."""
    with torch.no_grad():
        found: Any = model.test_step(batch)  # type: ignore[operator]
    return [dict(sample.pred_instances.items()) for sample in found]


def preprocess(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The images of a batch as the network sees them."""
    images: Tensor = model.data_preprocessor(batch, False)['inputs']  # type: ignore[operator]
    return images


def same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    """Compares predictions of two float models."""
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys() and len(a['scores']) == len(b['scores']) > 0
        # folding moves the last bits of features, and boxes and scores of random weights amplify that
        torch.testing.assert_close(a['scores'], b['scores'], rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(a['bboxes'], b['bboxes'], rtol=1e-3, atol=2e-2)
        assert torch.equal(a['labels'], b['labels'])
