# Semantic FPN, PVT-Medium. Reference: mIoU 43.5.
_base_ = ['_base_/recipes/sem_fpn_ade20k_40k.py', '_base_/backbones/pvt_m.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
