_base_ = './brecq_w4a4_yolox_bccd.py'
quantizer = dict(weight=dict(bits=2), activation=dict(bits=8))
