"""The couplings in plain PyTorch: the specification, which runs anywhere and never gets clever.

Each coupling is a monotone map ``z -> u`` of one position to standard normal noise, and stands beside its inverse.
phi, Phi: density and distribution function of N(0, 1). t_k = (z - m_k) exp(-s_k) is z as component k sees it.
Tensors are float32 or float64 and broadcast already: `coupling.py` is the door that checks and casts.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based Autoregressive Flows*,
    NeurIPS 2025, arXiv:2507.00425. The gradients and the log-space forms are derived here.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .normal import LOG_SQRT_2PI, find_root, log_reversed_hazard, ndtri_exp, normal_log_prob, normal_tails

# --------------------------------------------------------------------------------------------------------------------
# Affine: u = (z - m) exp(-s)
# --------------------------------------------------------------------------------------------------------------------


def affine(z: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return (z - loc) * torch.exp(-log_scale), -log_scale.expand_as(z)


def affine_inverse(u: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return loc + torch.exp(log_scale) * u


# --------------------------------------------------------------------------------------------------------------------
# One scalar through the distribution function of a mixture: u = Phi^-1(F(z)), F(z) = sum_k pi_k Phi(t_k)
# --------------------------------------------------------------------------------------------------------------------


class _Transformed(NamedTuple):
    """u(z) with what its gradients are made of. The tail is the smaller of F and 1 - F; `sign` is -1 for that one."""

    u: Tensor  # (...)
    log_det: Tensor  # (...)  log du/dz
    sign: Tensor  # (...)
    t: Tensor  # (..., K)
    log_tail_weight: Tensor  # (..., K)  log r_k: the share of component k in the tail
    log_slope: Tensor  # (..., K)  log of the share of component k in the derivative of log(tail)


def _transform(z: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> _Transformed:
    """u = Phi^-1(F(z)) from the smaller tail; nothing saturates and nothing cancels.

    In the smaller tail, F = sum_k pi_k Phi(t_k) (mirrored where that is 1 - F), with r_k = pi_k Phi(t_k) / F and the
    reversed hazard h = phi / Phi:

        du/dz = p(z) / phi(u) = sum_k r_k h(t_k) exp(-s_k) / h(u)

    which, unlike log p(z) - log phi(u), is not the difference of two huge numbers. It is at most max_k exp(-s_k),
    because phi(Phi^-1(q)) is concave in q.
    """
    t = (z.unsqueeze(-1) - loc) * torch.exp(-log_scale)
    tails = normal_tails(t)
    log_cdf = torch.logsumexp(log_weight + tails.log_cdf, -1)
    log_sf = torch.logsumexp(log_weight + tails.log_sf, -1)
    is_lower = log_cdf <= log_sf
    sign = torch.where(is_lower, 1.0, -1.0).to(z.dtype)
    quantile = ndtri_exp(torch.minimum(log_cdf, log_sf))  # <= 0
    in_lower = is_lower.unsqueeze(-1)
    log_tail_weight = torch.log_softmax(log_weight + torch.where(in_lower, tails.log_cdf, tails.log_sf), -1)
    log_slope = log_tail_weight + torch.where(in_lower, tails.log_cdf_hazard, tails.log_sf_hazard) - log_scale
    log_det = torch.logsumexp(log_slope, -1) - log_reversed_hazard(quantile)
    return _Transformed(sign * quantile, log_det, sign, t, log_tail_weight, log_slope)


def _invert(u: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """The z with u(z) = u. Each component alone would put it at z_k = m_k + exp(s_k) u: it lies between those.

    The sign of u says which tail of the mixture is the smaller one at the root: that tail alone is looked at, with
    everything mirrored to make it the lower one, F. The quantile of F is not needed either: as u does, -sqrt(-2 log F)
    grows almost linearly with z, and dividing by its slope in u at the root,

        residual(z) = (Y - y) Y / h(-|u|),   y = sqrt(-2 log F(z)),   Y = sqrt(-2 log Phi(-|u|)),   h = phi / Phi,

    makes it agree with u(z) - u to first order. The tolerance is what rounding log F alone makes of it: below that it
    would hop over 0 until the bracket closes.
    """
    candidates = loc + torch.exp(log_scale) * u.unsqueeze(-1)
    lower, upper = candidates.amin(-1), candidates.amax(-1)
    sign = torch.where(u > 0, -1.0, 1.0).to(u.dtype)
    mirrored_inverse_scale = sign.unsqueeze(-1) * torch.exp(-log_scale)
    target = normal_tails(-u.abs())
    target_y = torch.sqrt(-2 * target.log_cdf)
    log_factor = torch.log(target_y) - target.log_cdf_hazard
    signed_factor = sign * torch.exp(log_factor)
    eps = torch.finfo(u.dtype).eps

    def residual(z: Tensor) -> tuple[Tensor, Tensor]:
        t = (z.unsqueeze(-1) - loc) * mirrored_inverse_scale
        log_cdf = torch.special.log_ndtr(t)
        log_joint = log_weight + log_cdf
        # Not above -eps: far in the other tail F rounds to 1, where the slope below is of no use but must be finite.
        log_tail = torch.logsumexp(log_joint, -1).clamp(max=-eps)
        y = torch.sqrt(-2 * log_tail)
        slope = (torch.softmax(log_joint, -1) * torch.exp(normal_log_prob(t) - log_cdf - log_scale)).sum(-1)
        difference = 2 * (log_tail - target.log_cdf) / (target_y + y)  # Y - y, without rounding its terms
        return difference * signed_factor, torch.log(slope / y) + log_factor

    return find_root(
        residual,
        lower=lower,
        upper=upper,
        initial=(log_weight.exp() * candidates).sum(-1).clamp(lower, upper),
        tolerance=1.5 * eps * (1 + u.abs()),
    )


def _divide_by_slope(grad: Tensor, log_det: Tensor) -> Tensor:
    """grad times dz/du = exp(-log_det), saturating at the cube root of the dtype's range.

    In a gap between two far components du/dz underflows and the quotient has no floating-point value. The cube root
    leaves room for the products that follow: by t, by exp(-s), and in the Rosenblatt inverse by the next dz/du.
    """
    limit = torch.finfo(grad.dtype).max ** (1 / 3)
    return (grad * torch.exp(-log_det).clamp(max=limit)).clamp(-limit, limit)


class _LocalGradients(NamedTuple):
    z: Tensor  # (...)
    log_weight: Tensor  # (..., K), before the normalisation of the weights
    loc: Tensor  # (..., K)
    log_scale: Tensor  # (..., K)


def _cdf_gradients(
    at: _Transformed, log_weight: Tensor, log_scale: Tensor, grad_u: Tensor, grad_u_times_slope: Tensor
) -> _LocalGradients:
    """Gradients of sum(grad_u * u), for u of `_transform`. With rho_k = pi_k N(z; m_k, s_k) / p(z) and D = du/dz:

        du/dz = D,   du/dm_k = -rho_k D,   du/ds_k = -rho_k D (z - m_k),   du/dlog pi_k = +-(r_k - pi_k) / h(u)

    `grad_u_times_slope` is grad_u D, passed beside grad_u because the inverse knows it without multiplying by D.
    """
    rho = torch.softmax(at.log_slope, -1)
    grad_loc = -rho * grad_u_times_slope.unsqueeze(-1)
    grad_weight = (at.sign * grad_u * torch.exp(-log_reversed_hazard(-at.u.abs()))).unsqueeze(-1)
    return _LocalGradients(
        z=grad_u_times_slope,
        log_weight=grad_weight * (at.log_tail_weight.exp() - log_weight.exp()),
        loc=grad_loc,
        log_scale=grad_loc * at.t * torch.exp(log_scale),
    )


class _MixtureCDF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, loc, log_scale):
        ctx.save_for_backward(z, logits, loc, log_scale)
        at = _transform(z, torch.log_softmax(logits, -1), loc, log_scale)
        return at.u, at.log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        z, logits, loc, log_scale = ctx.saved_tensors
        log_weight = torch.log_softmax(logits, -1)
        at = _transform(z, log_weight, loc, log_scale)
        # log du/dz = log p(z) - log phi(u), so its gradient is that of log p plus u times that of u.
        grad_u = grad_u + grad_log_det * at.u
        cdf = _cdf_gradients(at, log_weight, log_scale, grad_u, grad_u * at.log_det.exp())
        rho = grad_log_det.unsqueeze(-1) * torch.softmax(at.log_slope, -1)
        rho_t = rho * at.t
        pull = rho_t * torch.exp(-log_scale)
        return (
            cdf.z - pull.sum(-1),
            cdf.log_weight + rho - grad_log_det.unsqueeze(-1) * log_weight.exp(),
            cdf.loc + pull,
            cdf.log_scale + rho_t * at.t - rho,
        )


class _MixtureCDFInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, logits, loc, log_scale):
        z = _invert(u, torch.log_softmax(logits, -1), loc, log_scale)
        ctx.save_for_backward(z, logits, loc, log_scale)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z):
        # u(z, theta) = u held fixed: dz = (du - du/dtheta dtheta) / D. The same gradients, at -grad_z / D.
        z, logits, loc, log_scale = ctx.saved_tensors
        log_weight = torch.log_softmax(logits, -1)
        at = _transform(z, log_weight, loc, log_scale)
        grad_u = _divide_by_slope(grad_z, at.log_det)
        cdf = _cdf_gradients(at, log_weight, log_scale, -grad_u, -grad_z)
        return grad_u, cdf.log_weight, cdf.loc, cdf.log_scale


def mixture_cdf(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return _MixtureCDF.apply(z, logits, loc, log_scale)


def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFInverse.apply(u, logits, loc, log_scale)


def mixture_cdf_log_prob(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log p(z) = LSE_k(log pi_k + log phi(t_k) - s_k)."""
    t = (z.unsqueeze(-1) - loc) * torch.exp(-log_scale)
    return torch.logsumexp(torch.log_softmax(logits, -1) + normal_log_prob(t) - log_scale, -1)


