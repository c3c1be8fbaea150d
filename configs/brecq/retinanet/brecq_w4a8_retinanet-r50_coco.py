_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    '../../_base_/quant/brecq_w4a8.py',
]
float_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_1x_coco/retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth'
# Images of up to 1333x800
calibration = dict(num_samples=256, batch_size=4)
reconstructor = dict(weights=dict(batch_size=4), activations=dict(batch_size=4))
