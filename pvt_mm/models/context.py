"""What PyTorch does around a forward pass: tracing, export, autocast, bf16 on a CPU."""

from __future__ import annotations

import torch

try:
    _is_compiling = torch.compiler.is_compiling
except AttributeError:  # PyTorch 2.1
    _is_compiling = torch._dynamo.is_compiling


def is_tracing() -> bool:
    """Tell whether operations are being recorded, so that sizes must stay symbolic."""
    return bool(_is_compiling() or torch.jit.is_tracing())


def is_exporting() -> bool:
    """Tell whether torch.export is recording, from PyTorch 2.7 on; before, it is not known."""
    known = getattr(torch.compiler, 'is_exporting', None)
    return known is not None and known()


def bf16_is_slow_on_cpu() -> bool:
    """Tell whether oneDNN has no bf16 GEMM on this CPU, so that PyTorch uses plain loops."""
    known = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
    return known is not None and not known()


def is_autocast(device_type: str) -> bool:
    """Tell whether autocast is on for a kind of device."""
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # PyTorch < 2.4
        cpu = device_type == 'cpu'
        return torch.is_autocast_cpu_enabled() if cpu else torch.is_autocast_enabled()


def autocast_dtype(device_type: str) -> torch.dtype:
    """Return the dtype that autocast computes in."""
    try:
        return torch.get_autocast_dtype(device_type)
    except AttributeError:  # PyTorch < 2.4
        cpu = device_type == 'cpu'
        return torch.get_autocast_cpu_dtype() if cpu else torch.get_autocast_gpu_dtype()
