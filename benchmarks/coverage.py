"""Prepares models of mmdet and mmpretrain with random weights and prints a Markdown table of what is quantized.

Nothing is downloaded, and no accuracy is measured.

    python benchmarks/coverage.py
    python benchmarks/coverage.py mmdet::atss/atss_r50_fpn_1x_coco.py mmpretrain::convnext/convnext-tiny_32xb128_in1k.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmbrecq.engine.config import run_tool
from mmbrecq.errors import MMBrecqError
from mmbrecq.graph.tracer import WEIGHTED
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel

DETECTORS = [
    'retinanet/retinanet_r18_fpn_1x_coco.py',
    'retinanet/retinanet_r50_fpn_1x_coco.py',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'atss/atss_r50_fpn_1x_coco.py',
    'gfl/gfl_r50_fpn_1x_coco.py',
    'foveabox/fovea_r50_fpn_4xb4-1x_coco.py',
    'ddod/ddod_r50_fpn_1x_coco.py',
    'tood/tood_r50_fpn_1x_coco.py',
    'vfnet/vfnet_r50_fpn_1x_coco.py',
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'yolof/yolof_r50-c5_8xb8-1x_coco.py',
    'yolox/yolox_tiny_8xb8-300e_coco.py',
    'yolox/yolox_s_8xb8-300e_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'ssd/ssd300_coco.py',
    'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
    'centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'solo/solo_r50_fpn_1x_coco.py',
    'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py',
    'swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'pafpn/faster-rcnn_r50_pafpn_1x_coco.py',
    'regnet/faster-rcnn_regnetx-3.2GF_fpn_1x_coco.py',
    'resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py',
    'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py',
    'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py',
    'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'detr/detr_r50_8xb2-150e_coco.py',
]
"""Of mmdet: one-stage detectors first."""


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = [f'mmdet::{name}' for name in DETECTORS]
    parser.add_argument('configs', nargs='*', default=configs, help='PACKAGE::PATH, a list of detectors by default')
    parser.add_argument('--size', nargs=2, type=int, default=(320, 320), metavar=('H', 'W'), help='of the images')
    return parser.parse_args()


def build(name: str) -> nn.Module:
    """The model of a config, without any checkpoint."""
    __import__(f'{name.partition("::")[0]}.models')
    init_default_scope(name.partition('::')[0])
    cfg = Config.fromstring(f'_base_ = [{name!r}]', '.py')
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    return MODELS.build(_without_checkpoints(cfg.model)).eval()


def _without_checkpoints(cfg: Any) -> Any:
    if isinstance(cfg, dict):
        return type(cfg)({k: _without_checkpoints(v) for k, v in cfg.items() if k not in ('init_cfg', 'pretrained')})
    return [_without_checkpoints(item) for item in cfg] if isinstance(cfg, list) else cfg


def row(name: str, size: tuple[int, int]) -> list[str]:
    """A line of the table."""
    model = build(name)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    layers = {path for path, module in model.named_modules() if isinstance(module, WEIGHTED)}
    try:
        prepared = BRECQQuantizer({'bits': 8}, {'bits': 8}).prepare(model, images)
    except MMBrecqError as error:
        return [name, str(len(layers)), '', '', f'refused: {error}']
    quantized = {layer.name for layer in prepared.layers if not layer.float_reason and layer.unit}
    return [
        name,
        str(len(layers)),
        str(len(quantized & layers)),
        str(len(prepared.region_graphs)),
        '; '.join(remarks(prepared)),
    ]


def remarks(prepared: QuantizedModel) -> list[str]:
    """What stays in float, and what is one call."""
    floats: dict[str, int] = {}
    for layer in prepared.layers:
        if layer.float_reason:
            floats[layer.float_reason] = floats.get(layer.float_reason, 0) + 1
    found = [f'{count} in float: {reason}' for reason, count in floats.items()]
    return found + [f'{path} is one call' for part in prepared.graphs for path in part.traced.opaque]


def main() -> None:
    """Prints the table line by line."""
    args = parse_args()
    head = ['config', 'layers', 'quantized', 'heads of regions', 'remarks']
    print(f'| {" | ".join(head)} |\n|{" --- |" * len(head)}')
    for name in args.configs:
        print(f'| {" | ".join(row(name, tuple(args.size)))} |', flush=True)


if __name__ == '__main__':
    sys.exit(run_tool(main))
