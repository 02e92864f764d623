"""The mixtures' inverses in float32 on a CPU: Newton steps in all dimensions of all rows at once.

On a CPU a call of PyTorch costs more than its arithmetic on the few numbers of a position. The
reference solves the d dimensions of a Rosenblatt transform one after another, each until the
slowest row is done. Here one round takes a step in all of them. As u_i depends only on z_1, ...,
z_i, a dimension comes to rest soon after those before it.

This is not `find_root` for more dimensions, and shares no step with it:

- A bracket holds only while the dimensions before stay where they are. It is reset when they move,
  and kept only in late rounds: it makes a round a sixth longer, and most rows never need one.
- Nothing compares values with a tolerance. The arithmetic is float64's, and a solution is a float32
  z that a round maps to itself: the number next to the root, given those of the dimensions before.

One position takes a quarter of `find_root`'s time with d = 8, and two thirds with d = 1. Some rows
are left to the reference: those that do not come to rest, and those with components so thin that
the spacing of float32 does not resolve them.

Everything is mirrored so that u <= 0. The lower tail is then the smaller one at the root, and for
|u| <= 30 it is far from the end of float64's range, so that nothing needs its logarithm.

Shapes: n rows, d dimensions (1 for a mixture of scalars), K components.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .coupling_torch import MixtureCDFInverse, MixtureRosenblattInverse, chunks, fill_missing
from .coupling_torch import mixture_cdf_inverse as mixture_cdf_inverse_reference
from .coupling_torch import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_reference
from .normal import MAX_NOISE, SQRT_HALF

MAX_ROUNDS = 40
FREE_ROUNDS = 6  # before there are brackets
# The least scale of the thinnest component, in units of the spacing of float32 at z.
MIN_SCALE = 2**10
# A scalar's last step, in units of that scale. Its own error is some 40 times its square: 1e-8.
SMALL_STEP = 2**-16
CHUNK_ELEMENTS = 2**20  # n d K at once: 8 MiB a tensor, of which there are some ten


class _Problem(NamedTuple):
    """n mirrored rows in float64; a first dimension of 1 is shared by all of them."""

    u: Tensor  # (n, d)  <= 0
    log_weight: Tensor  # (n, 1, K)
    loc: Tensor  # (n, d, K)
    log_scale: Tensor  # (n or 1, 1, K)
    lowest: Tensor  # (n, d)  the least of the components' own roots
    highest: Tensor  # (n, d)

    def select(self, rows: Tensor) -> "_Problem":
        return _Problem(*(x if len(x) == 1 else x[rows] for x in self))


def solve(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """z (n, d) of u (n, d), both float32, and in which rows (n,) it was found.

    Args:
        u: Noise.
        logits: Log-weights of the components (n, K).
        loc, log_scale: The components, (n or 1, d, K) and (n or 1, K).
    """
    log_weight = torch.log_softmax(logits.double(), -1).unsqueeze(1)
    sign = torch.where(u > 0, -1.0, 1.0)
    u = -u.abs().double()
    loc = sign.unsqueeze(-1) * loc.double()
    log_scale = log_scale.double().unsqueeze(1)

    scale = log_scale.exp()
    candidates = loc + scale * u.unsqueeze(-1)  # each component alone would put z there
    lowest, highest = (bound.float().double() for bound in candidates.aminmax(dim=-1))

    # The start: the root of a Gaussian with the mixture's mean and variance.
    weight = log_weight.exp()
    center = (weight * loc).sum(-1, keepdim=True)
    spread = (weight * ((loc - center).square() + scale.square())).sum(-1).sqrt()
    z = (center.squeeze(-1) + spread * u).clamp(lowest, highest).float().double()

    z = _iterate(z, _Problem(u, log_weight, loc, log_scale, lowest, highest))
    max_z = scale.amin(-1) / (MIN_SCALE * torch.finfo(torch.float32).eps)
    is_found = ((z.abs() <= max_z) & (u >= -MAX_NOISE)).all(-1)  # False for NaN

    return (sign * z).float(), is_found


def _newton_map(problem: _Problem) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Maps z (n, d) to u(z) - u and to Newton's next z, rounded to float32."""
    u, log_weight, loc, log_scale, *_ = problem
    latent_size = u.shape[1]
    scale = log_scale.exp()
    log_density = -log_scale  # of each component at its mean, over phi(0)
    minus_inverse = -SQRT_HALF / scale

    if latent_size == 1:
        fixed_weight = log_weight.exp()
    else:
        # log alpha^(i)_k = log pi_k - sum_{j<i} (log sigma_k + t_jk^2 / 2), not normalised.
        past = torch.full((latent_size, latent_size), -1.0, dtype=u.dtype).tril(-1)
        prior = log_weight + past.sum(-1, keepdim=True) * log_scale
        past = past.expand(len(u), -1, -1)

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        t = (z.unsqueeze(-1) - loc) * minus_inverse  # over sqrt(2)
        square = t.square()
        if latent_size == 1:
            weight = fixed_weight
        else:
            weight = torch.softmax(torch.baddbmm(prior, past, square), -1)

        cdf = (weight * torch.erfc(t)).sum(-1).mul_(0.5).clamp_(max=1.0)
        density = (weight * torch.exp(log_density - square)).sum(-1)
        quantile = torch.special.ndtri(cdf)
        residual = quantile - u
        newton = z - residual * quantile.square().mul_(-0.5).exp_() / density

        return residual, newton.float().double()

    return step


