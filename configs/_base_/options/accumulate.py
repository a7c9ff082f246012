# Gradients of 4 iterations for one step: 4 times the batch in the memory of one.
# Command line: --option accumulate. In a leaf, with this file among its bases:
#     optim_wrapper = _base_.optim_wrapper_accumulate
optim_wrapper_accumulate = dict(accumulative_counts=4)
