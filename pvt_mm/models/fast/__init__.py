"""The fast path of a block on a CPU: when it applies, and its kernels."""

from pvt_mm.models.fast.branches import block, is_known_block, patch_embed
from pvt_mm.models.fast.conditions import applies, may_overwrite, stock

__all__ = ['applies', 'block', 'is_known_block', 'may_overwrite', 'patch_embed', 'stock']
