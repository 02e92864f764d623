"""The couplings in plain PyTorch: they run anywhere, and the kernels are tested against them.

Each coupling is a monotone map ``z -> u`` of one position to standard normal noise, and stands
beside its inverse. phi, Phi: density and distribution function of N(0, 1). t_k = (z - m_k)
exp(-s_k) is z as component k sees it. Tensors are float32 or float64 and broadcast already:
`coupling.py` is the door that checks and casts.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425. The gradients and the log-space forms are
    derived here.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .normal import (
    LOG_SQRT_2PI,
    find_root,
    log_reversed_hazard,
    ndtri_exp,
    normal_log_prob,
    normal_tails,
)

# --------------------------------------------------------------------------------------------------
# Affine: u = (z - m) exp(-s)
# --------------------------------------------------------------------------------------------------


def affine(z: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return (z - loc) * torch.exp(-log_scale), -log_scale.expand_as(z)


def affine_inverse(u: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return loc + torch.exp(log_scale) * u


# --------------------------------------------------------------------------------------------------
# One scalar through the distribution function of a mixture: u = Phi^-1(F(z)), F(z) = sum_k pi_k
# Phi(t_k)
# --------------------------------------------------------------------------------------------------


class _Transformed(NamedTuple):
    """u(z) with what its derivatives are made of. The tail is the smaller of F and 1 - F; `sign` is
    -1 for that one.
    """

    u: Tensor  # (...)
    log_det: Tensor  # (...)  log du/dz
    sign: Tensor  # (...)
    log_hazard: Tensor  # (...)  log h(-|u|)
    log_tail_weight: Tensor  # (..., K)  log r_k: the share of component k in the tail
    log_slope: Tensor  # (..., K)  log of the share of component k in the derivative of log(tail)


def _transform(z: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> _Transformed:
    """u = Phi^-1(F(z)) from the smaller tail; nothing saturates and nothing cancels.

    In the smaller tail, F = sum_k pi_k Phi(t_k) (mirrored where that is 1 - F), with r_k = pi_k
    Phi(t_k) / F and the reversed hazard h = phi / Phi:

        du/dz = p(z) / phi(u) = sum_k r_k h(t_k) exp(-s_k) / h(u)

    which, unlike log p(z) - log phi(u), is not the difference of two huge numbers. It is at most
    max_k exp(-s_k), because phi(Phi^-1(q)) is concave in q.
    """
    tails = normal_tails((z.unsqueeze(-1) - loc) * torch.exp(-log_scale))
    log_cdf = torch.logsumexp(log_weight + tails.log_cdf, -1)
    log_sf = torch.logsumexp(log_weight + tails.log_sf, -1)
    is_lower = log_cdf <= log_sf
    sign = torch.where(is_lower, 1.0, -1.0).to(z.dtype)
    quantile = ndtri_exp(torch.minimum(log_cdf, log_sf))  # <= 0
    log_hazard = log_reversed_hazard(quantile)
    in_lower = is_lower.unsqueeze(-1)
    log_tail_weight = torch.log_softmax(
        log_weight + torch.where(in_lower, tails.log_cdf, tails.log_sf), -1
    )
    log_slope = (
        log_tail_weight
        + torch.where(in_lower, tails.log_cdf_hazard, tails.log_sf_hazard)
        - log_scale
    )
    log_det = torch.logsumexp(log_slope, -1) - log_hazard

    return _Transformed(sign * quantile, log_det, sign, log_hazard, log_tail_weight, log_slope)


class _Derivatives(NamedTuple):
    """Of u(z) and its parameters. With rho_k = pi_k N(z; m_k, s_k) / p(z), which sum to 1, and D =
    du/dz:

        du/dm_k = -rho_k D,   du/ds_k = -rho_k D (z - m_k),   du/dlog pi_k = +-(r_k - pi_k) / h(-|u|)

    the latter before the normalisation of the weights. And log D = log p(z) - log phi(u), so its
    gradient is that of log p(z) plus u times that of u.
    """

    u: Tensor  # (...)
    log_det: Tensor  # (...)  log D
    rho: Tensor  # (..., K)
    by_weight: Tensor  # (..., K)  du/dlog pi_k


def _differentiate(at: _Transformed, log_weight: Tensor) -> _Derivatives:
    by_tail = (at.sign * torch.exp(-at.log_hazard)).unsqueeze(-1)
    by_weight = by_tail * (at.log_tail_weight.exp() - log_weight.exp())
    return _Derivatives(at.u, at.log_det, torch.softmax(at.log_slope, -1), by_weight)


def _invert(u: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """The z with u(z) = u. Each component alone would put it at z_k = m_k + exp(s_k) u: it lies
    between those.

    The sign of u says which tail of the mixture is the smaller one at the root: that tail alone is
    looked at, with everything mirrored to make it the lower one, F. The quantile of F is not needed
    either: as u does, -sqrt(-2 log F) grows almost linearly with z, and dividing by its slope in u
    at the root,

        residual(z) = (Y - y) Y / h(-|u|),   y = sqrt(-2 log F(z)),   Y = sqrt(-2 log Phi(-|u|)),   h = phi / Phi,

    makes it agree with u(z) - u to first order. The tolerance is what rounding log F alone makes of
    it: below that it would hop over 0 until the bracket closes.
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

        # Not above -eps: far in the other tail F rounds to 1, where the slope below is of no use
        # but must be finite.
        log_tail = torch.logsumexp(log_joint, -1).clamp(max=-eps)
        y = torch.sqrt(-2 * log_tail)
        slope = (
            torch.softmax(log_joint, -1) * torch.exp(normal_log_prob(t) - log_cdf - log_scale)
        ).sum(-1)
        difference = (
            2 * (log_tail - target.log_cdf) / (target_y + y)
        )  # Y - y, without rounding its terms

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

    In a gap between two far components du/dz underflows and the quotient has no floating-point
    value. The cube root leaves room for the products that follow: by t, by exp(-s), and in the
    Rosenblatt inverse by the next dz/du.
    """
    limit = torch.finfo(grad.dtype).max ** (1 / 3)
    return (grad * torch.exp(-log_det).clamp(max=limit)).clamp(-limit, limit)


class _MixtureCDF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, loc, log_scale):
        log_weight = torch.log_softmax(logits, -1)
        at = _transform(z, log_weight, loc, log_scale)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(z, log_weight, loc, log_scale, *_differentiate(at, log_weight))
        return at.u, at.log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        z, log_weight, loc, log_scale, *derivatives = ctx.saved_tensors
        at = _Derivatives(*derivatives)
        grad_u = (grad_u + grad_log_det * at.u).unsqueeze(-1)
        weight = grad_log_det.unsqueeze(-1) * at.rho
        difference, inverse_scale = z.unsqueeze(-1) - loc, torch.exp(-log_scale)
        pull = (
            weight * difference * inverse_scale * inverse_scale
            - at.rho * grad_u * at.log_det.exp().unsqueeze(-1)
        )

        return (
            -pull.sum(-1),  # nothing changes where z and all locations move together
            grad_u * at.by_weight + weight - grad_log_det.unsqueeze(-1) * log_weight.exp(),
            pull,
            pull * difference - weight,
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
        # u(z, theta) = u held fixed: dz = (du - du/dtheta dtheta) / D.
        z, logits, loc, log_scale = ctx.saved_tensors
        log_weight = torch.log_softmax(logits, -1)
        at = _differentiate(_transform(z, log_weight, loc, log_scale), log_weight)
        grad_u = _divide_by_slope(grad_z, at.log_det)
        grad_loc = at.rho * grad_z.unsqueeze(-1)

        return (
            grad_u,
            -grad_u.unsqueeze(-1) * at.by_weight,
            grad_loc,
            grad_loc * (z.unsqueeze(-1) - loc),
        )


def mixture_cdf(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return _MixtureCDF.apply(z, logits, loc, log_scale)


def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFInverse.apply(u, logits, loc, log_scale)


def mixture_cdf_log_prob(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log p(z) = LSE_k(log pi_k + log phi(t_k) - s_k)."""
    t = (z.unsqueeze(-1) - loc) * torch.exp(-log_scale)
    return torch.logsumexp(torch.log_softmax(logits, -1) + normal_log_prob(t) - log_scale, -1)


