"""The couplings in plain PyTorch: they run anywhere, at any place in a tail, in bounded memory.

`coupling_naive.py` says in one equation a line what they compute. Three things differ here:

- Everything is in log space and starts from the smaller tail, so that nothing saturates or cancels.
- Gradients are derived by hand. Autograd would keep ten tensors of every component; these keep two,
  or none, and the inverses get theirs from the implicit function theorem.
- The Rosenblatt transform runs over chunks of positions, so that a vocabulary of components fits.

Each coupling is a monotone map `z -> u` of one position to standard normal noise, and stands next
to its inverse. Notation: phi and Phi are the density and the distribution function of N(0, 1), and
t_k = (z - m_k) exp(-s_k) is z as component k sees it. Tensors are float32 or float64 and broadcast
already: the ops of `coupling.py` check and cast.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425. The gradients and the log-space forms are
    derived here.
"""

from collections.abc import Callable, Iterator, Sequence
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

# ---------------------------------------------------------------------- affine: u = (z - m) exp(-s)


def affine(z: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return (z - loc) * torch.exp(-log_scale), -log_scale.expand_as(z)


def affine_inverse(u: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return loc + torch.exp(log_scale) * u


# ---------------------------------------- mixture CDF: u = Phi^-1(F(z)), F(z) = sum_k pi_k Phi(t_k)


class _Transformed(NamedTuple):
    """u(z), and what its derivatives are made of. The tail is the smaller one of F and 1 - F."""

    u: Tensor  # (...)
    log_det: Tensor  # (...)  log du/dz
    sign: Tensor  # (...)  1 if the tail is F, -1 if it is 1 - F
    log_hazard: Tensor  # (...)  log h(-|u|)
    log_tail_weight: Tensor  # (..., K)  log r_k: the share of component k in the tail
    log_slope: Tensor  # (..., K)  log of the share of component k in the derivative of log(tail)


def _transform(z: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> _Transformed:
    """u = Phi^-1(F(z)) from the smaller tail, where nothing saturates and nothing cancels.

    Let that be F = sum_k pi_k Phi(t_k); if it is 1 - F, everything is mirrored. With component k's
    share r_k = pi_k Phi(t_k) / F and the reversed hazard h = phi / Phi,

        du/dz = p(z) / phi(u) = sum_k r_k h(t_k) exp(-s_k) / h(u).

    Unlike log p(z) - log phi(u) this is not the difference of two huge numbers. It is at most max_k
    exp(-s_k), because phi(Phi^-1(q)) is concave in q.
    """
    tails = normal_tails((z.unsqueeze(-1) - loc) * torch.exp(-log_scale))
    log_cdf = torch.logsumexp(log_weight + tails.log_cdf, -1)
    log_sf = torch.logsumexp(log_weight + tails.log_sf, -1)
    is_lower = log_cdf <= log_sf
    sign = torch.where(is_lower, 1.0, -1.0).to(z.dtype)
    quantile = ndtri_exp(torch.minimum(log_cdf, log_sf))  # <= 0
    log_hazard = log_reversed_hazard(quantile)

    is_lower = is_lower.unsqueeze(-1)
    log_tail = torch.where(is_lower, tails.log_cdf, tails.log_sf)
    log_tail_hazard = torch.where(is_lower, tails.log_cdf_hazard, tails.log_sf_hazard)
    log_tail_weight = torch.log_softmax(log_weight + log_tail, -1)
    log_slope = log_tail_weight + log_tail_hazard - log_scale
    log_det = torch.logsumexp(log_slope, -1) - log_hazard

    return _Transformed(sign * quantile, log_det, sign, log_hazard, log_tail_weight, log_slope)


class _Derivatives(NamedTuple):
    """The factors of u's derivatives by z and by the parameters.

    With rho_k = pi_k N(z; m_k, s_k) / p(z), which sum to 1, and D = du/dz:

        du/dm_k = -rho_k D,  du/ds_k = -rho_k D (z - m_k),  du/dlog pi_k = +-(r_k - pi_k) / h(-|u|),

    where the log pi_k need not be normalised. The gradient of log D = log p(z) - log phi(u) is that
    of log p(z) plus u times that of u.
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
    """The z with u(z) = u, between the components' own roots m_k + exp(s_k) u.

    The sign of u says which tail of the mixture is the smaller one at the root. Only that tail is
    computed; everything is mirrored to make it the lower one, F. The quantile of F is not computed
    either: -sqrt(-2 log F), too, grows almost linearly with z. Divided by its slope in u at the
    root it agrees with u(z) - u to first order, and that is the function whose root is sought:

        residual(z) = (Y - y) Y / h(-|u|),   y = sqrt(-2 log F(z)),   Y = sqrt(-2 log Phi(-|u|)).

    The tolerance is the residual's error from rounding log F. With a smaller one the iterates would
    hop over 0 until the bracket closes.
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

        # Far in the other tail F rounds to 1. The slope is of no use there, but must be finite.
        log_tail = torch.logsumexp(log_joint, -1).clamp(max=-eps)
        y = torch.sqrt(-2 * log_tail)
        hazard = torch.exp(normal_log_prob(t) - log_cdf - log_scale)
        slope = (torch.softmax(log_joint, -1) * hazard).sum(-1)

        # Y - y, without rounding its terms.
        difference = 2 * (log_tail - target.log_cdf) / (target_y + y)
        return difference * signed_factor, torch.log(slope / y) + log_factor

    return find_root(
        residual,
        lower=lower,
        upper=upper,
        initial=(log_weight.exp() * candidates).sum(-1).clamp(lower, upper),
        tolerance=1.5 * eps * (1 + u.abs()),
    )


def _divide_by_slope(grad: Tensor, log_det: Tensor) -> Tensor:
    """grad dz/du = grad exp(-log_det), saturating at the cube root of the dtype's range.

    In a gap between two distant components du/dz underflows and the quotient is infinite. The cube
    root leaves room for the products that follow: by t, by exp(-s), and in the Rosenblatt inverse
    by the next dz/du.
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
        difference = z.unsqueeze(-1) - loc
        inverse_scale = torch.exp(-log_scale)
        pull_of_u = at.rho * grad_u * at.log_det.exp().unsqueeze(-1)
        pull = weight * difference * inverse_scale * inverse_scale - pull_of_u

        return (
            -pull.sum(-1),  # u stays where it is if z and all locations move together
            grad_u * at.by_weight + weight - grad_log_det.unsqueeze(-1) * log_weight.exp(),
            pull,
            pull * difference - weight,
        )


class MixtureCDFInverse(torch.autograd.Function):
    """The inverse by `find_root`. Other forms solve differently, with these gradients."""

    @staticmethod
    def forward(ctx, u, logits, loc, log_scale):
        """Inverts; keeps z for the backward pass."""
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
    return MixtureCDFInverse.apply(u, logits, loc, log_scale)


def mixture_cdf_log_prob(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log p(z) = LSE_k(log pi_k + log phi(t_k) - s_k)."""
    t = (z.unsqueeze(-1) - loc) * torch.exp(-log_scale)
    return torch.logsumexp(torch.log_softmax(logits, -1) + normal_log_prob(t) - log_scale, -1)


# ------------------------------------ mixture CDF, autoregressive over the dimensions of a position


class AutoregressiveNetwork(NamedTuple):
    """Weights of D small networks, one for each dimension of a position.

    Network i maps a hidden state and the dimensions j < i to the K components of dimension i. Each
    dimension has E features and H hidden units. The log scales are kept within +-max_log_scale by a
    tanh.

    References:
        Lippe & Gavves, *Categorical Normalizing Flows via Continuous Transformations*, ICLR 2021,
        arXiv:2006.09790. These are their masked weights without the masked blocks.
    """

    # Of (x, elu(x), elu(-x)); nothing reads the last dimension.
    features_weight: Tensor  # (D - 1, E, 3)
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
        """The hidden units (..., H) of dimension i, before their activation `F.gelu`.

        Args:
            i: The dimension.
            from_context: The terms that the context adds to them, (..., H).
            features: The features (..., E) of the dimensions j < i, or more.
        """
        if i == 0:
            return from_context

        num_features = self.features_bias.shape[1]
        start = num_features * (i * (i - 1) // 2)
        weight = self.from_features[:, start : start + num_features * i]
        return from_context + F.linear(torch.cat(features[:i], -1), weight)

    def output(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits, locations and log scales, (..., K) each, of the last layer's (..., 3 K)."""
        logits, loc, log_scale = raw.chunk(3, -1)
        return logits, loc, self.max_log_scale * torch.tanh(log_scale / self.max_log_scale)


def autoregressive_mixture_parameters(
    z: Tensor, from_context: Tensor, network: AutoregressiveNetwork
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, loc and log_scale, each (..., D, K), for z (..., D) and from_context (..., D, H)."""
    features = [network.features(i, x) for i, x in enumerate(z.unbind(-1)[:-1])]
    hidden = [network.hidden(i, x, features) for i, x in enumerate(from_context.unbind(-2))]
    active = F.gelu(torch.stack(hidden, -2))
    raw = torch.einsum("...ih,ikh->...ik", active, network.output_weight) + network.output_bias

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
        raw = F.linear(hidden, network.output_weight[i], network.output_bias[i])
        z.append(invert(u_i, *network.output(raw)))

        if i < u.shape[-1] - 1:
            features.append(network.features(i, z[i]))

    return torch.stack(z, -1)


# ------------------------------------------------------------------------------- mixture Rosenblatt
#
# Dimension by dimension the mixture CDF, with weights alpha^(1) = pi and alpha^(i+1)_k proportional
# to alpha^(i)_k N(z_i; mu_ki, sigma_k^2).


# Numbers d K of the positions handled at once: 512 KiB a tensor in float32. A CPU's cache holds the
# few of those that an operation works on.
CHUNK_ELEMENTS = 2**17
# Up to this d K the derivatives are kept for the backward pass instead of computed again. That is 8
# KiB a position in float32, as much as a decoder layer of width 128 keeps.
KEPT_ELEMENTS = 2**10


def chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows, at least of one; the last may be shorter.

    In a graph that is exported it is one slice of all rows: a loop would fix their number.

    Example:
        >>> list(chunks(5, 2))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    if torch.compiler.is_exporting():
        return iter([slice(None)])

    size = max(1, size)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def fill_missing(
    out: Tensor | tuple[Tensor, ...], is_found: Tensor, solve: Callable, *by_row: Tensor
) -> None:
    """Fills in the rows of results (n, ...) that were not found, in place.

    Args:
        out: The result, or several.
        is_found: Which rows to leave as they are, (n,).
        solve: Makes the same results from `by_row`.
        by_row: Its arguments (n, ...).
    """
    if bool(is_found.all()):
        return

    missing = ~is_found
    found = solve(*(x[missing] for x in by_row))
    if isinstance(out, Tensor):
        out, found = (out,), (found,)

    for x, value in zip(out, found, strict=True):
        x[missing] = value


def _log_normal(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log N(z; m_k, s_k) (..., K) of z (...), in float64 for float32 as well.

    30 scales from every component it is -450. Rounded to float32 that would cost the ratios of the
    weights 1e-4.
    """
    log_scale = log_scale.double()
    t = (z.double().unsqueeze(-1) - loc.double()) * torch.exp(-log_scale)
    return normal_log_prob(t) - log_scale


def _normalized(log_joint: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalised log-weights (..., K) in `dtype` from float64 ones that are not normalised."""
    return torch.log_softmax((log_joint - log_joint.amax(-1, keepdim=True)).to(dtype), -1)


def _log_weights(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log alpha^(1), ..., log alpha^(d+1), together (n, d + 1, K); the means as loc (d, K)."""
    log_joint = torch.cat([logits.double().unsqueeze(1), _log_normal(z, loc, log_scale)], 1)
    return _normalized(log_joint.cumsum(1), z.dtype)


class _RosenblattDerivatives(NamedTuple):
    """`_Derivatives` of all dimensions, and the weights before the first and after the last."""

    u: Tensor  # (n, d)
    log_det: Tensor  # (n, d)
    rho: Tensor  # (n, d, K)
    by_weight: Tensor  # (n, d, K)
    prior: Tensor  # (n, K)  alpha^(1) = pi
    posterior: Tensor  # (n, K)  alpha^(d+1)


def _differentiate_rosenblatt(at: _Transformed, log_weights: Tensor) -> _RosenblattDerivatives:
    dimensions = _differentiate(at, log_weights[:, :-1])
    prior = log_weights[:, 0].exp()
    posterior = log_weights[:, -1].exp()

    return _RosenblattDerivatives(*dimensions, prior, posterior)


class _RosenblattGradients(NamedTuple):
    z: Tensor  # (n, d)
    logits: Tensor | None  # (n, K)
    mean: Tensor  # (K, d)
    log_scale: Tensor  # (K,)

    def add(self, i: int, pull: Tensor, weight: Tensor, difference: Tensor) -> None:
        """Adds dimension i of some rows to the gradients of the components.

        Args:
            i: The dimension.
            pull: The gradients (n, K) of its locations.
            weight: The gradients (n, K) of log N(z_i; mu_ki, sigma_k^2).
            difference: z_i - mu_ki, (n, K).
        """
        self.mean[:, i] += pull.sum(0)
        self.log_scale.add_((pull * difference - weight).sum(0))


def rosenblatt_backward(
    z: Tensor,
    logits: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    grad_u: Tensor,
    grad_log_det: Tensor,
    kept: Sequence[_RosenblattDerivatives] = (),
) -> _RosenblattGradients:
    """Gradients of the transform, from its last dimension to the first.

    The weights of dimension i are log pi_k + sum_{j<i} log N(z_j; mu_kj). Hence the gradients of
    the later dimensions' weights, summed up in `demand`, fall on log N(z_i; mu_ki); dimension i
    then adds its own. The sum starts with that of log p(z), a part of the log-determinant: rho_k =
    alpha^(d+1)_k.

    Args:
        z, logits, mean, log_scale: The arguments of the transform, of n positions.
        grad_u, grad_log_det: Gradients of its results, (n, d) and (n,).
        kept: The derivatives of each chunk; computed again if empty.
    """
    gradients = _RosenblattGradients(*(torch.zeros_like(x) for x in (z, logits, mean, log_scale)))
    loc = mean.T.contiguous()
    inverse_scale = torch.exp(-log_scale)

    for index, rows in enumerate(chunks(z.shape[0], CHUNK_ELEMENTS // mean.numel())):
        if kept:
            at = kept[index]
        else:
            log_weights = _log_weights(z[rows], logits[rows], loc, log_scale)
            transformed = _transform(z[rows], log_weights[:, :-1], loc, log_scale)
            at = _differentiate_rosenblatt(transformed, log_weights)

        grad_log_prob = grad_log_det[rows].unsqueeze(-1)
        demand = grad_log_prob * at.posterior

        for i in reversed(range(mean.shape[1])):
            grad_ui = grad_u[rows, i] + grad_log_det[rows] * at.u[:, i]
            slope = grad_ui * at.log_det[:, i].exp()
            difference = z[rows, i].unsqueeze(-1) - loc[i]
            pull = demand * difference * inverse_scale * inverse_scale
            pull = pull - at.rho[:, i] * slope.unsqueeze(-1)

            gradients.z[rows, i] = -pull.sum(-1)
            gradients.add(i, pull, demand, difference)
            demand = demand + grad_ui.unsqueeze(-1) * at.by_weight[:, i]

        gradients.logits[rows] = demand - grad_log_prob * at.prior

    return gradients


def rosenblatt_inverse_backward(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, grad_z: Tensor
) -> _RosenblattGradients:
    """Gradients of the inverse z(u, theta), given that of its result; `z` in the result is u's.

    dz = J^-1 (du - du/dtheta dtheta) with J = du/dz, which is lower triangular. So grad_u = J^-T
    grad_z, one row of back substitution a dimension, and the parameters' gradients are those of
    `rosenblatt_backward` at -grad_u.
    """
    gradients = _RosenblattGradients(*(torch.zeros_like(x) for x in (z, logits, mean, log_scale)))
    loc = mean.T.contiguous()
    inverse_scale = torch.exp(-log_scale)

    for rows in chunks(z.shape[0], CHUNK_ELEMENTS // mean.numel()):
        log_weights = _log_weights(z[rows], logits[rows], loc, log_scale)
        transformed = _transform(z[rows], log_weights[:, :-1], loc, log_scale)
        at = _differentiate(transformed, log_weights[:, :-1])
        demand = torch.zeros_like(log_weights[:, 0])

        for i in reversed(range(mean.shape[1])):
            difference = z[rows, i].unsqueeze(-1) - loc[i]
            pull = demand * difference * inverse_scale * inverse_scale
            slope = pull.sum(-1) - grad_z[rows, i]
            grad_ui = _divide_by_slope(slope, at.log_det[:, i])  # of -u_i
            pull = pull - at.rho[:, i] * slope.unsqueeze(-1)

            gradients.z[rows, i] = -grad_ui
            gradients.add(i, pull, demand, difference)
            demand = demand + grad_ui.unsqueeze(-1) * at.by_weight[:, i]

        gradients.logits[rows] = demand

    return gradients


class _MixtureRosenblatt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        u = torch.empty_like(z)
        log_det = z.new_empty(z.shape[0])
        loc = mean.T.contiguous()
        keeps = any(ctx.needs_input_grad) and mean.numel() <= KEPT_ELEMENTS
        kept = []

        for rows in chunks(z.shape[0], CHUNK_ELEMENTS // mean.numel()):
            log_weights = _log_weights(z[rows], logits[rows], loc, log_scale)
            at = _transform(z[rows], log_weights[:, :-1], loc, log_scale)
            u[rows] = at.u
            log_det[rows] = at.log_det.sum(-1)
            if keeps:
                kept += _differentiate_rosenblatt(at, log_weights)

        ctx.save_for_backward(z, logits, mean, log_scale, *kept)
        return u, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        inputs = ctx.saved_tensors[:4]
        kept = ctx.saved_tensors[4:]  # the fields of one chunk after another
        size = len(_RosenblattDerivatives._fields)
        kept = [_RosenblattDerivatives(*kept[i : i + size]) for i in range(0, len(kept), size)]

        return tuple(rosenblatt_backward(*inputs, grad_u, grad_log_det, kept))


class MixtureRosenblattInverse(torch.autograd.Function):
    """The inverse by `find_root`, one dimension after another."""

    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        """Inverts; keeps z for the backward pass."""
        z = torch.empty_like(u)
        for rows in chunks(u.shape[0], CHUNK_ELEMENTS // len(mean)):
            log_joint = logits[rows].double()
            for i in range(mean.shape[1]):
                log_weight = _normalized(log_joint, u.dtype)
                z[rows, i] = _invert(u[rows, i], log_weight, mean[:, i], log_scale)
                log_joint = log_joint + _log_normal(z[rows, i], mean[:, i], log_scale)

        ctx.save_for_backward(z, logits, mean, log_scale)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z):
        return tuple(rosenblatt_inverse_backward(*ctx.saved_tensors, grad_z))


def _log_joint(z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """logits_k + log N(z; mu_k, sigma_k^2 I): z (n, d) and logits (n, K) to (n, K)."""
    inverse_scale = torch.exp(-log_scale)
    joint = logits - log_scale * mean.shape[1] - LOG_SQRT_2PI * mean.shape[1]
    for i in range(mean.shape[1]):
        joint = joint - 0.5 * ((z[:, i].unsqueeze(-1) - mean[:, i]) * inverse_scale).square()

    return joint


class _MixtureRosenblattLogProb(torch.autograd.Function):
    """log p(z) = LSE_k(logits_k + sum_i log N(z_i; mu_ki, sigma_k^2)) - LSE_k(logits_k)."""

    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        ctx.save_for_backward(z, logits, mean, log_scale)
        log_prob = z.new_empty(z.shape[0])

        for rows in chunks(z.shape[0], CHUNK_ELEMENTS // len(mean)):
            joint = _log_joint(z[rows], logits[rows], mean, log_scale)
            log_prob[rows] = torch.logsumexp(joint, -1) - torch.logsumexp(logits[rows], -1)

        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, logits, mean, log_scale = ctx.saved_tensors
        gradients = _RosenblattGradients(
            z=torch.zeros_like(z),
            # The decoder's logits are a constant: nothing of all positions times K may exist there.
            logits=torch.empty_like(logits) if ctx.needs_input_grad[1] else None,
            mean=torch.zeros_like(mean),
            log_scale=torch.zeros_like(log_scale),
        )
        inverse_scale = torch.exp(-log_scale)

        for rows in chunks(z.shape[0], CHUNK_ELEMENTS // len(mean)):
            joint = _log_joint(z[rows], logits[rows], mean, log_scale)
            grad_log_prob = grad[rows].unsqueeze(-1)
            weight = grad_log_prob * torch.softmax(joint, -1)

            if gradients.logits is not None:
                prior = torch.softmax(logits[rows], -1)
                gradients.logits[rows] = weight - grad_log_prob * prior

            for i in range(mean.shape[1]):
                difference = z[rows, i].unsqueeze(-1) - mean[:, i]
                pull = weight * difference * inverse_scale * inverse_scale
                gradients.z[rows, i] = -pull.sum(-1)
                gradients.add(i, pull, weight, difference)

        return tuple(gradients)


def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    return _MixtureRosenblatt.apply(z, logits, mean, log_scale)


def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return MixtureRosenblattInverse.apply(u, logits, mean, log_scale)


def mixture_rosenblatt_log_prob(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattLogProb.apply(z, logits, mean, log_scale)
