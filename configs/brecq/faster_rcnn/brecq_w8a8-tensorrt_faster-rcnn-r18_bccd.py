_base_ = [
    '../../_base_/models/faster_rcnn_r18_bccd.py',
    '../../_base_/datasets/bccd.py',
    '../../_base_/quant/brecq_w8a8_tensorrt.py',
]
calibration = dict(num_samples=256)
reconstructor = dict(
    weights=dict(iterations=400, batch_size=8, lr=3e-3),
    activations=dict(iterations=100, batch_size=8, activation_lr=4e-4),
)
