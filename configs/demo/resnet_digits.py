"""A small float ResNet-18 on handwritten digits: 8x8 images, resized to 32x32."""

custom_imports = dict(imports=['mmbrecq.data.datasets'], allow_failed_imports=False)
default_scope = 'mmpretrain'

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=10, mean=[80.0, 80.0, 80.0], std=[96.0, 96.0, 96.0], to_rgb=False),
    backbone=dict(type='ResNet', depth=18, stem_channels=8, base_channels=8, num_stages=4, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss', loss_weight=1.0)
    ),
)

train_pipeline = [
    dict(type='Resize', scale=32, interpolation='bilinear', backend='cv2'),
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='Resize', scale=32, interpolation='bilinear', backend='cv2'),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=64,
    # Images in memory: a worker process would cost more than it saves
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='mmbrecq.DigitsDataset', split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmbrecq.DigitsDataset', split='val', pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

max_epochs = 15
optim_wrapper = dict(optimizer=dict(type='Adam', lr=3e-3))
param_scheduler = dict(
    type='OneCycleLR', eta_max=3e-3, total_steps=max_epochs, by_epoch=True, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict()
test_cfg = dict()

randomness = dict(seed=0, deterministic=True)
env_cfg = dict(cudnn_benchmark=False)
log_level = 'INFO'
