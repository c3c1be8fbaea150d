_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../../_base_/quant/brecq_w4a8.py',
]
float_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_1x_coco/mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth'
# Images of up to 1333x800
calibration = dict(num_samples=256, batch_size=4)
reconstructor = dict(weights=dict(batch_size=4), activations=dict(batch_size=4))
