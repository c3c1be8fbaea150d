_base_ = ['mmpretrain::vgg/vgg11_8xb32_in1k.py', '../../_base_/quant/brecq_w8a8_openvino.py']
float_checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/vgg/vgg11_batch256_imagenet_20210208-4271cd6c.pth'
)
