# DETR on COCO for 50 epochs: mmdet's own model with a PVT for the ResNet; the reference's schedule
# and image sizes.
_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='PVTCheckpointHook')]

model = dict(data_preprocessor=dict(pad_size_divisor=32), backbone=dict(_delete_=True))

train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(
        type='RandomChoiceResize',
        scales=[(1333, side) for side in range(640, 801, 32)],
        keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
max_epochs = 50
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=max_epochs, milestones=[33])
# 8 GPUs of 2 images. Scaling adapts the learning rate to another total batch; epochs stay epochs.
auto_scale_lr = dict(enable=False, base_batch_size=16)
