_base_ = './brecq_w4a8_yolox_bccd.py'
quantizer = dict(weight=dict(bits=2))
