_base_ = './brecq_default.py'
quantizer = dict(weight=dict(bits=8), activation=dict(bits=8))
# Rounding to nearest is off by little at 8 bits, so there is little to learn
reconstructor = dict(weights=dict(iterations=5000), activations=dict(iterations=1000))
