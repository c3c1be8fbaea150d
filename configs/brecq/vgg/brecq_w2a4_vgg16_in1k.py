_base_ = ['mmpretrain::vgg/vgg16_8xb32_in1k.py', '../../_base_/quant/brecq_w2a4.py']
float_checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/vgg/vgg16_batch256_imagenet_20210208-db26f1a5.pth'
)