# --------------------------------------------------------------------------------------------------------------------
# D scalars, each through a mixture whose parameters depend on those before it: a small network for each dimension
# --------------------------------------------------------------------------------------------------------------------


class AutoregressiveNetwork(NamedTuple):
    """Weights of the networks that give dimension i its K components, from a hidden state and the dimensions j < i.

    E features of each dimension and H hidden units for each; only the blocks j < i exist. The log scales are kept
    within +-max_log_scale, softly.

    Reference: Lippe & Gavves, *Categorical Normalizing Flows via Continuous Transformations*, ICLR 2021,
    arXiv:2006.09790, whose masked weights these are without the masked blocks.
    """

    features_weight: Tensor  # (D - 1, E, 3)  of (x, elu(x), elu(-x)), for the last dimension nobody asks
    features_bias: Tensor  # (D - 1, E)
    from_features: Tensor  # (H, E D (D - 1) / 2)  to dimension 1 from 0, to 2 from 0 and 1, ...
    output_weight: Tensor  # (D, 3 K, H)  to logits, locations, log scales
    output_bias: Tensor  # (D, 3 K)
    max_log_scale: float

    def features(self, i: int, z: Tensor) -> Tensor:
        """The features (..., E) of dimension i's values (...)."""
        inputs = torch.stack([z, F.elu(z), F.elu(-z)], -1)
        return F.gelu(F.linear(inputs, self.features_weight[i], self.features_bias[i]))

    def hidden(self, i: int, from_context: Tensor, features: list[Tensor]) -> Tensor:
        """The hidden units (..., H) of dimension i, from its part of the context (..., H) and the features before."""
        if i > 0:
            num_features = self.features_bias.shape[1]
            start = num_features * (i * (i - 1) // 2)
            weight = self.from_features[:, start : start + num_features * i]
            from_context = from_context + F.linear(torch.cat(features[:i], -1), weight)
        return F.gelu(from_context)

    def output(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters, three of (..., K), from what the last layer says (..., 3 K)."""
        logits, loc, log_scale = raw.chunk(3, -1)
        return logits, loc, self.max_log_scale * torch.tanh(log_scale / self.max_log_scale)


def autoregressive_mixture_parameters(
    z: Tensor, from_context: Tensor, network: AutoregressiveNetwork
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, loc and log_scale, each (..., D, K), for z (..., D) and from_context (..., D, H)."""
    features = [network.features(i, x) for i, x in enumerate(z.unbind(-1)[:-1])]
    hidden = torch.stack([network.hidden(i, x, features) for i, x in enumerate(from_context.unbind(-2))], -2)
    return network.output(torch.einsum("...ih,ikh->...ik", hidden, network.output_weight) + network.output_bias)


def autoregressive_mixture_cdf_inverse(
    u: Tensor,
    from_context: Tensor,
    network: AutoregressiveNetwork,
    invert: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = mixture_cdf_inverse,
) -> Tensor:
    z, features = [], []
    for i, u_i in enumerate(u.unbind(-1)):
        hidden = network.hidden(i, from_context[..., i, :], features)
        parameters = network.output(F.linear(hidden, network.output_weight[i], network.output_bias[i]))
        z.append(invert(u_i, *parameters))
        if i < u.shape[-1] - 1:
            features.append(network.features(i, z[i]))
    return torch.stack(z, -1)


# --------------------------------------------------------------------------------------------------------------------
# Rosenblatt transform of a d-dimensional mixture: dimension by dimension the same scalar map, with weights
# alpha^(1) = pi and alpha^(i+1)_k proportional to alpha^(i)_k N(z_i; mu_ki, sigma_k^2)
# --------------------------------------------------------------------------------------------------------------------

# K times the positions handled at once: what bounds the memory of a vocabulary-sized mixture. 4 MiB a tensor in
# float32, of which the forward pass holds some twenty and the backward pass d + 1 more; and a CPU's cache holds one.
_CHUNK_ELEMENTS = 2**20


def _chunks(num_positions: int, num_components: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // num_components)
    for start in range(0, num_positions, size):
        yield slice(start, start + size)


def _first_weight(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), -1)


def _next_weight(log_weight: Tensor, z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log alpha^(i+1) (n, K) from log alpha^(i) and z_i (n,), normalised.

    In float64 for float32 as well: 30 scales from every component, log N is -450 and its rounding alone would cost the
    ratios of the weights 1e-4.
    """
    log_scale = log_scale.double()
    t = (z.double().unsqueeze(-1) - loc.double()) * torch.exp(-log_scale)
    return torch.log_softmax(log_weight + normal_log_prob(t) - log_scale, -1)


def _add_mixture_gradients(
    gradients: "_RosenblattGradients", rows: slice, i: int, z: Tensor, weight: Tensor, mean: Tensor, log_scale: Tensor
) -> None:
    """Adds the gradients of sum_nk weight_nk log N(z_ni; mu_ki, sigma_k^2) for dimension i of some positions."""
    inverse_scale = torch.exp(-log_scale)
    t = (z[:, i].unsqueeze(-1) - mean[:, i]) * inverse_scale
    weight_t = weight * t
    pull = weight_t * inverse_scale
    gradients.z[rows, i] -= pull.sum(-1)
    gradients.mean[:, i] += pull.sum(0)
    gradients.log_scale.add_((weight_t * t - weight).sum(0))


class _RosenblattGradients(NamedTuple):
    z: Tensor  # (n, d)
    logits: Tensor | None  # (n, K)
    mean: Tensor  # (K, d)
    log_scale: Tensor  # (K,)


def rosenblatt_backward(
    z: Tensor,
    logits: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    grad_u: Tensor | None = None,
    grad_log_det: Tensor | None = None,
    grad_z: Tensor | None = None,
) -> _RosenblattGradients:
    """Gradients of the transform (given grad_u and grad_log_det) or of its inverse (given grad_z), (n, d) positions.

    From the last dimension to the first. The weights of dimension i are log pi_k + sum_{j<i} log N(z_j; mu_kj), so
    what the later dimensions ask of their weights, summed up in `grad_weight`, falls on log N(z_i; mu_ki); dimension i
    then adds its own demand. Of the log-determinant, log p(z) starts the sum with rho_k = alpha^(d+1)_k.

    The inverse z(u, theta) has dz = J^-1 (du - du/dtheta dtheta), J = du/dz lower triangular: grad_u = J^-T grad_z,
    one row of back substitution a dimension, and the parameters' gradients are those of the transform at -grad_u.
    """
    gradients = _RosenblattGradients(*(torch.zeros_like(x) for x in (z, logits, mean, log_scale)))
    num_components, latent_size = mean.shape
    for rows in _chunks(len(z), num_components):
        log_weight = _first_weight(logits[rows])
        log_weights = [log_weight.to(z.dtype)]
        for i in range(latent_size):
            log_weight = _next_weight(log_weight, z[rows, i], mean[:, i], log_scale)
            log_weights.append(log_weight.to(z.dtype))
        grad_weight = torch.zeros_like(log_weights[0])
        if grad_log_det is not None:
            grad_weight += grad_log_det[rows].unsqueeze(-1) * log_weights[-1].exp()
            gradients.logits[rows] -= grad_log_det[rows].unsqueeze(-1) * log_weights[0].exp()
        for i in reversed(range(latent_size)):
            _add_mixture_gradients(gradients, rows, i, z[rows], grad_weight, mean, log_scale)
            at = _transform(z[rows, i], log_weights[i], mean[:, i], log_scale)
            if grad_z is None:
                grad_ui = grad_u[rows, i] + grad_log_det[rows] * at.u
                grad_ui_times_slope = grad_ui * at.log_det.exp()
            else:
                grad_ui_times_slope = -(grad_z[rows, i] + gradients.z[rows, i])
                grad_ui = _divide_by_slope(grad_ui_times_slope, at.log_det)
                gradients.z[rows, i] = -grad_ui  # from here on the place of u's gradient: z_i is done with
            cdf = _cdf_gradients(at, log_weights[i], log_scale, grad_ui, grad_ui_times_slope)
            if grad_z is None:
                gradients.z[rows, i] += cdf.z
            gradients.mean[:, i] += cdf.loc.sum(0)
            gradients.log_scale.add_(cdf.log_scale.sum(0))
            grad_weight += cdf.log_weight
        gradients.logits[rows] += grad_weight
    return gradients


class _MixtureRosenblatt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        ctx.save_for_backward(z, logits, mean, log_scale)
        u, log_det = torch.empty_like(z), z.new_zeros(len(z))
        num_components, latent_size = mean.shape
        for rows in _chunks(len(z), num_components):
            log_weight = _first_weight(logits[rows])
            for i in range(latent_size):
                at = _transform(z[rows, i], log_weight.to(z.dtype), mean[:, i], log_scale)
                u[rows, i] = at.u
                log_det[rows] += at.log_det
                log_weight = _next_weight(log_weight, z[rows, i], mean[:, i], log_scale)
        return u, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        return tuple(rosenblatt_backward(*ctx.saved_tensors, grad_u=grad_u, grad_log_det=grad_log_det))


class _MixtureRosenblattInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        z = torch.empty_like(u)
        num_components, latent_size = mean.shape
        for rows in _chunks(len(u), num_components):
            log_weight = _first_weight(logits[rows])
            for i in range(latent_size):
                z[rows, i] = _invert(u[rows, i], log_weight.to(u.dtype), mean[:, i], log_scale)
                log_weight = _next_weight(log_weight, z[rows, i], mean[:, i], log_scale)
        ctx.save_for_backward(z, logits, mean, log_scale)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z):
        return tuple(rosenblatt_backward(*ctx.saved_tensors, grad_z=grad_z))


def _log_joint(z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """logits_k + log N(z; mu_k, sigma_k^2 I): z (n, d) and logits (n, K) to (n, K)."""
    joint = logits - log_scale * mean.shape[1] - LOG_SQRT_2PI * mean.shape[1]
    for i in range(mean.shape[1]):
        joint = joint - 0.5 * ((z[:, i].unsqueeze(-1) - mean[:, i]) * torch.exp(-log_scale)).square()
    return joint


class _MixtureRosenblattLogProb(torch.autograd.Function):
    """log p(z) = LSE_k(logits_k + sum_i log N(z_i; mu_ki, sigma_k^2)) - LSE_k(logits_k). No distribution function."""

    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        ctx.save_for_backward(z, logits, mean, log_scale)
        log_prob = z.new_empty(len(z))
        for rows in _chunks(len(z), len(mean)):
            joint = _log_joint(z[rows], logits[rows], mean, log_scale)
            log_prob[rows] = torch.logsumexp(joint, -1) - torch.logsumexp(logits[rows], -1)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, logits, mean, log_scale = ctx.saved_tensors
        # The decoder's logits are one constant: there, nothing of the size of all positions times K is made.
        grad_logits = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        gradients = _RosenblattGradients(
            torch.zeros_like(z), grad_logits, torch.zeros_like(mean), torch.zeros_like(log_scale)
        )
        for rows in _chunks(len(z), len(mean)):
            joint = _log_joint(z[rows], logits[rows], mean, log_scale)
            weight = grad[rows].unsqueeze(-1) * torch.softmax(joint, -1)
            if grad_logits is not None:
                grad_logits[rows] = weight - grad[rows].unsqueeze(-1) * torch.softmax(logits[rows], -1)
            for i in range(mean.shape[1]):
                _add_mixture_gradients(gradients, rows, i, z[rows], weight, mean, log_scale)
        return tuple(gradients)


def mixture_rosenblatt(z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return _MixtureRosenblatt.apply(z, logits, mean, log_scale)


def mixture_rosenblatt_inverse(u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureRosenblattInverse.apply(u, logits, mean, log_scale)


def mixture_rosenblatt_log_prob(z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureRosenblattLogProb.apply(z, logits, mean, log_scale)
