_base_ = [
    '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/vit_tiny_in1k.py',
    '../../configs/_base_/quant/qdrop_default.py',
]
float_checkpoint = '{{$MMBRECQ_DATA:../../../shared/data}}/../zoo/vit_tiny_in1k.pth'
quantizer = dict(weight=dict(bits=4), activation=dict(bits=4))
calibration = dict(num_samples=512, pipeline={{_base_.calibration_pipeline}})
reconstructor = dict(joint=dict(iterations=100))
