_base_ = './brecq_w8a8.py'
quantizer = dict(preset='onnxruntime')
exporters = [dict(type='ONNXExporter')]
