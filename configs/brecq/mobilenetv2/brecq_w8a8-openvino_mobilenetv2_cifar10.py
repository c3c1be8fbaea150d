_base_ = [
    '../../_base_/models/mobilenetv2_cifar10.py',
    '../../_base_/datasets/cifar10_folders.py',
    '../../_base_/quant/brecq_w8a8_openvino.py',
]
calibration = dict(selection='first')
reconstructor = dict(
    weights=dict(iterations=1000, lr=3e-3, round_weight=0.1), activations=dict(iterations=250, activation_lr=4e-4)
)
