"""A small float Faster R-CNN on scenes of handwritten digits: a ResNet-18 of an eighth of the width, two levels."""

_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', './digit_scenes.py']

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
    neck=dict(in_channels=[16, 32], out_channels=32, num_outs=2),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[2, 3], ratios=[0.7, 1.0, 1.6], strides=[8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32, featmap_strides=[8, 16], finest_scale=20),
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(max_per_img=20)),
)
