"""The network: PVT and PVTv2, registered as backbones."""

from pvt_mm.models.classification import PVTHead
from pvt_mm.models.pvt import PVT, PVTv2
from pvt_mm.models.pyramid import PyramidBackbone

__all__ = ['PVT', 'PVTHead', 'PVTv2', 'PyramidBackbone']
