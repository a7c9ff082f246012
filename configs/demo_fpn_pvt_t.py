# The published Semantic FPN recipe on the embedded data set, from random weights: minutes on a CPU.
_base_ = 'fpn_pvt_t_ade20k_40k.py'
data_root = 'data/demo/ade'
metainfo = dict(
    classes=('background', 'zero', 'one', 'two', 'three', 'four'),
    palette=[
        [200, 200, 200], [230, 60, 60], [60, 170, 60], [50, 110, 230], [240, 180, 0], [200, 60, 200]
    ])
crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(init_cfg=None),
    decode_head=dict(num_classes=6))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(640, 160), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.9),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(640, 160), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
# ADE20KDataset accepts none but its own 150 classes; this is its base, set up as it is.
dataset = dict(
    type='BaseSegDataset', reduce_zero_label=True, data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=4, num_workers=1, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(
    num_workers=1, dataset=dict(**dataset, pipeline=test_pipeline))

train_cfg = dict(max_iters=600, val_interval=150)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=50, end=600, by_epoch=False),
]
# One kernel for all parameters: the same numbers in less time.
optim_wrapper = dict(optimizer=dict(fused=True))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=600, max_keep_ckpts=1))
