_base_ = './brecq_w4a4_yolox_bccd.py'
quantizer = dict(activation=dict(bits=8))
# 500 in all: it is the noise of 4-bit activations that takes more
reconstructor = dict(joint=dict(iterations=300), network=dict(iterations=200))
