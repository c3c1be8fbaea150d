# MobileNetV2 of half the width, for 64x64 images
model = dict(
    type='ImageClassifier',
    backbone=dict(type='MobileNetV2', widen_factor=0.5),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=1280, loss=dict(type='CrossEntropyLoss'), topk=(1, 5)),
)
float_checkpoint = '{{$MMBRECQ_DATA:../shared/data}}/../zoo/mobilenetv2_cifar10.pth'
