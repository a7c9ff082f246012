"""Gradients of the fast path where somebody looks: the textbook's, which can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pvt_mm.models.fast.conditions import is_observed

_is_batched: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, 'is_legacy_batchedtensor', lambda grad: False
)


def textbook_is_needed(grad: Tensor) -> bool:
    """Tell whether a backward pass must be the textbook's.

    So it is where autograd asks for a graph of it (``create_graph=True``) or for many gradients at
    once (``is_grads_batched=True``), or where a mode or a transform watches its operations.
    """
    return torch.is_grad_enabled() or _is_batched(grad) or is_observed()


def textbook_grads(
    textbook: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor | None]:
    """Run the textbook on the inputs and return their gradients; None where none is needed.

    Args:
        textbook: What the fast path computed, in PyTorch's plain operations.
        inputs: What the forward pass was given and saved.
        grad: Gradient of the result.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        out = textbook(*inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=create_graph))
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs]
