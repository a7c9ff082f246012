# Semantic FPN for 4 GPUs, PVTv2-B2. The reference publishes no figure.
_base_ = ['_base_/recipes/sem_fpn_ade20k_80k.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
