_base_ = [
    '../../_base_/models/resnet18_cifar10.py',
    '../../_base_/datasets/cifar10_folders.py',
    '../../_base_/quant/brecq_w4a8_onnxruntime.py',
]
calibration = dict(selection='first')
reconstructor = dict(weights=dict(iterations=2000, lr=3e-3), activations=dict(iterations=500, activation_lr=4e-4))
