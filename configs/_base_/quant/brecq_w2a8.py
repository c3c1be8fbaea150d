_base_ = './brecq_default.py'
quantizer = dict(weight=dict(bits=2), activation=dict(bits=8))
