_base_ = [
    '../../_base_/models/yolox_bccd.py',
    '../../_base_/datasets/bccd.py',
    '../../_base_/quant/brecq_w8a8_tensorrt.py',
]
calibration = dict(num_samples=256)
# Steps of 8 bits stay as observed: a pass that learns them lowers the squared error of the units, and the AP with it
quantizer = dict(activation=dict(fake_quant=dict(type='FakeQuantize')))
reconstructor = dict(
    weights=dict(iterations=500, batch_size=8, lr=3e-3),
    activations=dict(bias_lr=0, weight_scale_lr=0, activation_lr=4e-4),
)
