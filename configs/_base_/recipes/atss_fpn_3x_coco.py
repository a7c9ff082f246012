# ATSS on COCO for 36 epochs of many image sizes, in mixed precision: mmdet's model, AdamW.
_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py', 'shared_3x.py']
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='PVTCheckpointHook')]

model = dict(backbone=dict(_delete_=True))

train_pipeline = [*_base_.train_pipeline[:2], *_base_.crop_steps_3x]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(_base_.optim_wrapper_3x, _delete_=True, type='AmpOptimWrapper')
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=36, milestones=[27, 33])
# 8 GPUs of 2 images. Scaling adapts the learning rate to another total batch; epochs stay epochs.
auto_scale_lr = dict(enable=False, base_batch_size=16)
