_base_ = [
    '../../_base_/models/mobilenetv2_cifar10.py',
    '../../_base_/datasets/cifar10_folders.py',
    '../../_base_/quant/brecq_w4a4.py',
]
calibration = dict(selection='first')
# Measured closest to the float outputs: rounding learned with dropped activations, then a last pass over the network
reconstructor = dict(
    _delete_=True,
    type='QDropReconstructor',
    joint=dict(iterations=1000, lr=3e-3, activation_lr=4e-4, drop_prob=0.5, round_weight=0.1),
    network=dict(iterations=250, activation_lr=4e-4),
    loss=dict(type='MSELoss'),
)
