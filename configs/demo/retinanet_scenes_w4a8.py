"""The detection demo: RetinaNet on scenes of digits to 4-bit weights and 8-bit activations, heads included."""

_base_ = ['./retinanet_scenes.py']
float_checkpoint = 'retinanet_scenes.pth'
seed = 0
quantizer = dict(
    type='BRECQQuantizer',
    preset='openvino',
    weight=dict(bits=4),
    activation=dict(bits=8),
    first_last_8bit=True,
)
calibration = dict(num_samples=128, batch_size=32)
reconstructor = dict(
    type='BRECQReconstructor',
    weights=dict(iterations=100, batch_size=16, lr=1e-3),
    activations=dict(iterations=30, batch_size=16),
)
exporters = [dict(type='OpenVINOExporter')]
evaluations = ['float', 'nearest', 'quantized', 'deployed']
