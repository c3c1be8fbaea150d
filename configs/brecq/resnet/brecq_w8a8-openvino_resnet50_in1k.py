_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py', '../../_base_/quant/brecq_w8a8_openvino.py']
float_checkpoint = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth'
