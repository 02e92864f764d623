"""The Rosenblatt transform on a CPU, with weights as they are and not as logarithms.

The reference works in logs and holds whatever it is given. Here a dimension takes one `erfc`, one
`exp` and a few products a component,

    F(z_i) = sum_k w_k Phi(t_k) / sum_k w_k,   t_k = (z_i - mu_ki) / sigma_k,

with weights w_k that are 1 at the largest. If F is nearly 1, the other tail is summed instead.
The logarithm of the last weights' sum is that of p(z), and log_det = log p(z) - sum_i log phi(u_i).

Two things change the sums: weights below e^-80 are held there, and from the second dimension on
components below e^-MARGIN of the largest are dropped where that leaves few. The weight that these could
still have is followed through all dimensions. A row in which it exceeds `MAX_SHARE` of the smaller tail
of some dimension, or which has a number that is not finite, is computed by the reference. So the
tails and p(z) are exact to a share of `MAX_SHARE`: 6e-8 nats (float64: 4e-15), for any codebook.

The backward pass makes the weights of each dimension again. It goes from the last dimension to the
first, as `rosenblatt_backward` does.

Shapes: n rows, d dimensions, V components in all, K of them in a dimension.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .coupling_torch import chunks, fill_missing, rosenblatt_backward
from .coupling_torch import mixture_rosenblatt as mixture_rosenblatt_reference
from .normal import (
    FARTHEST,
    LOG_SQRT_2PI,
    MIN_LOG_WEIGHT,
    SQRT_HALF,
    ndtri_exp,
    normal_log_prob,
)

MARGIN = {torch.float32: 54.0, torch.float64: 72.0}
MAX_SHARE = {torch.float32: 2.0**-24, torch.float64: 2.0**-48}
# From this F on 1 - F is summed instead.
UPPER = 0.8
# Components are dropped where at most this part of them is left.
MAX_LEFT = 0.35
# The largest log-weight falls by at most this in a dimension, scales left aside: a square of t is
# rounded to its eps.
MAX_FALL = 16.0
CHUNK_ELEMENTS = 2**18  # numbers n V at once
# But at least so many rows: where most components are dropped, the number of calls takes time.
MIN_ROWS = 32
# Up to this V d the dimensions are kept for the backward pass instead of computed again. That is 12
# KiB a position in float32, as much as a decoder layer of width 128 keeps.
KEPT_ELEMENTS = 2**10


class _Mixture(NamedTuple):
    """The components, as all rows read them."""

    loc: Tensor  # (d, V)
    log_scale: Tensor  # (V,)
    factor: Tensor  # (V,)  -1 / (sqrt(2) sigma)


class _Weights(NamedTuple):
    """Weights of n rows, 1 at the largest, and held above e^-80."""

    value: Tensor  # (n, K)
    total: Tensor  # (n, 1)  their sum
    log_peak: Tensor  # (n, 1)  float64; the logarithm of the largest

    @property
    def log_total(self) -> Tensor:
        return self.total.double().log() + self.log_peak


class _Dimension(NamedTuple):
    """One dimension of n rows, as the backward pass reads it."""

    places: Tensor | None  # (n, K)  of its components in the dimension before; None: all of those
    index: Tensor | None  # (n, K)  its components; None: all
    weights: _Weights  # given the dimensions before
    a: Tensor  # (n, K)  -t / sqrt(2)
    erfc: Tensor  # (n, K)  2 Phi(t), or 2 - 2 Phi(t) where `sign` is -1


class _Sweep(NamedTuple):
    """All dimensions of n rows."""

    tail: Tensor  # (n, d)  F, or 1 - F where `sign` is -1
    sign: Tensor  # (n, d)
    log_prob: Tensor  # (n,)  log p(z) in nats, float64
    is_exact: Tensor  # (n,)
    dimensions: list[_Dimension]
    places: Tensor | None  # (n, K)  of the components of `posterior` in the last dimension
    index: Tensor | None  # (n, K)
    posterior: _Weights


def _weigh(log_weight: Tensor, log_peak: Tensor | float = 0.0) -> _Weights:
    """The weights, after their logarithms (n, K) are moved in place to 0 at the largest."""
    peak = log_weight.amax(-1, keepdim=True)
    value = log_weight.sub_(peak).clamp(min=MIN_LOG_WEIGHT).exp_()
    return _Weights(value, value.sum(-1, keepdim=True), log_peak + peak.double())


def _tails(weights: _Weights, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2 Phi(t) or 2 - 2 Phi(t), F or 1 - F, and the sign that tells which."""
    erfc = a.clamp(max=FARTHEST[a.dtype]).erfc_()
    tail = 0.5 * torch.linalg.vecdot(weights.value, erfc).unsqueeze(-1) / weights.total
    sign = torch.ones_like(tail)

    upper = (tail.squeeze(-1) > UPPER).nonzero().squeeze(-1)
    if len(upper):
        other = a[upper].neg_().clamp_(max=FARTHEST[a.dtype]).erfc_()
        erfc[upper] = other
        sums = torch.linalg.vecdot(weights.value[upper], other).unsqueeze(-1)
        tail[upper] = 0.5 * sums / weights.total[upper]
        sign[upper] = -1.0

    return erfc, tail, sign


