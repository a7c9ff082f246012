# Layer-wise learning rate decay: a block learns at 0.9 of the rate of the block after it.
# Command line: --option layer_decay. In a leaf, with this file among its bases:
#     optim_wrapper = _base_.optim_wrapper_layer_decay
optim_wrapper_layer_decay = dict(
    constructor='PVTOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.9))
