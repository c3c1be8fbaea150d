"""A small float RetinaNet on scenes of handwritten digits: a ResNet-18 of an eighth of the width, two levels."""

_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './digit_scenes.py']

model = dict(
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        stem_channels=8,
        base_channels=8,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        norm_eval=False,
    ),
    neck=dict(in_channels=[16, 32], out_channels=32, start_level=0, add_extra_convs=False, num_outs=2),
    bbox_head=dict(
        num_classes=10,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=2, scales_per_octave=2, ratios=[0.7, 1.0, 1.6], strides=[8, 16]),
    ),
)