def _left(weights: _Weights) -> Tensor | None:
    """The places (n, K') of components that are kept, the same number of all rows; None for all."""
    value = weights.value
    least = math.exp(-MARGIN[value.dtype])
    # As numbers: booleans are compared and summed three times as slowly.
    is_left = torch.gt(value, least, out=torch.empty_like(value))
    count = max(1, int(is_left.sum(-1).max())) if len(value) else 1
    if count > MAX_LEFT * value.shape[1]:
        return None

    return value.topk(count, sorted=False).indices


def _sweep(z: Tensor, logits: Tensor, mixture: _Mixture, keeps: bool = False) -> _Sweep:
    """The weights and tails of n rows, dimension by dimension.

    With `keeps` the `dimensions` are in the result; together they are 3 d times as large as the
    logits.
    """
    dtype = z.dtype
    num_components = logits.shape[1]
    held = num_components * math.exp(MIN_LOG_WEIGHT)
    least_log_scale = mixture.log_scale.min().double()
    loc, log_scale, factor = mixture
    places = index = None

    log_weight = logits.clone()
    weights = prior = _weigh(log_weight)
    # The logarithm of what the dropped components weigh at most.
    log_dropped = torch.full_like(prior.log_peak, -math.inf)
    is_exact = torch.ones_like(log_dropped, dtype=torch.bool)
    tails, signs, dimensions = [], [], []

    for z_i, loc_i in zip(z.split(1, -1), loc, strict=True):
        a = (z_i - (loc_i if index is None else loc_i[index])).mul_(factor)
        erfc, tail, sign = _tails(weights, a)
        tails.append(tail)
        signs.append(sign)
        if keeps:
            dimensions.append(_Dimension(places, index, weights, a, erfc))

        share = ((log_dropped - weights.log_peak).exp() + held) / weights.total
        is_exact &= share <= MAX_SHARE[dtype] * torch.minimum(tail, 1 - tail)

        log_weight.sub_(log_scale).addcmul_(a, a, value=-1.0)
        before, weights = weights, _weigh(log_weight, weights.log_peak)
        log_dropped = log_dropped - least_log_scale
        is_exact &= weights.log_peak - before.log_peak >= -MAX_FALL - least_log_scale

        places = _left(weights)
        if places is not None:
            most = weights.log_peak - MARGIN[dtype] + math.log(num_components)
            log_dropped = torch.logaddexp(log_dropped, most)
            index = places if index is None else index.gather(-1, places)
            log_scale, factor = mixture.log_scale[index], mixture.factor[index]
            log_weight = log_weight.gather(-1, places)
            value = weights.value.gather(-1, places)
            weights = _Weights(value, value.sum(-1, keepdim=True), weights.log_peak)

    share = ((log_dropped - weights.log_peak).exp() + held) / weights.total
    is_exact &= share <= MAX_SHARE[dtype]
    log_prob = weights.log_total - prior.log_total - len(loc) * LOG_SQRT_2PI

    return _Sweep(
        tail=torch.cat(tails, -1),
        sign=torch.cat(signs, -1),
        log_prob=log_prob.squeeze(-1),
        is_exact=is_exact.squeeze(-1),
        dimensions=dimensions,
        places=places,
        index=index,
        posterior=weights,
    )


class _Gradients(NamedTuple):
    """Sums over rows of the gradients."""

    mean: Tensor  # (d, V)
    log_scale: Tensor  # (V,)


def _add(total: Tensor, index: Tensor | None, value: Tensor) -> None:
    """Adds values (n, K) of components to their totals (V,)."""
    if index is None:
        total.add_(value.sum(0))
    else:
        total.index_add_(0, index.flatten(), value.flatten())


