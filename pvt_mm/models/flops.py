"""What PyTorch's counter of FLOPs does not know: its own fused attention on a CPU."""

from __future__ import annotations

from typing import Any

import torch

_FUSED = '_scaled_dot_product_flash_attention_for_cpu'


def count_fused_attention() -> None:
    """Tell ``torch.utils.flop_counter`` how to count fused attention on a CPU, if it cannot."""
    try:
        from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count
    except ImportError:  # PyTorch < 2.2
        return
    operation: Any = getattr(torch.ops.aten, _FUSED, None)
    if operation is None or operation in flop_registry:
        return

    @register_flop_formula(operation)
    def count(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)
