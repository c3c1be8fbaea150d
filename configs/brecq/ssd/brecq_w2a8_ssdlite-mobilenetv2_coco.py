_base_ = [
    'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
    '../../_base_/quant/brecq_w2a8.py',
]
float_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/ssd/ssdlite_mobilenetv2_scratch_600e_coco/ssdlite_mobilenetv2_scratch_600e_coco_20210629_110627-974d9307.pth'
# Images of 320x320
calibration = dict(num_samples=256, batch_size=4)
reconstructor = dict(weights=dict(batch_size=4, round_weight=0.1), activations=dict(batch_size=4))
