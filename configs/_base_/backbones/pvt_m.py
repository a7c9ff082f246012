# PVT-Medium with its ImageNet-1k weights.
backbone = dict(
    type='PVT',
    arch='medium',
    drop_path_rate=0.1,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_medium.pth'))
out_channels = [64, 128, 320, 512]
