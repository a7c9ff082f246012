# Segmenter's mask transformer on ADE20K: no convolution after the backbone, whose last stage alone
# it reads. Data, optimiser and schedule are those of Semantic FPN.
_base_ = 'sem_fpn_ade20k_40k.py'
model = dict(
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='SegmenterMaskTransformerHead',
        in_channels=512,
        channels=512,
        embed_dims=512,
        num_heads=8,
        num_layers=2,
        num_classes=150,
        dropout_ratio=0.0,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)))
