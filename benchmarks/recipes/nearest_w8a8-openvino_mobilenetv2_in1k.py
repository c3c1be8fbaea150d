_base_ = [
    '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/mobilenetv2_in1k.py',
    '../../configs/_base_/quant/brecq_w8a8_openvino.py',
]
float_checkpoint = '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/mobilenetv2_in1k.pth'
calibration = dict(num_samples=1000, pipeline={{_base_.calibration_pipeline}})
reconstructor = dict(_delete_=True, type='NearestReconstructor')
