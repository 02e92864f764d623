"""A coupling whose logits are linear in hidden states, without all logits existing at once.

The plan is that of fused linear cross-entropies. The logits of some positions are made, used and
thrown away, and made again for the backward pass; the gradient of the weights adds up in float32.

The libraries' own (torch's `linear_cross_entropy`, Liger's, Cut Cross-Entropy) do not serve here.
The log-density is a difference of two of their logsumexps, that of [hidden, z, |z|^2, 1] W'^T and
that of hidden W^T. But in the former z mu_k / sigma_k^2 and |mu_k|^2 / sigma_k^2 cancel once the
codebook has separated: float32 leaves an error of eps |mu_k|^2 / sigma_k^2 in (z - mu_k)^2 /
sigma_k^2, and bfloat16 leaves nothing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .coupling_torch import chunks

Coupling = Callable[..., Tensor | tuple[Tensor, ...]]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 if the factors are half precision: as accurate as it was accumulated."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coupling, size, dtype, z, hidden, weight, bias, *shared):
        ctx.save_for_backward(z, hidden, weight, bias, *shared)
        ctx.coupling, ctx.size, ctx.dtype = coupling, size, dtype
        weight = weight.to(dtype)
        outputs = []

        for rows in chunks(len(z), size):
            logits = _matmul(hidden[rows].to(dtype), weight.T).add_(bias)
            out = coupling(z[rows], logits, *shared)
            outputs.append(out if isinstance(out, tuple) else (out,))

        outputs = tuple(map(torch.cat, zip(*outputs, strict=True)))
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        z, hidden, *summed = ctx.saved_tensors
        weight, bias, *shared = summed
        half_weight = weight.to(ctx.dtype)
        grad_z = torch.empty_like(z)
        grad_hidden = torch.empty_like(hidden)
        grad_weight, grad_bias, *grad_shared = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in summed
        )

        for rows in chunks(len(z), ctx.size):
            half_hidden = hidden[rows].to(ctx.dtype)
            leaves = [z[rows], _matmul(half_hidden, half_weight.T).add_(bias), *shared]
            leaves = [x.detach().requires_grad_() for x in leaves]
            with torch.enable_grad():
                out = ctx.coupling(*leaves)

            out = out if isinstance(out, tuple) else (out,)
            cotangents = [grad[rows] for grad in grad_outputs]
            grad_z[rows], grad_logits, *gradients = torch.autograd.grad(out, leaves, cotangents)
            for total, gradient in zip(grad_shared, gradients, strict=True):
                total += gradient

            grad_bias += grad_logits.sum(0)
            half_grad_logits = grad_logits.to(ctx.dtype)
            del grad_logits, leaves, out  # of the logits' size, as the products below
            grad_hidden[rows] = _matmul(half_grad_logits, half_weight)
            grad_weight += _matmul(half_grad_logits.T, half_hidden)

        return None, None, None, grad_z, grad_hidden, grad_weight, grad_bias, *grad_shared


@torch.compiler.disable  # unrolled, the loops would keep every chunk's logits
def _in_chunks(coupling: Coupling, size: int, z: Tensor, hidden: Tensor, weight: Tensor, *rest):
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)

    with torch.autocast(device, enabled=False):
        return _InChunks.apply(coupling, size, dtype, z, hidden, weight, *rest)


def with_linear_logits(
    coupling: Coupling,
    max_logits: int,
    z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    *shared: Tensor,
) -> Tensor | tuple[Tensor, ...]:
    """coupling(z, hidden W^T + b, *shared), of which at most `max_logits` logits exist at once.

    In the backward pass they exist two or three times over. If all of them fit, this is exactly
    that expression; so it is in a graph that is exported, which takes any number of positions.

    Args:
        coupling: An op on n positions, with gradients.
        max_logits: The number of logits; one position's always exist.
        z, hidden: Latents (n, d) and hidden states (n, w).
        weight, bias: The projection to logits, (K, w) and (K,).
        shared: Further arguments of the coupling, the same for all positions.
    """
    size = max(1, max_logits // len(weight))
    if torch.compiler.is_exporting() or len(z) <= size:
        return coupling(z, F.linear(hidden, weight, bias), *shared)
    return _in_chunks(coupling, size, z, hidden, weight, bias, *shared)
