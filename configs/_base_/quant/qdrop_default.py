# Short recipes, of some hundred iterations a unit, share this: straight-through rounding, learned with the step sizes
_base_ = './brecq_default.py'
quantizer = dict(weight=dict(rounding=dict(type='StraightThrough')))
reconstructor = dict(_delete_=True, type='QDropReconstructor', joint=dict(iterations=500, batch_size=16))