# --------------------------------------------------------------------------------------------------
# D scalars, each through a mixture whose parameters depend on those before it: a small network for
# each dimension
# --------------------------------------------------------------------------------------------------


class AutoregressiveNetwork(NamedTuple):
    """Weights of the networks that give dimension i its K components, from a hidden state and the
    dimensions j < i.

    E features of each dimension and H hidden units for each; only the blocks j < i exist. The log
    scales are kept within +-max_log_scale, softly.

    Reference: Lippe & Gavves, *Categorical Normalizing Flows via Continuous Transformations*, ICLR
    2021, arXiv:2006.09790, whose masked weights these are without the masked blocks.
    """

    features_weight: (
        Tensor  # (D - 1, E, 3)  of (x, elu(x), elu(-x)), for the last dimension nobody asks
    )
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
        """The hidden units (..., H) of dimension i, from its part of the context (..., H) and the
        features before.

        Without their activation, which is `F.gelu`.
        """
        if i == 0:
            return from_context

        num_features = self.features_bias.shape[1]
        start = num_features * (i * (i - 1) // 2)
        weight = self.from_features[:, start : start + num_features * i]
        return from_context + F.linear(torch.cat(features[:i], -1), weight)

    def output(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters, three of (..., K), from what the last layer says (..., 3 K)."""
        logits, loc, log_scale = raw.chunk(3, -1)
        return logits, loc, self.max_log_scale * torch.tanh(log_scale / self.max_log_scale)


def autoregressive_mixture_parameters(
    z: Tensor, from_context: Tensor, network: AutoregressiveNetwork
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, loc and log_scale, each (..., D, K), for z (..., D) and from_context (..., D, H)."""
    features = [network.features(i, x) for i, x in enumerate(z.unbind(-1)[:-1])]
    hidden = torch.stack(
        [network.hidden(i, x, features) for i, x in enumerate(from_context.unbind(-2))], -2
    )
    raw = (
        torch.einsum("...ih,ikh->...ik", F.gelu(hidden), network.output_weight)
        + network.output_bias
    )

    return network.output(raw)


def autoregressive_mixture_cdf_inverse(
    u: Tensor,
    from_context: Tensor,
    network: AutoregressiveNetwork,
    invert: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = mixture_cdf_inverse,
) -> Tensor:
    z, features = [], []
    for i, u_i in enumerate(u.unbind(-1)):
        hidden = F.gelu(network.hidden(i, from_context[..., i, :], features))
        parameters = network.output(
            F.linear(hidden, network.output_weight[i], network.output_bias[i])
        )
        z.append(invert(u_i, *parameters))
        if i < u.shape[-1] - 1:
            features.append(network.features(i, z[i]))

    return torch.stack(z, -1)


# --------------------------------------------------------------------------------------------------
# Rosenblatt transform of a d-dimensional mixture: dimension by dimension the same scalar map, with
# weights alpha^(1) = pi and alpha^(i+1)_k proportional to alpha^(i)_k N(z_i; mu_ki, sigma_k^2)
# --------------------------------------------------------------------------------------------------

# d K times the positions handled at once: what bounds the memory of a vocabulary-sized mixture.
# Half a MiB a tensor in float32, of which a CPU's cache holds the few that an operation works on.
_CHUNK_ELEMENTS = 2**17
# d K up to which the derivatives are kept for the backward pass, instead of computed again: of a
# position 8 KiB in float32, as much as a decoder layer of width 128 keeps.
_KEPT_ELEMENTS = 2**10


def _chunks(num_positions: int, elements_of_position: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // elements_of_position)
    for start in range(0, num_positions, size):
        yield slice(start, start + size)


def _log_normal(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log N(z; m_k, s_k) (..., K) of z (...), in float64 for float32 as well.

    30 scales from every component it is -450, and its rounding alone would cost the ratios of the
    weights 1e-4.
    """
    log_scale = log_scale.double()
    return (
        normal_log_prob((z.double().unsqueeze(-1) - loc.double()) * torch.exp(-log_scale))
        - log_scale
    )


def _normalized(log_joint: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-weights (..., K) that are normalised, of float64 ones that are not."""
    return torch.log_softmax((log_joint - log_joint.amax(-1, keepdim=True)).to(dtype), -1)


class _Rosenblatt(NamedTuple):
    """The derivatives of all dimensions, of positions (n,), with the weights that log p(z) begins
    and ends with.
    """

    dimensions: _Derivatives  # (n, d) and (n, d, K)
    prior: Tensor  # (n, K)  alpha^(1) = pi
    posterior: Tensor  # (n, K)  alpha^(d+1)


def _log_weights(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log alpha^(1), ..., log alpha^(d+1), together (n, d + 1, K); the means as loc (d, K)."""
    log_joint = torch.cat([logits.double().unsqueeze(1), _log_normal(z, loc, log_scale)], 1)
    return _normalized(log_joint.cumsum(1), z.dtype)


def _differentiate_rosenblatt(at: _Transformed, log_weights: Tensor) -> _Rosenblatt:
    dimensions = _differentiate(at, log_weights[:, :-1])
    return _Rosenblatt(dimensions, log_weights[:, 0].exp(), log_weights[:, -1].exp())


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
    kept: list[_Rosenblatt] | None = None,
) -> _RosenblattGradients:
    """Gradients of the transform (given grad_u and grad_log_det) or of its inverse (given grad_z),
    (n, d) positions.

    From the last dimension to the first. The weights of dimension i are log pi_k + sum_{j<i} log
    N(z_j; mu_kj), so what the later dimensions ask of their weights, summed up in `demand`, falls
    on log N(z_i; mu_ki); dimension i then adds its own. Of the log-determinant, log p(z) starts the
    sum with rho_k = alpha^(d+1)_k.

    The inverse z(u, theta) has dz = J^-1 (du - du/dtheta dtheta), J = du/dz lower triangular:
    grad_u = J^-T grad_z, one row of back substitution a dimension, and the parameters' gradients
    are those of the transform at -grad_u.
    """
    gradients = _RosenblattGradients(*(torch.zeros_like(x) for x in (z, logits, mean, log_scale)))
    loc, inverse_scale = mean.T.contiguous(), torch.exp(-log_scale)

    for index, rows in enumerate(_chunks(len(z), mean.numel())):
        if kept is None:
            log_weights = _log_weights(z[rows], logits[rows], loc, log_scale)
            at = _transform(z[rows], log_weights[:, :-1], loc, log_scale)
            dimensions, prior, posterior = _differentiate_rosenblatt(at, log_weights)
        else:
            dimensions, prior, posterior = kept[index]

        demand = torch.zeros_like(prior)
        if grad_log_det is not None:
            demand += grad_log_det[rows].unsqueeze(-1) * posterior
            gradients.logits[rows] -= grad_log_det[rows].unsqueeze(-1) * prior

        for i in reversed(range(mean.shape[1])):
            u, log_det, rho, by_weight = (x[:, i] for x in dimensions)
            difference = z[rows, i].unsqueeze(-1) - loc[i]
            pull = demand * difference * inverse_scale * inverse_scale

            if grad_z is None:
                grad_ui = grad_u[rows, i] + grad_log_det[rows] * u
                slope = grad_ui * log_det.exp()
            else:
                slope = pull.sum(-1) - grad_z[rows, i]
                grad_ui = _divide_by_slope(slope, log_det)

            pull = pull - rho * slope.unsqueeze(-1)
            gradients.z[rows, i] = -(pull.sum(-1) if grad_z is None else grad_ui)
            gradients.mean[:, i] += pull.sum(0)
            gradients.log_scale.add_((pull * difference - demand).sum(0))
            demand = demand + grad_ui.unsqueeze(-1) * by_weight

        gradients.logits[rows] += demand

    return gradients


class _MixtureRosenblatt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        u, log_det = torch.empty_like(z), z.new_empty(len(z))
        loc = mean.T.contiguous()
        keeps = any(ctx.needs_input_grad) and mean.numel() <= _KEPT_ELEMENTS
        kept = []

        for rows in _chunks(len(z), mean.numel()):
            log_weights = _log_weights(z[rows], logits[rows], loc, log_scale)
            at = _transform(z[rows], log_weights[:, :-1], loc, log_scale)
            u[rows], log_det[rows] = at.u, at.log_det.sum(-1)

            if keeps:
                dimensions, *weights = _differentiate_rosenblatt(at, log_weights)
                kept += [*dimensions, *weights]

        ctx.save_for_backward(z, logits, mean, log_scale, *kept)
        return u, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        z, logits, mean, log_scale, *kept = ctx.saved_tensors
        chunks = [
            _Rosenblatt(_Derivatives(*x[:4]), *x[4:]) for x in zip(*[iter(kept)] * 6, strict=True)
        ]

        return tuple(
            rosenblatt_backward(
                z, logits, mean, log_scale, grad_u, grad_log_det, kept=chunks or None
            )
        )


class _MixtureRosenblattInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        z = torch.empty_like(u)
        for rows in _chunks(len(u), len(mean)):
            log_joint = logits[rows].double()
            for i in range(mean.shape[1]):
                z[rows, i] = _invert(
                    u[rows, i], _normalized(log_joint, u.dtype), mean[:, i], log_scale
                )
                log_joint = log_joint + _log_normal(z[rows, i], mean[:, i], log_scale)

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
        joint = (
            joint - 0.5 * ((z[:, i].unsqueeze(-1) - mean[:, i]) * torch.exp(-log_scale)).square()
        )

    return joint


class _MixtureRosenblattLogProb(torch.autograd.Function):
    """log p(z) = LSE_k(logits_k + sum_i log N(z_i; mu_ki, sigma_k^2)) - LSE_k(logits_k). No
    distribution function.
    """

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
        # The decoder's logits are one constant: there, nothing of the size of all positions times K
        # is made.
        grad_logits = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        gradients = _RosenblattGradients(
            torch.zeros_like(z), grad_logits, torch.zeros_like(mean), torch.zeros_like(log_scale)
        )
        inverse_scale = torch.exp(-log_scale)

        for rows in _chunks(len(z), len(mean)):
            joint = _log_joint(z[rows], logits[rows], mean, log_scale)
            weight = grad[rows].unsqueeze(-1) * torch.softmax(joint, -1)

            if grad_logits is not None:
                grad_logits[rows] = weight - grad[rows].unsqueeze(-1) * torch.softmax(
                    logits[rows], -1
                )

            for i in range(mean.shape[1]):
                difference = z[rows, i].unsqueeze(-1) - mean[:, i]
                pull = weight * difference * inverse_scale * inverse_scale
                gradients.z[rows, i] = -pull.sum(-1)
                gradients.mean[:, i] += pull.sum(0)
                gradients.log_scale.add_((pull * difference - weight).sum(0))

        return tuple(gradients)


def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    return _MixtureRosenblatt.apply(z, logits, mean, log_scale)


def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattInverse.apply(u, logits, mean, log_scale)


def mixture_rosenblatt_log_prob(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattLogProb.apply(z, logits, mean, log_scale)
