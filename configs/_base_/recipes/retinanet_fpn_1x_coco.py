# RetinaNet on COCO for 12 epochs: mmdet's own recipe with a PVT for the ResNet and AdamW for SGD.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='PVTCheckpointHook')]

model = dict(backbone=dict(_delete_=True))
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4))
# 8 GPUs of 2 images. Scaling adapts the learning rate to another total batch; epochs stay epochs.
auto_scale_lr = dict(enable=False, base_batch_size=16)
