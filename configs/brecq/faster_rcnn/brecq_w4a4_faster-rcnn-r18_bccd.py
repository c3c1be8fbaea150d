_base_ = [
    '../../_base_/models/faster_rcnn_r18_bccd.py',
    '../../_base_/datasets/bccd.py',
    '../../_base_/quant/brecq_w4a4.py',
]
# every input but the first and the last at 4 bits, as the published figures have it
quantizer = dict(fallback=dict(low_bound=0.3))
calibration = dict(num_samples=256)
reconstructor = dict(
    _delete_=True,
    type='QDropReconstructor',
    joint=dict(iterations=400, batch_size=8, lr=3e-3, activation_lr=4e-4, drop_prob=0.5),
    network=dict(iterations=100, batch_size=8, activation_lr=4e-4),
    loss=dict(type='MSELoss'),
)
