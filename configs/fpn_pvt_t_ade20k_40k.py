# Semantic FPN, PVT-Tiny. Reference: mIoU 36.6.
_base_ = ['_base_/recipes/sem_fpn_ade20k_40k.py', '_base_/backbones/pvt_t.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
