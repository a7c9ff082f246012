# No weight decay of norms, biases, position embeddings and class tokens.
# Command line: --option no_decay. In a leaf, with this file among its bases:
#     optim_wrapper = _base_.optim_wrapper_no_decay
optim_wrapper_no_decay = dict(
    constructor='PVTOptimWrapperConstructor', paramwise_cfg=dict(no_decay=True))
