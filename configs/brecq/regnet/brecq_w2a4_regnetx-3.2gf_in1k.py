_base_ = ['mmpretrain::regnet/regnetx-3.2gf_8xb64_in1k.py', '../../_base_/quant/brecq_w2a4.py']
float_checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/regnet/regnetx-3.2gf_8xb64_in1k_20211213-1fdd82ae.pth'
)
