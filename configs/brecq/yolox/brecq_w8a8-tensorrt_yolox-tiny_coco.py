_base_ = [
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
    '../../_base_/quant/brecq_w8a8_tensorrt.py',
]
float_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_tiny_8x8_300e_coco/yolox_tiny_8x8_300e_coco_20211124_171234-b4047906.pth'
# Images of up to 640x640
calibration = dict(num_samples=256, batch_size=4)
reconstructor = dict(weights=dict(batch_size=4), activations=dict(batch_size=4))
