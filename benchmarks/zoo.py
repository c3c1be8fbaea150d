"""The models of `coverage.py`: every family of mmpretrain with a network of its own, and detectors of mmdet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DETECTOR_SIZE = 160
LARGER = {'ddod/ddod_r50_fpn_1x_coco.py': 320, 'ssd/ssd300_coco.py': 300}
"""Detectors whose coarsest feature map has no room for a kernel at that size."""

VIT = {'embed_dims': 192, 'num_layers': 4, 'num_heads': 3, 'feedforward_channels': 768}


@dataclass(frozen=True)
class Family:
    """A small network of a family.

    Args:
        config: Path below mmpretrain's configs.
        size: Side of its images: its own where the network asks for it, a small one elsewhere.
        options: Config keys below ``model`` that make it smaller, where all its configs are large.
    """

    config: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)


def _small(arch: dict[str, Any], channels: int, **options: Any) -> dict[str, Any]:
    """Options of a network whose architecture and head are as wide as given; ``__`` stands for a dot."""
    named = {key.replace('__', '.'): value for key, value in options.items()}
    return {'backbone.arch': arch, 'head.in_channels': channels, **named}


FAMILIES = [
    Family('beit/benchmarks/beit-base-p16_8xb64_in1k', 224, _small(VIT, 192)),
    Family('beitv2/benchmarks/beit-base-p16_8xb64_in1k', 224, _small(VIT, 192)),
    Family('clip/vit-base-p32_pt-64xb64_in1k', 224, _small(VIT, 192)),
    Family('conformer/conformer-tiny-p16_8xb128_in1k', 224),
    Family(
        'convmixer/convmixer-768-32_10xb64_in1k', 64,
        _small({'embed_dims': 128, 'depth': 4, 'patch_size': 7, 'kernel_size': 7}, 128),
    ),
    Family('convnext/convnext-tiny_32xb128_in1k', 96),
    Family('convnext_v2/convnext-v2-atto_32xb32_in1k', 96),
    Family('cspnet/cspdarknet50_8xb32_in1k', 96),
    Family('cspnet/cspresnet50_8xb32_in1k', 96),
    Family('csra/resnet101-csra_1xb16_voc07-448px', 64, {'backbone.depth': 50}),
    Family('davit/davit-tiny_4xb256_in1k', 224),
    Family('deit/deit-tiny_4xb256_in1k', 224),
    Family('deit/deit-tiny-distilled_4xb256_in1k', 224),
    Family('deit3/deit3-small-p16_64xb64_in1k', 224),
    Family('densenet/densenet121_4xb256_in1k', 64),
    Family('dinov2/vit-small-p14_dinov2-pre_headless', 224, {'backbone.img_size': 224}),
    Family('edgenext/edgenext-xxsmall_8xb256_in1k', 128),
    Family('efficientformer/efficientformer-l1_8xb128_in1k', 224),
    Family('efficientnet/efficientnet-b0_8xb32_in1k', 96),
    Family('efficientnet/efficientnet-es_8xb32-01norm_in1k', 96),
    Family('efficientnet_v2/efficientnetv2-b0_8xb32_in1k', 96),
    Family('eva/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k', 224, _small(VIT, 192)),
    Family('eva02/eva02-tiny-p14_in1k', 336),
    Family('hivit/hivit-tiny-p16_16xb64_in1k', 224),
    Family('hornet/hornet-tiny_8xb128_in1k', 96),
    Family('hornet/hornet-tiny-gf_8xb128_in1k', 224),
    Family('hrnet/hrnet-w18_4xb32_in1k', 64),
    Family('inception_v3/inception-v3_8xb32_in1k', 128),
    Family('lenet/lenet5_mnist', 32),
    Family('levit/levit-128s_8xb256_in1k', 224),
    Family(
        'mae/benchmarks/vit-base-p16_8xb2048-linear-coslr-90e_in1k', 224,
        _small(VIT, 192, neck__input_features=192, backbone__frozen_stages=4),
    ),
    Family(
        'mixmim/benchmarks/mixmim-base_8xb64_in1k', 224,
        _small({'embed_dims': 64, 'depths': [1, 1, 2, 1], 'num_heads': [2, 4, 8, 16]}, 512),
    ),
    Family(
        'mlp_mixer/mlp-mixer-base-p16_64xb64_in1k', 224,
        _small({'embed_dims': 192, 'num_layers': 4, 'tokens_mlp_dims': 128, 'channels_mlp_dims': 768}, 192),
    ),
    Family('mobilenet_v2/mobilenet-v2_8xb32_in1k', 96),
    Family('mobilenet_v3/mobilenet-v3-small_8xb128_in1k', 96),
    Family('mobileone/mobileone-s0_8xb32_in1k', 64),
    Family('mobilevit/mobilevit-xxsmall_8xb128_in1k', 128),
    Family('mocov3/benchmarks/vit-small-p16_8xb128-linear-coslr-90e_in1k', 224),
    Family('mvit/mvitv2-tiny_8xb256_in1k', 224),
    Family('poolformer/poolformer-s12_32xb128_in1k', 96),
    Family('regnet/regnetx-400mf_8xb128_in1k', 96),
    Family(
        'replknet/replknet-31B_32xb64_in1k', 64,
        {'backbone.arch': {'large_kernel_sizes': [31, 29, 27, 13], 'layers': [1, 1, 2, 1],
                           'channels': [32, 64, 128, 256], 'small_kernel': 5, 'dw_ratio': 1},
         'head.in_channels': 256},
    ),
    Family(
        'repmlp/repmlp-base_8xb64_in1k', 224,
        _small({'channels': [48, 96, 192, 384], 'depths': [1, 1, 2, 1], 'sharesets_nums': [1, 4, 32, 128]}, 384),
    ),
    Family('repvgg/repvgg-A0_8xb32_in1k', 64),
    Family('res2net/res2net50-w14-s8_8xb32_in1k', 64),
    Family('resnest/resnest50_32xb64_in1k', 64),
    Family('resnet/resnet18_8xb32_in1k', 96),
    Family('resnet/resnetv1c50_8xb32_in1k', 64),
    Family('resnet/resnetv1d50_8xb32_in1k', 64),
    Family('resnext/resnext50-32x4d_8xb32_in1k', 64),
    Family('revvit/revvit-small_8xb256_in1k', 224),
    Family('riformer/riformer-s12_8xb128_in1k', 96),
    Family(
        'sam/vit-base-p16_sam_headless', 224,
        {'backbone.arch': {**VIT, 'global_attn_indexes': [1, 3]}, 'backbone.img_size': 224,
         'backbone.window_size': 4},
    ),
    Family('seresnet/seresnet50_8xb32_in1k', 64),
    Family('shufflenet_v1/shufflenet-v1-1x_16xb64_in1k', 96),
    Family('shufflenet_v2/shufflenet-v2-1x_16xb64_in1k', 96),
    Family('swin_transformer/swin-tiny_16xb64_in1k', 224),
    Family('swin_transformer_v2/swinv2-tiny-w8_16xb64_in1k-256px', 256),
    Family('t2t_vit/t2t-vit-t-14_8xb64_in1k', 224),
    Family('tinyvit/tinyvit-5m_8xb256_in1k', 224),
    Family('tnt/tnt-s-p16_16xb64_in1k', 224),
    Family('twins/twins-pcpvt-small_8xb128_in1k', 224),
    Family('twins/twins-svt-small_8xb128_in1k', 224),
    Family('van/van-tiny_8xb128_in1k', 96),
    Family('vgg/vgg11bn_8xb32_in1k', 224),
    Family('vig/vig-tiny_8xb128_in1k', 224),
    Family('vig/pvig-tiny_8xb128_in1k', 224),
    Family('vision_transformer/vit-base-p32_64xb64_in1k-384px', 384, _small(VIT, 192)),
    Family('wrn/wide-resnet50_8xb32_in1k', 64),
    Family('xcit/xcit-nano-12-p16_8xb128_in1k', 224),
]  # fmt: skip
"""Left out are families without a network of their own (self-supervised training of ResNet, ViT, Swin, ConvNeXt or
HiViT) and those that read more than an image (BLIP, OFA, Flamingo, LLaVA and so on)."""

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
    'detr/detr_r50_8xb2-150e_coco.py',
    'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
    'dab_detr/dab-detr_r50_8xb2-50e_coco.py',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
    'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'pafpn/faster-rcnn_r50_pafpn_1x_coco.py',
    'regnet/faster-rcnn_regnetx-3.2GF_fpn_1x_coco.py',
    'resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py',
    'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py',
    'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py',
    'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
]
"""Detectors of mmdet, the one-stage ones first."""

TRANSFORMER = {'encoder.num_layers': 2, 'decoder.num_layers': 2, 'num_queries': 20}
"""Options of the detectors in :data:`DETECTORS` that have a transformer, of six layers each in their configs."""
