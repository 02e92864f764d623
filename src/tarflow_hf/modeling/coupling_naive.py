"""The specification: the couplings as they stand in the paper, one equation a line.

Every implementation is tested against these functions, and nothing else calls them. They are
differentiable by autograd, and exact in float64 unless something is far in a tail.

Shapes: d latent dimensions, K components. phi, Phi: density and distribution function of N(0, 1).

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .normal import normal_log_prob


def affine(z: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """u = (z - m) e^-s; log du/dz = -s."""
    return (z - loc) * torch.exp(-log_scale), -log_scale


def mixture_cdf(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """u = Phi^-1(sum_k pi_k Phi(t_k)) with t_k = (z - m_k) e^-s_k; log du/dz = log p - log phi(u)."""
    weight = logits.softmax(-1)
    t = (z[..., None] - loc) * torch.exp(-log_scale)
    u = torch.special.ndtri((weight * torch.special.ndtr(t)).sum(-1))
    density = (weight * torch.exp(normal_log_prob(t) - log_scale)).sum(-1)

    return u, density.log() - normal_log_prob(u)


def autoregressive_mixture_cdf(z: Tensor, parameters: Callable) -> tuple[Tensor, Tensor]:
    """u_i = Phi^-1(F_i(z_i)), F_i the mixture with parameters(i, z_<i): logits, loc, log_scale."""
    pairs = [mixture_cdf(z[..., i], *parameters(i, z[..., :i])) for i in range(z.shape[-1])]
    u, log_det = (torch.stack(x, -1) for x in zip(*pairs, strict=True))

    return u, log_det.sum(-1)


def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """u_i = Phi^-1(F_i(z_i)), F_i the mixture's distribution function of z_i given z_<i.

    Its weights are alpha^(1) = pi and alpha^(i+1)_k ~ alpha^(i)_k N(z_i; m_ki, e^(2 s_k)). The
    Jacobian is triangular: log|det| is the sum over the dimensions.
    """
    u, log_det = [], 0
    for z_i, mean_i in zip(z.unbind(-1), mean.unbind(-1), strict=True):
        u_i, log_slope = mixture_cdf(z_i, logits, mean_i, log_scale)
        t = (z_i[..., None] - mean_i) * torch.exp(-log_scale)
        logits = logits + normal_log_prob(t) - log_scale

        u.append(u_i)
        log_det = log_det + log_slope

    return torch.stack(u, -1), log_det
