# Semantic FPN on ADE20K for 4 GPUs of 4 images: half the batch and the learning rate of the 40k
# recipe, and twice its iterations, so as many images.
_base_ = 'sem_fpn_ade20k_40k.py'
optim_wrapper = dict(optimizer=dict(lr=1e-4))
train_cfg = dict(max_iters=80000, val_interval=8000)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=80000)
default_hooks = dict(checkpoint=dict(interval=8000))
auto_scale_lr = dict(base_batch_size=16)
