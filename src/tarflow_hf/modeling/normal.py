"""The standard normal in log space, and root finding: what the couplings are made of.

Notation: phi and Phi are the density and the distribution function of N(0, 1). Every function works
element by element in the dtype of its argument (float32 or float64) and is accurate to a few units
in the last place. Only `normal_log_prob` is meant to be differentiated through: the couplings
derive their gradients by hand.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)
SQRT_2PI = math.sqrt(2 * math.pi)
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)

# Up to this |u| the tail Phi(-|u|) is far from the end of float64's range.
MAX_NOISE = 30.0

# Processors take ten times as long for what is too small for a normal number. So weights are held
# above e to the first of these, and distances over sqrt(2) below the second: a tail is less there
# than the least weight.
MIN_LOG_WEIGHT = -80.0
FARTHEST = {torch.float32: 9.0, torch.float64: 18.0}


def normal_log_prob(x: Tensor) -> Tensor:
    """Log-density of the standard normal, `log phi(x)`, in nats. Differentiable.

    Example:
        >>> normal_log_prob(torch.tensor([0.0, 2.0]))
        tensor([-0.9189, -2.9189])
    """
    return -0.5 * x.square() - LOG_SQRT_2PI


class NormalTails(NamedTuple):
    """Both tails of the standard normal at x, and their hazards, with h = phi / Phi; all as logs."""

    log_cdf: Tensor  # log Phi(x)
    log_sf: Tensor  # log Phi(-x)
    log_cdf_hazard: Tensor  # log h(x)
    log_sf_hazard: Tensor  # log h(-x)


def normal_tails(x: Tensor) -> NormalTails:
    """Tails and hazards, all four for little more than the cost of one: they share erfc and erfcx.

    The larger tail is `log(1 - smaller)`, and in the smaller one's hazard the exponentials cancel
    exactly, before anything is rounded.

    Args:
        x: Any shape.

    Returns:
        Four tensors of the shape of `x`.

    Example:
        >>> normal_tails(torch.tensor([0.0, -10.0])).log_cdf
        tensor([ -0.6931, -53.2313])
    """
    # erfc is the more exact near 0 but underflows; erfcx(a) = exp(a^2) erfc(a) decays only as 1/a.
    a = x.abs() * SQRT_HALF
    is_near = a < 0.75
    half_square = 0.5 * x.square()
    log_factor = torch.log(0.5 * torch.where(is_near, torch.erfc(a), torch.special.erfcx(a)))
    log_exponential = -torch.where(is_near, 0.0, half_square)  # what log_factor leaves out
    small = log_factor + log_exponential
    large = torch.log1p(-small.exp())
    small_hazard = -LOG_SQRT_2PI - log_factor - (half_square + log_exponential)
    large_hazard = -LOG_SQRT_2PI - half_square - large
    is_negative = x < 0

    return NormalTails(
        log_cdf=torch.where(is_negative, small, large),
        log_sf=torch.where(is_negative, large, small),
        log_cdf_hazard=torch.where(is_negative, small_hazard, large_hazard),
        log_sf_hazard=torch.where(is_negative, large_hazard, small_hazard),
    )


def log_reversed_hazard(x: Tensor) -> Tensor:
    """`log(phi(x) / Phi(x))`, the log of the reversed hazard rate (inverse Mills ratio at -x).

    Close to `log(-x)` far to the left and to `log phi(x)` far to the right.

    Example:
        >>> log_reversed_hazard(torch.tensor([-1e8, 0.0]))
        tensor([18.4207, -0.2258])
    """
    return normal_tails(x).log_cdf_hazard


def ndtri_exp(log_p: Tensor) -> Tensor:
    """Standard normal quantile of a log-probability, `Phi^-1(exp(log_p))`, without `exp(log_p)`.

    Newton's method on `log Phi`, which is concave and increasing: from any start the iterates
    approach the root from the left, quadratically. The start is the asymptotic expansion of the
    tail, `x^2 = w - log(w) - log(2 pi)` with `w = -2 log_p`, cut at 0. The same function is
    `scipy.special.ndtri_exp`.

    Args:
        log_p: Natural logarithms of probabilities, at most 0.

    Returns:
        Quantiles, shape of `log_p`; infinite at `log_p` of 0 and minus infinity, NaN above 0.

    Example:
        >>> ndtri_exp(torch.tensor([-1e4, -1.0, -1e-6]))
        tensor([-141.3798,   -0.3375,    4.7534])
    """
    # Above one half the other tail is the small one, and expm1 gives log(1 - p) without cancelling.
    is_upper = log_p > -math.log(2)
    log_tail = torch.where(is_upper, torch.log(-torch.expm1(log_p)), log_p)
    w = -2 * log_tail
    x = -(w - w.log() - 2 * LOG_SQRT_2PI).clamp(min=0).sqrt()

    for _ in range(4 if log_p.dtype == torch.float32 else 5):
        at = normal_tails(x)
        x = x - (at.log_cdf - log_tail) * torch.exp(-at.log_cdf_hazard)

    x = torch.where(log_tail == -math.inf, log_tail, x)
    return torch.where(is_upper, -x, x)


@torch.compiler.disable  # unrolled, the loop is a graph of thousands of nodes: minutes to compile
def find_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    lower: Tensor,
    upper: Tensor,
    initial: Tensor,
    tolerance: Tensor,
) -> Tensor:
    """Root of an increasing function in a bracket, by Newton steps safeguarded by bisection.

    Every element takes its own steps:

    - A Newton step, if it stays in the bracket and is at most half as long as the step before, or
      as the bracket that was halved before. Otherwise the bracket is halved.
    - A Newton step too short to move x is made as long as the spacing of numbers there. It crosses
      the root and closes the bracket, or shows that the slope holds nowhere but at x.
    - None, once its value is within `tolerance` or its bracket has no number left inside.

    The most steps are fixed by the dtype, and nothing is read back from the device. Only on a CPU,
    where looking is free, the loop ends when every element rests.

    Args:
        function: Maps x to `(value, log of the derivative)`; its root is where the value is 0.
        lower, upper: The bracket, `value(lower) <= 0 <= value(upper)`.
        initial: The start, inside the bracket.
        tolerance: An absolute value of the function that counts as 0: its rounding error.

    Returns:
        The roots, shape of `initial`.

    Example:
        >>> cube = lambda x: (x**3 - 8, torch.log(3 * x**2))
        >>> start = torch.tensor([1.0, 4.0])
        >>> find_root(cube, torch.zeros(2), torch.full((2,), 9.0), start, torch.full((2,), 1e-6))
        tensor([2., 2.])
    """
    x = initial
    last_step = upper - lower
    eps = torch.finfo(x.dtype).eps
    done = torch.zeros_like(x, dtype=torch.bool)

    for _ in range(2 * (24 if x.dtype == torch.float32 else 53)):
        value, log_slope = function(x)
        lower = torch.where(value <= 0, x, lower)
        upper = torch.where(value >= 0, x, upper)
        spacing = eps * x.abs()
        done = done | (value.abs() <= tolerance) | (upper - lower <= spacing)
        if x.device.type == "cpu" and bool(done.all()):
            break

        step = -value * torch.exp(-log_slope)
        newton = x + torch.where(step.abs() < spacing, -value.sign() * spacing, step)

        # A comparison with NaN or infinity (a slope of 0) is false, which means bisection.
        is_good = (newton >= lower) & (newton <= upper) & (2 * step.abs() <= last_step)
        new_x = torch.where(is_good, newton, lower + 0.5 * (upper - lower))
        last_step = torch.where(is_good, step.abs(), upper - lower)
        x = torch.where(done, x, new_x)

    return x
