_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../../_base_/quant/brecq_w8a8_openvino.py',
]
float_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth'
# Images of up to 1333x800
calibration = dict(num_samples=256, batch_size=4)
reconstructor = dict(weights=dict(batch_size=4), activations=dict(batch_size=4))
