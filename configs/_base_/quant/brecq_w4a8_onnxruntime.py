_base_ = './brecq_w4a8.py'
quantizer = dict(preset='onnxruntime')
exporters = [dict(type='ONNXExporter')]
