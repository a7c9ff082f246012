# Segmenter's mask transformer, PVT-Small. The reference has no such recipe.
_base_ = ['_base_/recipes/segmenter_mask_ade20k_40k.py', '_base_/backbones/pvt_s.py']
model = dict(
    backbone=dict(_base_.backbone, out_indices=(3,)),
    decode_head=dict(in_channels=_base_.out_channels[3]))
