"""The mixtures' inverses on a CPU in compiled loops: an extra, `pip install "tarflow_hf[numba]"`.

At one position a call of PyTorch costs more than its arithmetic on few numbers, and an inverse is
some hundred calls. numba compiles the loops at their first use, in some seconds, and keeps the
result on disk. They run in one thread: PyTorch's own keep the other cores busy for a while after
each of its calls.

The roots are those of `coupling_active.py`, with the same search, steps, drops and bounds; in
float64 throughout, rounded to the dtype of u after each dimension. Rows that are not found are left
to the reference.

Everything is mirrored so that u <= 0: the lower tail is then the smaller one at the root.

Shapes: n rows, d dimensions, V components in all, K active ones; B intervals. Active components lie
in an array (4, K): their weights, locations in this dimension, scales and indices.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .codebook_kept import kept
from .coupling_active import (
    GUESS_REACH,
    MAX_DROPPED,
    MAX_ROUNDS,
    MIN_DENSITY,
    NUM_BINS,
    REACH,
    SMALL_STEP,
)
from .coupling_torch import MixtureCDFInverse, MixtureRosenblattInverse, fill_missing
from .coupling_torch import mixture_cdf_inverse as mixture_cdf_inverse_reference
from .coupling_torch import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_reference
from .normal import MAX_NOISE, SQRT_2PI, SQRT_HALF

try:
    import numba
except ImportError:
    numba = None

IS_INSTALLED = numba is not None

# Components up to which all of them are looked at in every round.
FEW = 2**6
# A step of this many scales ends the rounds with coarse values. Its own error is some 40 times its
# square, so that one round with exact ones follows.
COARSE_STEP = 2.0**-12
# Weight, location, scale and index of a component.
W, LOC, SCALE, INDEX = range(4)


def _compiled(function: Callable) -> Callable:
    """A function that numba compiles when it is first called, if numba is there."""
    if numba is None:
        return function

    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for what is compiled
        return numba.njit(**options)(function)


# --------------------------------------------------------------------------------------------------
# One dimension: F(z) = below + sum_k weight_k Phi((z - loc_k) / scale_k)
# --------------------------------------------------------------------------------------------------


@_compiled
def _cdf(u):
    return 0.5 * math.erfc(-u * SQRT_HALF)


@_compiled
def _evaluate(z, below, active, far, is_coarse):
    """F(z) and sqrt(2 pi) p(z). A component further than `far` scales is a step.

    Coarse values have an error of 1e-7: erfc(x) = exp(-x^2) poly(1 / (1 + p x)), Abramowitz &
    Stegun, *Handbook of Mathematical Functions*, 7.1.26.
    """
    cdf, slope = 0.0, 0.0
    for k in range(active.shape[1]):
        t = (active[LOC, k] - z) / active[SCALE, k]
        if t <= -far:
            cdf += 2 * active[W, k]
        elif t < far:
            density = math.exp(-0.5 * t * t)
            slope += active[W, k] / active[SCALE, k] * density
            if is_coarse:
                x = 1 / (1 + 0.3275911 * SQRT_HALF * abs(t))
                poly = x * (1.421413741 + x * (-1.453152027 + x * 1.061405429))
                tail = x * (0.254829592 + x * (-0.284496736 + poly)) * density
                cdf += active[W, k] * (tail if t > 0 else 2 - tail)
            else:
                cdf += active[W, k] * math.erfc(t * SQRT_HALF)

    return below + 0.5 * cdf, slope


@_compiled
def _find_root(u, low, high, start, small, below, active, far):
    """The root of F(z) = Phi(u), NaN if the bracket has none: first from coarse values, then exactly."""
    min_scale = active[SCALE].min()
    coarse_step, coarse_far = COARSE_STEP * min_scale, min(far, 5.0 - u)
    z = _search(u, low, high, start, coarse_step, below, active, coarse_far, True)
    start = start if math.isnan(z) else z
    return _search(u, low, high, start, small * min_scale, below, active, far, False)


@_compiled
def _search(u, low, high, start, small, below, active, far, is_coarse):
    """The root of F(z) = Phi(u), NaN if the bracket has none: see `coupling_active._search`."""
    tail = _cdf(u)
    log_tail = math.log(tail)
    y_root = math.sqrt(-2 * log_tail)
    factor = y_root * tail * SQRT_2PI * math.exp(0.5 * u * u)
    z = min(max(start, low), high)
    is_low_seen, is_high_seen, last_step = False, False, math.inf

    for number in range(MAX_ROUNDS):
        cdf, slope = _evaluate(z, below, active, far, is_coarse)
        log_cdf = math.log(min(max(cdf, 1e-300), 1 - 1e-16))
        y = math.sqrt(-2 * log_cdf)
        difference = 2 * (log_cdf - log_tail) / (y_root + y)  # of y_root and y
        residual = difference * factor
        if (z >= high and residual < -1e-9) or (z <= low and residual > 1e-9) or math.isnan(cdf):
            break

        if residual <= 0:
            low, is_low_seen = z, True
        else:
            high, is_high_seen = z, True

        step = difference * y * cdf * SQRT_2PI / slope if slope > 0 else math.inf
        is_slow = number > 5 and abs(step) > 0.5 * last_step
        last_step = abs(step)
        z -= step
        if low <= z <= high and not is_slow:
            if last_step <= small:
                return z
            continue

        if residual <= 0 and not is_high_seen:
            z = high
        elif residual > 0 and not is_low_seen:
            z = low
        else:
            z = 0.5 * (low + high)

        if high - low <= 1e-15 * abs(z) + 1e-300:
            return z

    return math.nan


@_compiled
def _guess(u, active, histogram):
    """About where F reaches Phi(u), and the width of the intervals that this comes from.

    `histogram` (B, 3) is room for the weight of each interval, and its means and scales.
    """
    lowest, highest = math.inf, -math.inf
    for loc in active[LOC]:
        lowest, highest = min(lowest, loc), max(highest, loc)

    width = (highest - lowest) / len(histogram) + 1e-300
    histogram[:] = 0.0
    for k in range(active.shape[1]):
        place = min(int((active[LOC, k] - lowest) / width), len(histogram) - 1)
        histogram[place, 0] += active[W, k]
        histogram[place, 1] += active[W, k] * active[LOC, k]
        histogram[place, 2] += active[W, k] * active[SCALE, k]

    rest, last = _cdf(u), 0
    for place in range(len(histogram)):
        if histogram[place, 0] > 0:
            last = place
            if rest < histogram[place, 0]:
                break
            rest -= histogram[place, 0]

    # Tukey's lambda distribution is a rough normal one.
    total = histogram[last, 0]
    share = min(max(rest / total, 0.0), 1.0)
    normal = 4.91 * (share**0.14 - (1 - share) ** 0.14)
    return (histogram[last, 1] + normal * histogram[last, 2]) / total, width


@_compiled
def _root_near(u, start, slack, small, far, active, near):
    """The root within `slack` of the start among the components near it, and their number.

    They are put into `near` (4, K).
    """
    distance = slack + far * active[SCALE].max()
    below, number = 0.0, 0
    for k in range(active.shape[1]):
        difference = active[LOC, k] - start
        if difference < -distance:
            below += active[W, k]
        elif difference <= distance:
            near[:, number] = active[:, k]
            number += 1

    near = near[:, :number]
    return _find_root(u, start - slack, start + slack, start, small, below, near, far), number


@_compiled
def _root_of_all(u, start, small, far, active):
    """The root, which lies between the least and the greatest of the components' own."""
    low, high = math.inf, -math.inf
    for k in range(active.shape[1]):
        root = active[LOC, k] + active[SCALE, k] * u
        low, high = min(low, root), max(high, root)

    return _find_root(u, low, high, start, small, 0.0, active, far)


