_base_ = './brecq_default.py'
# None leaves activations in float
quantizer = dict(weight=dict(bits=2), activation=None)
