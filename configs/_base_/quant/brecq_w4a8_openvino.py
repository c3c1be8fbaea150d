_base_ = './brecq_w4a8.py'
quantizer = dict(preset='openvino')
exporters = [dict(type='OpenVINOExporter')]
