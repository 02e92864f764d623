"""A coupling whose logits are a linear map of hidden states, chunk by chunk: no tensor of positions
times vocabulary.

The plan is that of fused linear cross-entropies: the logits of some positions are made, used and
thrown away, and made again for the backward pass; the gradient of the weights adds up in float32.
The libraries' own (torch's `linear_cross_entropy`, Liger's, Cut Cross-Entropy) do not serve here.
Two of their logsumexps do make the log-density, that of hidden W^T and that of [hidden, z, |z|^2,
1] W'^T; but the latter's terms z mu_k / sigma_k^2 and |mu_k|^2 / sigma_k^2 cancel where the
codebook has separated: of (z - mu_k)^2 / sigma_k^2 their float32 leaves no more than eps
|mu_k|^2 / sigma_k^2, and their bfloat16 nothing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .coupling_torch import chunks

Coupling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of half-precision factors the sum in float32, as it was accumulated."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coupling, size, dtype, z, hidden, weight, bias, mean, log_scale):
        ctx.save_for_backward(z, hidden, weight, bias, mean, log_scale)
        ctx.coupling, ctx.size, ctx.dtype = coupling, size, dtype
        weight = weight.to(dtype)
        outputs = []

        for part in chunks(len(z), size):
            logits = _matmul(hidden[part].to(dtype), weight.T) + bias
            out = coupling(z[part], logits, mean, log_scale)
            outputs.append(out if isinstance(out, tuple) else (out,))

        outputs = tuple(map(torch.cat, zip(*outputs, strict=True)))
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        z, hidden, weight, bias, mean, log_scale = ctx.saved_tensors
        half_weight = weight.to(ctx.dtype)
        grad_z, grad_hidden = torch.empty_like(z), torch.empty_like(hidden)
        grad_weight, grad_bias, grad_mean, grad_log_scale = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            for x in (weight, bias, mean, log_scale)
        )

        for part in chunks(len(z), ctx.size):
            half_hidden = hidden[part].to(ctx.dtype)
            leaves = [z[part], _matmul(half_hidden, half_weight.T) + bias, mean, log_scale]
            leaves = [x.detach().requires_grad_() for x in leaves]
            with torch.enable_grad():
                out = ctx.coupling(*leaves)

            cotangents = [grad[part] for grad in grad_outputs]
            gradients = torch.autograd.grad(
                out, leaves, cotangents[0] if len(cotangents) == 1 else cotangents
            )
            grad_z[part], grad_logits = gradients[:2]
            grad_mean += gradients[2]
            grad_log_scale += gradients[3]
            grad_bias += grad_logits.sum(0)
            half_grad_logits = grad_logits.to(ctx.dtype)
            del grad_logits, gradients, leaves, out
            grad_hidden[part] = _matmul(half_grad_logits, half_weight)
            grad_weight += _matmul(half_grad_logits.T, half_hidden)

        return (
            None,
            None,
            None,
            grad_z,
            grad_hidden,
            grad_weight,
            grad_bias,
            grad_mean,
            grad_log_scale,
        )


@torch.compiler.disable  # its loops are of Python, over tensors that no compiler would keep small
def _in_chunks(
    coupling: Coupling, size: int, z: Tensor, hidden: Tensor, weight: Tensor, *rest: Tensor
):
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)

    with torch.autocast(device, enabled=False):
        return _InChunks.apply(coupling, size, dtype, z, hidden, weight, *rest)


def with_linear_logits(
    coupling: Coupling,
    z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    max_logits: int,
) -> Tensor | tuple[Tensor, ...]:
    """coupling(z, hidden W^T + b, mean, log_scale) for z (n, d) and hidden (n, w); weight (K, w),
    bias (K,).

    At most `max_logits` logits exist at once, two or three times over in the backward pass. Where
    all of them are fewer, this is what it says, and nothing else.
    """
    size = max(1, max_logits // len(weight))
    if len(z) <= size:
        return coupling(z, F.linear(hidden, weight, bias), mean, log_scale)
    return _in_chunks(coupling, size, z, hidden, weight, bias, mean, log_scale)
