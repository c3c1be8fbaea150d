_base_ = [
    '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/yolox_nano_coco.py',
    '../../configs/_base_/quant/brecq_w4a8_openvino.py',
]
float_checkpoint = '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/yolox_nano_coco.pth'
calibration = dict(num_samples=128, batch_size=8)
reconstructor = dict(
    weights=dict(iterations=500, batch_size=4),
    activations=dict(iterations=250, batch_size=4),
)
