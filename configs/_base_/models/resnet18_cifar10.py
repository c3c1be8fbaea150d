# ResNet-18 of half the width, for 64x64 images
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=32,
        stem_channels=32,
        num_stages=4,
        out_indices=(3,),
        style='pytorch',
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=256, loss=dict(type='CrossEntropyLoss'), topk=(1, 5)),
)
float_checkpoint = '{{$MMBRECQ_DATA:../shared/data}}/../zoo/resnet18_cifar10.pth'