@_compiled
def _condition(z, active):
    """Multiplies the weights by sqrt(2 pi) N(z; loc, scale); their sum is sqrt(2 pi) p(z)."""
    total = 0.0
    for k in range(active.shape[1]):
        t = (active[LOC, k] - z) / active[SCALE, k]
        active[W, k] *= math.exp(-0.5 * t * t) / active[SCALE, k]
        total += active[W, k]

    return total


@_compiled
def _keep_largest(active, total, rarest, kept_ones):
    """The number of components with more than `rarest` of all weight, shared among the dropped."""
    number = 0
    threshold = rarest * total / active.shape[1]
    for k in range(active.shape[1]):
        if active[W, k] > threshold:
            kept_ones[:, number] = active[:, k]
            kept_ones[W, number] /= total
            number += 1

    return number


# --------------------------------------------------------------------------------------------------
# Rosenblatt's transform
# --------------------------------------------------------------------------------------------------


@_compiled
def _solve_row(u, weight, mean, scale, bounds, active, near, histogram, z):
    """Fills z (d,) of u (d,) and a codebook mean (d, V), scale (V,); True if it was found."""
    reach, small, max_dropped = bounds
    size, total = 0, 0.0
    for k in range(len(weight)):
        if weight[k] > 0:
            active[W, size], active[SCALE, size], active[INDEX, size] = weight[k], scale[k], k
            total += weight[k]
            size += 1

    if not 0 < total < math.inf:
        return False

    active[W, :size] /= total
    for i in range(len(u)):
        if size == 1:
            z[i] = mean[i, int(active[INDEX, 0])] + active[SCALE, 0] * u[i]
            continue

        # The share that may be dropped, by the rarest tail in the dimensions behind.
        rarest = max_dropped
        for j in range(i + 1, len(u)):
            rarest = min(rarest, max_dropped * _cdf(-abs(u[j])))

        sign = -1.0 if u[i] > 0 else 1.0
        for k in range(size):
            active[LOC, k] = sign * mean[i, int(active[INDEX, k])]

        noise = -abs(u[i])
        far = max(reach, 7.0 - noise)
        now = active[:, :size]
        min_scale = now[SCALE].min()
        start, width = _guess(noise, now, histogram[: 4 * size])
        root, number, density = math.nan, 0, 0.0
        if size > FEW:
            slack = GUESS_REACH * now[SCALE].max() + width
            root, number = _root_near(noise, start, slack, small, far, now, near)

        if not math.isnan(root):
            z[i] = sign * root
            root = sign * z[i]  # rounded
            density = _condition(root, near[:, :number])
            if math.exp(-0.5 * far * far) / min_scale > rarest * density:
                root = math.nan

        if math.isnan(root):
            root, number = _root_of_all(noise, start, small, far, now), size
            z[i] = sign * root
            near[:, :size] = now
            density = _condition(sign * z[i], near[:, :size])

        if math.isnan(root) or not density > MIN_DENSITY:
            return False

        size = _keep_largest(near[:, :number], density, rarest, active)

    return True


