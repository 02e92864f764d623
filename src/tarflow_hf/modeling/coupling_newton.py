"""The inverses of the mixture couplings on a CPU, in float32: Newton's method for all dimensions of
all rows at once.

On a CPU a call of PyTorch costs more than its arithmetic on the few numbers of a position. The
reference solves the d dimensions of a Rosenblatt transform one after another, each until the
slowest row is done; here one round takes a step in all of them. As u_i depends on z_1, ..., z_i
alone, a dimension is at its root soon after those before it are. The arithmetic is float64's; a
solution is a float32 z that a round leaves as it is: the number next to the root, given those of
the dimensions before. Rows that do not get there are left to the reference, and so are those with
components so thin that the spacing of float32 does not resolve them.

Everything is mirrored so that u <= 0: the lower tail is then the smaller one at the root, and for
|u| <= 30 it is far from the end of float64's range, so that nothing needs its logarithm.

Shapes: n rows, d dimensions (1 of a mixture of scalars), K components.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .coupling_torch import MixtureCDFInverse, MixtureRosenblattInverse, chunks
from .coupling_torch import mixture_cdf_inverse as mixture_cdf_inverse_reference
from .coupling_torch import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_reference

MAX_ROUNDS = 40
FREE_ROUNDS = 6  # a bracket is half as much work again, and most rows never need one
MAX_NOISE = 30.0
MIN_SCALE = 2**10  # of the thinnest component, in units of the spacing of float32 at z
SMALL_STEP = (
    2**-16
)  # of a scalar, in units of that scale: the step's own error, some 40 times its square, is 1e-8
MAX_CODEBOOK = (
    2**11
)  # numbers d K of a Rosenblatt transform: with more, the reference's fewer products count for more
CHUNK_ELEMENTS = 2**20  # n d K at once: 8 MiB a tensor, of which there are some ten


def solve(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """z (n, d) of u (n, d), both float32, and in which rows (n,) it was found.

    Args:
        u: Noise.
        logits: Log-weights of the components (n, K).
        loc, log_scale: The components, (n or 1, d, K) and (n or 1, K).
    """
    log_weight = torch.log_softmax(logits.double(), -1).unsqueeze(1)
    sign = torch.where(u > 0, -1.0, 1.0)
    u, loc, log_scale = (
        -u.abs().double(),
        sign.unsqueeze(-1) * loc.double(),
        log_scale.double().unsqueeze(1),
    )
    scale = log_scale.exp()
    candidates = loc + scale * u.unsqueeze(-1)  # each component alone would put z there
    lower, upper = (bound.float().double() for bound in candidates.aminmax(dim=-1))
    weight = log_weight.exp()
    center = (weight * loc).sum(-1, keepdim=True)
    spread = (weight * ((loc - center).square() + scale.square())).sum(-1).sqrt()
    z = (center.squeeze(-1) + spread * u).clamp(lower, upper).float().double()
    z = _iterate(z, u, log_weight, loc, log_scale, lower, upper)
    max_z = scale.amin(-1) / (MIN_SCALE * torch.finfo(torch.float32).eps)
    is_found = ((z.abs() <= max_z) & (u >= -MAX_NOISE)).all(-1)  # False for NaN

    return (sign * z).float(), is_found


def _iterate(
    z: Tensor,
    u: Tensor,
    log_weight: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    *,
    first_round: int = 0,
) -> Tensor:
    """Newton's steps from z. What does not rest after some free ones, between the components' own
    roots, goes on within the bracket of what is known of its dimension, to the middle where a step
    would leave that: it holds as long as the dimensions before stay where they are, and is the
    first one again when they move.

    Rows that move no more are left out when they are half of them; those that move to the end
    become NaN.
    """
    latent_size = z.shape[1]
    scale, log_density = log_scale.exp(), -log_scale  # of each component at its mean, over phi(0)
    minus_inverse = -math.sqrt(0.5) / scale
    weight = log_weight.exp()

    if (
        latent_size > 1
    ):  # log alpha^(i)_k = log pi_k - sum_{j<i} (log sigma_k + t_jk^2 / 2), not normalised
        past = torch.full((latent_size, latent_size), -1.0, dtype=z.dtype).tril(-1)
        prior = log_weight + past.sum(-1, keepdim=True) * log_scale
        past = past.expand(len(z), -1, -1)
    else:
        small_step = SMALL_STEP * scale.amin(-1)

    lower, upper = lowest, highest
    is_moving = torch.ones(len(z), dtype=torch.bool)

    for n in range(first_round, MAX_ROUNDS):
        t = (z.unsqueeze(-1) - loc) * minus_inverse  # over sqrt(2)
        square = t.square()
        if latent_size > 1:
            weight = torch.softmax(torch.baddbmm(prior, past, square), -1)

        cdf = (weight * torch.erfc(t)).sum(-1).mul_(0.5).clamp_(max=1.0)
        density = (weight * torch.exp(log_density - square)).sum(-1)
        quantile = torch.special.ndtri(cdf)
        residual = quantile - u
        newton = (z - residual * quantile.square().mul_(-0.5).exp_() / density).float().double()

        if n < FREE_ROUNDS:
            new = torch.fmin(
                torch.fmax(newton, lowest), highest
            )  # also where a slope of 0 makes it NaN
        else:
            is_low = residual < 0
            lower, upper = torch.where(is_low, z, lower), torch.where(is_low, upper, z)
            middle = torch.lerp(lower, upper, 0.5).float().double()
            new = torch.where(newton == newton.clamp(lower, upper), newton, middle)

        if latent_size > 1:
            has_moved = newton != z
        else:
            is_small = (newton - z).abs() <= small_step
            new, has_moved = torch.where(is_small, newton, new), ~is_small

        z = new
        is_moving = has_moved.any(-1)
        num_moving = int(is_moving.sum()) if len(z) > 1 else int(is_moving)
        if num_moving == 0:
            return z
        if 2 * num_moving <= len(z):
            rows = is_moving.nonzero().squeeze(-1)
            rest = (
                x if len(x) == 1 else x[rows]
                for x in (z, u, log_weight, loc, log_scale, lowest, highest)
            )

            return z.index_copy(0, rows, _iterate(*rest, first_round=n + 1))

        if n >= FREE_ROUNDS and latent_size > 1:
            is_stale = has_moved.cumsum(-1) > has_moved
            lower, upper = (
                torch.where(is_stale, lowest, lower),
                torch.where(is_stale, highest, upper),
            )

    return torch.where(is_moving.unsqueeze(-1), math.nan, z)


def _solve_in_parts(
    u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, otherwise: Callable[[Tensor], Tensor]
) -> Tensor:
    """`solve`, of so many rows at once that the memory is bounded, and `otherwise(rows)` where that
    finds nothing.
    """
    size = CHUNK_ELEMENTS // loc[0].numel()
    if len(u) <= size:
        z, is_found = solve(u, logits, loc, log_scale)
    else:
        inputs = (u, logits, loc, log_scale)
        found = [
            solve(*(x if len(x) == 1 else x[rows] for x in inputs)) for rows in chunks(len(u), size)
        ]
        z, is_found = (torch.cat(x) for x in zip(*found, strict=True))

    if not bool(is_found.all()):
        z[~is_found] = otherwise(~is_found)

    return z


class _MixtureCDFInverse(MixtureCDFInverse):
    @staticmethod
    def forward(ctx, u, logits, loc, log_scale):
        rows = [x.reshape(-1, x.shape[-1]) for x in (u.unsqueeze(-1), logits, loc, log_scale)]
        u_rows, *parameters = rows

        def otherwise(rows: Tensor) -> Tensor:
            return mixture_cdf_inverse_reference(
                u_rows[rows, 0], *(x[rows] for x in parameters)
            ).unsqueeze(-1)

        z = _solve_in_parts(
            u_rows, parameters[0], parameters[1].unsqueeze(1), parameters[2], otherwise
        ).reshape(u.shape)
        ctx.save_for_backward(z, logits, loc, log_scale)

        return z


class _MixtureRosenblattInverse(MixtureRosenblattInverse):
    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        def otherwise(rows: Tensor) -> Tensor:
            return mixture_rosenblatt_inverse_reference(u[rows], logits[rows], mean, log_scale)

        z = _solve_in_parts(u, logits, mean.T.unsqueeze(0), log_scale.unsqueeze(0), otherwise)
        ctx.save_for_backward(z, logits, mean, log_scale)
        return z


@torch.compiler.disable  # its loop ends where the numbers say
def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFInverse.apply(u, logits, loc, log_scale)


@torch.compiler.disable
def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    is_small = mean.numel() <= MAX_CODEBOOK
    inverse = _MixtureRosenblattInverse.apply if is_small else mixture_rosenblatt_inverse_reference
    return inverse(u, logits, mean, log_scale)
