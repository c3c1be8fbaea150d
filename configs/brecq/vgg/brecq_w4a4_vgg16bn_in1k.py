_base_ = ['mmpretrain::vgg/vgg16bn_8xb32_in1k.py', '../../_base_/quant/brecq_w4a4.py']
float_checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/vgg/vgg16_bn_batch256_imagenet_20210208-7e55cd29.pth'
)
