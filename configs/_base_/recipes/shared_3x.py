# What the 3x recipes share, under names of its own: mmengine refuses two bases that set one key.
resize = dict(
    type='RandomChoiceResize',
    scales=[(side, 1333) for side in range(480, 801, 32)],
    keep_ratio=True)
resize_first = dict(
    type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True)
crop = dict(
    type='RandomCrop',
    crop_type='absolute_range',
    crop_size=(384, 600),
    allow_negative_crop=True)
# DETR's augmentation, what follows the loading of an image: one of many sizes, half of them crops.
crop_steps_3x = [
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoice', transforms=[[resize], [resize_first, crop, resize]]),
    dict(type='PackDetInputs'),
]
# `norm` is part of the names of all layer norms.
optim_wrapper_3x = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))))
