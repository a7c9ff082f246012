# An exponential moving average of the weights, which is what is evaluated and saved.
# Command line: --option ema. In a leaf, with this file among its bases:
#     default_hooks = _base_.default_hooks_ema
# Among the default hooks, since a list of custom hooks would replace the recipe's.
default_hooks_ema = dict(
    ema=dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=2e-4))
