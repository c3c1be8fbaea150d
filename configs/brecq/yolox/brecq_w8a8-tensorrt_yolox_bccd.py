_base_ = './brecq_w4a4_yolox_bccd.py'
quantizer = dict(preset='tensorrt', weight=dict(bits=8), activation=dict(bits=8))
exporters = [dict(type='ONNXExporter')]
