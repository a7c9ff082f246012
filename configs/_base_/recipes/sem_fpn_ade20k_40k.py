# Semantic FPN on ADE20K for 40,000 iterations: mmseg's own parts with a PVT for the ResNet.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/schedules/schedule_40k.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='PVTCheckpointHook')]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    pretrained=None,
    backbone=dict(_delete_=True),
    decode_head=dict(num_classes=150))
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4))
# mmseg's base stops at 1e-4, half of this learning rate.
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)
]
# 8 GPUs of 4 images. Scaling adapts the learning rate, never the 40,000 iterations: with half the
# total batch set train_cfg.max_iters, param_scheduler.0.end and train_cfg.val_interval yourself.
auto_scale_lr = dict(enable=False, base_batch_size=32)

# The published weights were scored on images resized to multiples of 32, so not padded here.
to_multiple = dict(type='ResizeToMultiple', size_divisor=32)
test_pipeline = [*_base_.test_pipeline[:2], to_multiple, *_base_.test_pipeline[2:]]
val_dataloader = test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1]['transforms'].insert(1, [to_multiple])
