_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py', '../../_base_/quant/brecq_w4a4.py']
float_checkpoint = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet18_8xb32_in1k_20210831-fbbb1da6.pth'
