_base_ = './brecq_default.py'
quantizer = dict(weight=dict(bits=4), activation=dict(bits=8))
