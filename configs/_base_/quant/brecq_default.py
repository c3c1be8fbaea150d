# What all BRECQ recipes share: the paper's settings (Li et al., ICLR 2021). Bits and targets are the children's.
quantizer = dict(type='BRECQQuantizer', preset='academic', first_last_8bit=True, granularity='block')
calibration = dict(num_samples=1024, batch_size=32, seed=0)
reconstructor = dict(
    type='BRECQReconstructor',
    weights=dict(iterations=20000, batch_size=32, round_weight=0.01),
    activations=dict(iterations=5000, batch_size=32),
)
exporters = [dict(type='ONNXExporter'), dict(type='OpenVINOExporter')]
