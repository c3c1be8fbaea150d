_base_ = ['mmpretrain::vgg/vgg13bn_8xb32_in1k.py', '../../_base_/quant/brecq_w2a4.py']
float_checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/vgg/vgg13_bn_batch256_imagenet_20210207-1a8b7864.pth'
)
