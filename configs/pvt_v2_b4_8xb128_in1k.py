# Classification on ImageNet-1k, PVTv2-B4. Reference: top-1 83.6.
_base_ = ['_base_/recipes/classifier_300ep_in1k.py', '_base_/backbones/pvt_v2_b4.py']
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None, drop_path_rate=0.3),
    head=dict(in_channels=_base_.out_channels[-1]))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
