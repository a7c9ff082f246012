# PVT-Small whose keys and values shrink by average pooling, not by a strided convolution.
# Its ImageNet-1k weights are those of pvt_s.py; the linear layers after pooling are initialised.
backbone = dict(
    type='PVT',
    arch='small',
    sr_mode='avg',
    drop_path_rate=0.1,
    allow_partial=True,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'))
out_channels = [64, 128, 320, 512]
