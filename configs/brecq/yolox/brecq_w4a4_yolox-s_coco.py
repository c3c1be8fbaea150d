_base_ = [
    'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
    '../../_base_/quant/brecq_w4a4.py',
]
float_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_s_8x8_300e_coco/yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth'
# Images of up to 640x640
calibration = dict(num_samples=256, batch_size=4)
reconstructor = dict(weights=dict(batch_size=4), activations=dict(batch_size=4))
