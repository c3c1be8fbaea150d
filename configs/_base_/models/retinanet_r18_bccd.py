# RetinaNet with a ResNet-18 of half the width and 64 channels in neck and head
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        base_channels=32,
        stem_channels=32,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch',
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, start_level=1, num_outs=5),
    bbox_head=dict(
        num_classes=3,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=3, strides=[8, 16, 32, 64, 128]),
    ),
)
float_checkpoint = '{{$MMBRECQ_DATA:../shared/data}}/../zoo/retinanet_r18_bccd.pth'
