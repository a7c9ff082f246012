# Sparse R-CNN with 300 proposals on COCO for 36 epochs: mmdet's own recipe, a PVT for the ResNet.
_base_ = 'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_300-proposals_crop-ms-480-800-3x_coco.py'
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='PVTCheckpointHook')]

model = dict(backbone=dict(_delete_=True))
# 8 GPUs of 2 images. Scaling adapts the learning rate to another total batch; epochs stay epochs.
auto_scale_lr = dict(enable=False, base_batch_size=16)
