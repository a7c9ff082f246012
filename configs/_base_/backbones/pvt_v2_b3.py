# PVTv2-B3 with its ImageNet-1k weights.
backbone = dict(
    type='PVTv2',
    arch='b3',
    drop_path_rate=0.1,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b3.pth'))
out_channels = [64, 128, 320, 512]