def _sweep_backward(
    at: _Sweep, mixture: _Mixture, u: Tensor, grad_u: Tensor, grad_log_det: Tensor, to: _Gradients
) -> tuple[Tensor, Tensor]:
    """The gradients of z (n, d) and logits (n, V); adds those of the mixture.

    `demand` is the gradient of the log-weights after a dimension, which falls on its log N(z_i;
    mu_ki, sigma_k^2).
    """
    dtype = u.dtype
    grad_z = torch.empty_like(u)
    grad_log_det = grad_log_det.unsqueeze(-1)
    grad_u = grad_u + grad_log_det * u
    density = normal_log_prob(u.double()).exp()  # phi(u)

    after, places, index = at.posterior, at.places, at.index
    demand = after.value * (grad_log_det / after.total)
    for i in reversed(range(u.shape[1])):
        here = at.dimensions[i]
        by_density = grad_u[:, i : i + 1] / density[:, i : i + 1]
        log_p = after.log_total - here.weights.log_total - LOG_SQRT_2PI
        slope = by_density * log_p.exp()  # grad_u du/dz

        a = here.a if places is None else here.a.gather(-1, places)
        factor = mixture.factor if index is None else mixture.factor[index]
        pull = (demand * a).mul_(2 * factor)  # demand (z - mu) / sigma^2
        pull.addcmul_(after.value, (-slope / after.total).to(dtype))
        grad_z[:, i] = -pull.sum(-1)
        _add(to.mean[i], index, pull)

        spread = pull.mul_(a).div_(factor)
        _add(to.log_scale, index, spread.sub_(demand))

        if places is not None:
            demand = torch.zeros_like(here.a).scatter_(-1, places, demand)

        by_tail = 0.5 * at.sign[:, i : i + 1] * by_density / here.weights.total
        difference = (here.erfc - 2 * at.tail[:, i : i + 1]).mul_(by_tail.to(dtype))
        demand.addcmul_(here.weights.value, difference)
        after, places, index = here.weights, here.places, here.index

    return grad_z, demand.addcmul_(after.value, -grad_log_det / after.total)


class _MixtureRosenblatt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        mixture = _prepare(mean, log_scale)
        tail, sign = torch.empty_like(z), torch.empty_like(z)
        log_prob = torch.empty(len(z), dtype=torch.float64)
        is_exact = torch.empty(len(z), dtype=torch.bool)
        keeps = any(ctx.needs_input_grad) and mean.numel() <= KEPT_ELEMENTS
        ctx.kept = []

        for rows in chunks(len(z), max(MIN_ROWS, CHUNK_ELEMENTS // len(mean))):
            at = _sweep(z[rows], logits[rows], mixture, keeps)
            ctx.kept += [at] if keeps else []
            tail[rows], sign[rows] = at.tail, at.sign
            log_prob[rows], is_exact[rows] = at.log_prob, at.is_exact

        u = sign * ndtri_exp(tail.log())
        log_det = (log_prob - normal_log_prob(u.double()).sum(-1)).to(u.dtype)
        reference = partial(mixture_rosenblatt_reference, mean=mean, log_scale=log_scale)
        fill_missing((u, log_det), is_exact, reference, z, logits)
        ctx.save_for_backward(z, logits, mean, log_scale, u, is_exact)
        return u, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        z, logits, mean, log_scale, u, is_exact = ctx.saved_tensors
        mixture = _prepare(mean, log_scale)
        grad_z, grad_logits = torch.empty_like(z), torch.empty_like(logits)
        sums = _Gradients(torch.zeros_like(mean.T).contiguous(), torch.zeros_like(log_scale))

        for index, rows in enumerate(chunks(len(z), max(MIN_ROWS, CHUNK_ELEMENTS // len(mean)))):
            is_whole = bool(is_exact[rows].all())
            inside = slice(None) if is_whole else is_exact[rows]
            own = [x[rows][inside] for x in (z, logits, u, grad_u, grad_log_det)]
            if ctx.kept and is_whole:
                at = ctx.kept[index]
            else:
                at = _sweep(own[0], own[1], mixture, keeps=True)

            found = _sweep_backward(at, mixture, *own[2:], sums)
            grad_z[rows][inside], grad_logits[rows][inside] = found

        gradients = [grad_z, grad_logits, sums.mean.T, sums.log_scale]
        if not bool(is_exact.all()):
            rest = ~is_exact
            cotangents = grad_u[rest], grad_log_det[rest]
            others = rosenblatt_backward(z[rest], logits[rest], mean, log_scale, *cotangents)
            grad_z[rest], grad_logits[rest] = others.z, others.logits
            gradients[2:] = sums.mean.T + others.mean, sums.log_scale + others.log_scale

        return tuple(gradients)


def _prepare(mean: Tensor, log_scale: Tensor) -> _Mixture:
    return _Mixture(mean.T.contiguous(), log_scale, -SQRT_HALF * torch.exp(-log_scale))


def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    return _MixtureRosenblatt.apply(z, logits, mean, log_scale)
