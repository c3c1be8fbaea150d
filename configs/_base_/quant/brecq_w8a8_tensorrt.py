_base_ = './brecq_w8a8.py'
quantizer = dict(preset='tensorrt')
exporters = [dict(type='ONNXExporter')]
