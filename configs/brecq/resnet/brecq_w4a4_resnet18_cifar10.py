_base_ = [
    '../../_base_/models/resnet18_cifar10.py',
    '../../_base_/datasets/cifar10_folders.py',
    '../../_base_/quant/brecq_w4a4.py',
]
calibration = dict(selection='first')
quantizer = dict(equalization=0.75)
reconstructor = dict(
    _delete_=True,
    type='QDropReconstructor',
    joint=dict(iterations=2000, lr=3e-3, activation_lr=4e-4, drop_prob=0.5),
    loss=dict(type='MSELoss'),
)