def _iterate(z: Tensor, problem: _Problem, first_round: int = 0) -> Tensor:
    """The roots (n, d), sought from z on; NaN in rows that still move after the last round.

    The first FREE_ROUNDS steps are clamped to the components' own roots. After that each dimension
    keeps a bracket and bisects when a step leaves it; the bracket is reset when an earlier
    dimension moves. Rows at rest take no part in further rounds once they are half of all.
    """
    is_scalar = z.shape[1] == 1
    if is_scalar:
        small_step = SMALL_STEP * problem.log_scale.exp().amin(-1)

    step = _newton_map(problem)
    lowest, highest = problem.lowest, problem.highest
    lower, upper = lowest, highest
    is_moving = torch.ones(len(z), dtype=torch.bool)

    for n in range(first_round, MAX_ROUNDS):
        residual, newton = step(z)

        if n < FREE_ROUNDS:
            # fmin and fmax: a slope of 0 makes newton NaN.
            new = torch.fmin(torch.fmax(newton, lowest), highest)
        else:
            is_low = residual < 0
            lower, upper = torch.where(is_low, z, lower), torch.where(is_low, upper, z)
            middle = torch.lerp(lower, upper, 0.5).float().double()
            new = torch.where(newton == newton.clamp(lower, upper), newton, middle)

        if is_scalar:
            is_small = (newton - z).abs() <= small_step
            new, has_moved = torch.where(is_small, newton, new), ~is_small
        else:
            has_moved = newton != z

        z = new
        is_moving = has_moved.any(-1)
        num_moving = int(is_moving.sum()) if len(z) > 1 else int(is_moving)
        if num_moving == 0:
            return z
        if 2 * num_moving <= len(z):
            rows = is_moving.nonzero().squeeze(-1)
            return z.index_copy(0, rows, _iterate(z[rows], problem.select(rows), n + 1))

        if n >= FREE_ROUNDS and not is_scalar:
            is_stale = has_moved.cumsum(-1) > has_moved  # an earlier dimension has moved
            lower = torch.where(is_stale, lowest, lower)
            upper = torch.where(is_stale, highest, upper)

    return torch.where(is_moving.unsqueeze(-1), math.nan, z)


def _solve_in_parts(
    u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`solve` in parts that bound the memory."""
    if len(u) == 0:
        return torch.empty_like(u), torch.ones(0, dtype=torch.bool)

    size = CHUNK_ELEMENTS // loc[0].numel()
    if len(u) <= size:
        return solve(u, logits, loc, log_scale)

    inputs = (u, logits, loc, log_scale)
    found = [
        solve(*(x if len(x) == 1 else x[rows] for x in inputs)) for rows in chunks(len(u), size)
    ]
    z, is_found = zip(*found, strict=True)
    return torch.cat(z), torch.cat(is_found)


class _MixtureCDFNewton(MixtureCDFInverse):
    @staticmethod
    def forward(ctx, u, logits, loc, log_scale):
        flat = [u.reshape(-1), *(x.reshape(-1, x.shape[-1]) for x in (logits, loc, log_scale))]
        flat_u, flat_logits, flat_loc, flat_log_scale = flat
        vectors = flat_u.unsqueeze(-1), flat_logits, flat_loc.unsqueeze(1), flat_log_scale
        z, is_found = _solve_in_parts(*vectors)
        z = z.squeeze(-1)
        fill_missing(z, is_found, mixture_cdf_inverse_reference, *flat)

        z = z.reshape(u.shape)
        ctx.save_for_backward(z, logits, loc, log_scale)
        return z


class _MixtureRosenblattNewton(MixtureRosenblattInverse):
    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        z, is_found = _solve_in_parts(u, logits, mean.T.unsqueeze(0), log_scale.unsqueeze(0))
        reference = partial(mixture_rosenblatt_inverse_reference, mean=mean, log_scale=log_scale)
        fill_missing(z, is_found, reference, u, logits)
        ctx.save_for_backward(z, logits, mean, log_scale)
        return z


def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFNewton.apply(u, logits, loc, log_scale)


def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattNewton.apply(u, logits, mean, log_scale)
