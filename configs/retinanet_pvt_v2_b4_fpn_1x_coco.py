# RetinaNet, PVTv2-B4. Reference: box AP 46.1.
_base_ = ['_base_/recipes/retinanet_fpn_1x_coco.py', '_base_/backbones/pvt_v2_b4.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
optim_wrapper = dict(optimizer=dict(lr=1e-4 / 1.4))
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
