"""The demo: ResNet-18 on handwritten digits to 2-bit weights and 4-bit activations."""

_base_ = ['./resnet_digits.py']
float_checkpoint = 'resnet_digits.pth'
seed = 0
# that of the training would slow every step down, and the result is the same without
randomness = dict(deterministic=False)
quantizer = dict(
    type='BRECQQuantizer',
    preset='academic',
    weight=dict(bits=2),
    activation=dict(bits=4),
    first_last_8bit=True,
)
calibration = dict(num_samples=512, batch_size=64)
reconstructor = dict(
    type='BRECQReconstructor',
    # fewer steps, longer ones
    weights=dict(iterations=600, lr=3e-3),
    activations=dict(iterations=150),
)
exporters = [dict(type='ONNXExporter'), dict(type='OpenVINOExporter')]
