_base_ = './brecq_w8a8.py'
quantizer = dict(preset='openvino')
exporters = [dict(type='OpenVINOExporter')]
