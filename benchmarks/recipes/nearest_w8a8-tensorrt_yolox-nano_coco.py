_base_ = [
    '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/yolox_nano_coco.py',
    '../../configs/_base_/quant/brecq_w8a8_tensorrt.py',
]
float_checkpoint = '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/yolox_nano_coco.pth'
calibration = dict(num_samples=128)
reconstructor = dict(_delete_=True, type='NearestReconstructor')
