_base_ = './brecq_w4a4_yolox_bccd.py'
quantizer = dict(activation=dict(bits=8))
