# Sparse R-CNN 3x, PVTv2-B2. Reference: box AP 50.1.
_base_ = ['_base_/recipes/sparse_rcnn_fpn_3x_coco.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
optim_wrapper = dict(optimizer=dict(lr=2.5e-5 / 1.4))
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
