"""The detection demo: Faster R-CNN on scenes of digits to 2-bit weights and 8-bit activations, heads included."""

_base_ = ['./faster_rcnn_scenes.py']
float_checkpoint = 'faster_rcnn_scenes.pth'
seed = 0
quantizer = dict(
    type='BRECQQuantizer',
    preset='academic',
    weight=dict(bits=2),
    activation=dict(bits=8),
    first_last_8bit=True,
)
calibration = dict(num_samples=128, batch_size=32)
reconstructor = dict(
    type='BRECQReconstructor',
    weights=dict(iterations=150, batch_size=16, lr=3e-3),
    activations=dict(iterations=30, batch_size=16),
)
exporters = [dict(type='ONNXExporter'), dict(type='OpenVINOExporter')]
evaluations = ['float', 'nearest', 'quantized', 'deployed']
