# Classification on ImageNet-1k, PVT-Large. Reference: top-1 81.7.
_base_ = ['_base_/recipes/classifier_300ep_in1k.py', '_base_/backbones/pvt_l.py']
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None, with_cls_token=True, drop_path_rate=0.3),
    head=dict(in_channels=_base_.out_channels[-1]))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
