_base_ = './resnet_digits_w2a4.py'
# Bits are chosen layer by layer: a tenth of the float model's bytes, a thirtieth of its bit operations
search = dict(activation_candidates=[4, 8], budgets=dict(size='0.1x', bitops='0.033x'))
