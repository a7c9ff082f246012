# Mask R-CNN on COCO for 36 epochs, shorter sides of 640 to 800; else the 1x recipe.
_base_ = 'mask_rcnn_fpn_1x_coco.py'
train_pipeline = _base_.train_pipeline
train_pipeline[2] = dict(type='RandomResize', scale=[(1333, 640), (1333, 800)], keep_ratio=True)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=36, milestones=[27, 33])
