# Deformable DETR on COCO for 50 epochs: mmdet's own recipe with a PVT for the ResNet.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='PVTCheckpointHook')]

model = dict(backbone=dict(_delete_=True))
# 16 GPUs of 2 images. Scaling adapts the learning rate to another total batch; epochs stay epochs.
auto_scale_lr = dict(enable=False, base_batch_size=32)
