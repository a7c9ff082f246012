"""When the fast path applies: only where nobody could tell the difference but by the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from pvt_mm.models.context import autocast_dtype, is_autocast, is_tracing

#: Methods of stock classes, by name, as they were when the class was imported.
Methods = tuple[tuple[str, Any], ...]
#: Layers with a weight and a bias.
_LAYERS: dict[type, Methods] = {
    kind: (('forward', kind.forward),) for kind in (nn.Linear, nn.LayerNorm, nn.Conv2d)
}
#: Modules without parameters of their own.
_OTHERS: dict[type, Methods] = {
    kind: (('forward', kind.forward),)
    for kind in (
        nn.GELU, nn.ReLU, nn.Identity, nn.Dropout, nn.AdaptiveAvgPool2d, nn.AvgPool2d,
        nn.MaxPool2d,
    )
}  # fmt: skip
_PLAIN_TENSORS = (nn.Parameter, Tensor)
_DTYPES = (torch.float32, torch.bfloat16)


def _called() -> tuple[Any, ...]:
    """Return what the layers call; profilers and adapters replace it."""
    return (
        nn.Module.__call__, nn.Module._call_impl, nn.Conv2d._conv_forward, F.linear, F.conv2d,
        F.layer_norm, F.gelu, F.relu, F.dropout, F.scaled_dot_product_attention,
    )  # fmt: skip


_CALLED = _called()
Module = TypeVar('Module', bound=type[nn.Module])


def stock(kind: Module) -> Module:
    """Tell the fast path, as a decorator, that it computes what this class of module does."""
    kinds = _LAYERS if issubclass(kind, nn.Conv2d) else _OTHERS
    methods = {name: value for name, value in vars(kind).items() if not name.startswith('__')}
    kinds[kind] = tuple({'forward': kind.forward, **methods}.items())
    return kind


def applies(module: nn.Module, x: Tensor, is_known: Callable[[Any], bool] | None = None) -> bool:
    """Tell whether the fast path may compute what a module would.

    So it is for a plain fp32 or bf16 tensor on a CPU, computing in fp32 or bf16, where all layers
    below the module are of the stock classes with plain parameters, and nothing watches them: no
    hook, mode, transform or tracer. It costs less than 1% of a block at 224 x 224.

    Args:
        module: A block or a patch embedding, being called. Hooks on itself run as ever.
        x: Its input.
        is_known: Tells more of the module, such as whether its layers fit together.
    """
    return (
        _is_plain_input(x)
        and _are_stock(module.__dict__['_modules'], x.dtype)
        and (is_known is None or is_known(module))
    )


def may_overwrite(x: Tensor, made_by: nn.Module) -> bool:
    """Tell whether nobody but its receiver can hold a tensor that a stock module returned.

    So it is outside of autograd, where the module and all below it are stock and unwatched.
    """
    return (
        not (torch.is_grad_enabled() or x.requires_grad)
        and _is_plain_input(x)
        and _are_stock({'': made_by}, x.dtype)
    )


def _is_plain_input(x: Tensor) -> bool:
    """Tell whether the kernels take a tensor, and nothing watches all operations."""
    return bool(
        type(x) is Tensor  # no subclass
        and not is_tracing()
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in _DTYPES
        and compute_dtype(x) in _DTYPES
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        # Also the user's choice of an attention kernel on a CPU, as by torch.nn.attention.
        and torch.backends.cuda.flash_sdp_enabled()
        and not is_observed()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matmuls run in: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    return autocast_dtype(device) if is_autocast(device) else x.dtype


def is_observed() -> bool:
    """Tell whether anything watches all operations or modules: a mode, a transform, a hook."""
    return bool(
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad, jvp
        or forward_ad._current_level >= 0
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or _called() != _CALLED
    )


def _are_stock(modules: dict[str, nn.Module | None], dtype: torch.dtype) -> bool:
    """Tell whether modules and all below them compute what their classes say, unwatched.

    It looks into their dictionaries: ``nn.Module.__getattr__`` would take several times as long.
    """
    for module in modules.values():
        if module is None:
            continue
        kind, state = type(module), module.__dict__
        methods = _LAYERS.get(kind)
        if methods is not None:
            if not _is_plain_layer(state, dtype):
                return False
        else:
            methods = _OTHERS.get(kind)
            if methods is None or state['_parameters']:
                return False
        for name, method in methods:  # patched on the instance, or on the class
            if name in state or getattr(kind, name) is not method:
                return False
        if (
            state.get('_compiled_call_impl') is not None
            or state['_forward_hooks']
            or state['_forward_pre_hooks']
            or state['_backward_hooks']
            or state['_backward_pre_hooks']
            or (kind is nn.Dropout and state['training'] and state['p'] > 0.0)
            or state.get('approximate', 'none') != 'none'  # of GELU
        ):
            return False
        children = state['_modules']
        if children and not _are_stock(children, dtype):
            return False
    return True


def _is_plain_layer(state: dict[str, Any], dtype: torch.dtype) -> bool:
    """Tell whether a layer has a plain weight and bias, and pads with zeros if at all."""
    parameters = state['_parameters']
    if len(parameters) != 2 or 'weight' in state or 'bias' in state:
        return False
    for name in ('weight', 'bias'):
        parameter = parameters.get(name)
        if not (
            type(parameter) in _PLAIN_TENSORS
            and parameter.dtype is dtype
            and parameter.is_cpu
            and parameter.layout is torch.strided
        ):
            return False
    return state.get('padding_mode', 'zeros') == 'zeros'
