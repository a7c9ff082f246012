# The published RetinaNet recipe on the embedded data set, from random weights: minutes on a CPU.
_base_ = 'retinanet_pvt_t_fpn_1x_coco.py'
data_root = 'data/demo/coco/'
metainfo = dict(
    classes=('zero', 'one', 'two', 'three', 'four'),
    palette=[(230, 60, 60), (60, 170, 60), (50, 110, 230), (240, 180, 0), (200, 60, 200)])
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=5))

resize = dict(type='Resize', scale=(128, 128), keep_ratio=True)
# Not flipped: a mirrored digit is none.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    resize,
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')

train_cfg = dict(max_epochs=15, val_interval=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        begin=1,
        end=15,
        T_max=14,
        by_epoch=True,
        convert_to_iter_based=True),
]
# One kernel for all parameters: the same numbers in less time.
optim_wrapper = dict(optimizer=dict(lr=1.5e-4, fused=True))
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=15, max_keep_ckpts=1))
