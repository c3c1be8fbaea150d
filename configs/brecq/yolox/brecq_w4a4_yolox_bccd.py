_base_ = [
    '../../_base_/models/yolox_bccd.py',
    '../../_base_/datasets/bccd.py',
    '../../_base_/quant/brecq_w4a4.py',
]
# every input but the first and the last at 4 bits, as the published figures have it
quantizer = dict(fallback=dict(low_bound=0.3))
calibration = dict(num_samples=256)
reconstructor = dict(
    _delete_=True,
    type='QDropReconstructor',
    joint=dict(iterations=300, batch_size=8, lr=1e-2, activation_lr=8e-4, drop_prob=0.5),
    network=dict(iterations=200, batch_size=8, bias_lr=6e-3, weight_scale_lr=3e-3, activation_lr=2e-3),
    loss=dict(type='FisherLoss', floor=0.1),
)
