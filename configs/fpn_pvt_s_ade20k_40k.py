# Semantic FPN, PVT-Small. Reference: mIoU 41.9.
_base_ = ['_base_/recipes/sem_fpn_ade20k_40k.py', '_base_/backbones/pvt_s.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
