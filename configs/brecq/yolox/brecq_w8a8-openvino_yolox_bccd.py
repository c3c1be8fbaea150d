_base_ = './brecq_w4a4_yolox_bccd.py'
quantizer = dict(preset='openvino', weight=dict(bits=8), activation=dict(bits=8))
exporters = [dict(type='OpenVINOExporter')]
