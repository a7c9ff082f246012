"""The network: PVT and PVTv2, registered as backbones."""

from pvt_mm.models.classification import PVTHead
from pvt_mm.models.flops import count_fused_attention
from pvt_mm.models.pvt import PVT, PVTv2
from pvt_mm.models.pyramid import PyramidBackbone

count_fused_attention()

__all__ = ['PVT', 'PVTHead', 'PVTv2', 'PyramidBackbone']