@_compiled
def _solve_rows(u, weight, mean, scale, bounds, active, near, histogram, z, is_found):
    for row in range(len(u)):
        is_found[row] = is_found[row] and _solve_row(
            u[row], weight[row], mean, scale, bounds, active, near, histogram, z[row]
        )


def _make_table(mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The means (d, V) and scales (V,) in float64, and whether all of them are numbers."""
    mean, scale = mean.double().T.contiguous(), log_scale.double().exp()
    is_finite = bool(mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all())
    return mean, scale, is_finite


def solve(u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """z (n, d) of u (n, d), and in which rows (n,) it was found.

    Args:
        u: Noise, float32 or float64.
        logits: Log-weights of the components (n, V).
        mean, log_scale: The codebook, (V, d) and (V,).
    """
    means, scale, is_finite = kept(_make_table, mean, log_scale)
    is_found = (u.abs() <= MAX_NOISE).all(-1) & is_finite  # False for NaN
    weight = torch.exp(logits - logits.amax(-1, keepdim=True))
    z = torch.full_like(u, math.nan)
    bounds = (REACH[u.dtype], SMALL_STEP[u.dtype], MAX_DROPPED[u.dtype])
    sizes = (4, len(scale)), (4, len(scale)), (NUM_BINS, 3)
    room = [u.new_empty(size, dtype=torch.float64).numpy() for size in sizes]
    inputs = [x.numpy() for x in (u.double(), weight, means, scale)]
    _solve_rows(*inputs, bounds, *room, z.numpy(), is_found.numpy())
    return z, is_found


# --------------------------------------------------------------------------------------------------
# Mixtures of scalars
# --------------------------------------------------------------------------------------------------


@_compiled
def _solve_scalar(u, logits, loc, log_scale, bounds, active, histogram):
    """The root of one mixture of K components; NaN if it was not found."""
    reach, small, _ = bounds
    sign = -1.0 if u > 0 else 1.0
    largest = logits.max()
    size, total = 0, 0.0
    for k in range(len(logits)):
        weight, scale = math.exp(logits[k] - largest), math.exp(log_scale[k])
        if weight > 0:
            active[W, size], active[LOC, size], active[SCALE, size] = weight, sign * loc[k], scale
            total += weight
            size += 1

            if not (0 < scale < math.inf and math.isfinite(loc[k])):
                return math.nan

    if not 0 < total < math.inf:
        return math.nan

    now = active[:, :size]
    now[W] /= total
    noise = -abs(u)
    far = max(reach, 7.0 - noise)
    start, _ = _guess(noise, now, histogram[: 4 * size])
    return sign * _root_of_all(noise, start, small, far, now)


@_compiled
def _solve_scalars(u, logits, loc, log_scale, bounds, active, histogram, z):
    for row in range(len(u)):
        if abs(u[row]) <= MAX_NOISE:
            z[row] = _solve_scalar(
                u[row], logits[row], loc[row], log_scale[row], bounds, active, histogram
            )


def solve_scalars(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """z (n,) of u (n,) and parameters (n, K); NaN where it was not found."""
    num_components = logits.shape[1]
    z = torch.full_like(u, math.nan)
    bounds = (REACH[u.dtype], SMALL_STEP[u.dtype], MAX_DROPPED[u.dtype])
    sizes = (4, num_components), (4 * num_components, 3)
    room = [u.new_empty(size, dtype=torch.float64).numpy() for size in sizes]
    inputs = [x.double().contiguous().numpy() for x in (u, logits, loc, log_scale)]
    _solve_scalars(*inputs, bounds, *room, z.numpy())
    return z


# --------------------------------------------------------------------------------------------------
# With gradients
# --------------------------------------------------------------------------------------------------


class _MixtureCDFNumba(MixtureCDFInverse):
    @staticmethod
    def forward(ctx, u, logits, loc, log_scale):
        parameters = [x.reshape(-1, x.shape[-1]) for x in (logits, loc, log_scale)]
        flat = u.reshape(-1)
        z = solve_scalars(flat, *parameters)
        fill_missing(z, ~z.isnan(), mixture_cdf_inverse_reference, flat, *parameters)

        z = z.reshape(u.shape)
        ctx.save_for_backward(z, logits, loc, log_scale)
        return z


class _MixtureRosenblattNumba(MixtureRosenblattInverse):
    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        z, is_found = solve(u, logits, mean, log_scale)
        reference = partial(mixture_rosenblatt_inverse_reference, mean=mean, log_scale=log_scale)
        fill_missing(z, is_found, reference, u, logits)
        ctx.save_for_backward(z, logits, mean, log_scale)
        return z


def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFNumba.apply(u, logits, loc, log_scale)


def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattNumba.apply(u, logits, mean, log_scale)
