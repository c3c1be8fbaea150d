# Short recipes, of some hundred iterations a unit, share this: straight-through rounding, learned with the step sizes,
# then a pass over the network that is kept if it brings the outputs nearer to float
_base_ = './brecq_default.py'
quantizer = dict(weight=dict(rounding=dict(type='StraightThrough')))
reconstructor = dict(
    _delete_=True,
    type='QDropReconstructor',
    joint=dict(iterations=200, batch_size=16),
    network=dict(iterations=200, batch_size=16),
)
