"""The standard normal in log space against mpmath (50 digits) and scipy.

Root finding where Newton's method fails.
"""

import math

import mpmath
import pytest
import scipy.special
import torch
from mpmath import mpf

from helpers.exact import exact_log_ndtr, exact_log_prob, exact_ndtri_exp
from tarflow_hf.modeling.normal import (
    find_root,
    log_reversed_hazard,
    ndtri_exp,
    normal_log_prob,
    normal_tails,
)

DTYPES = [torch.float32, torch.float64]


def grid(dtype: torch.dtype) -> torch.Tensor:
    """Both signs of magnitudes from 1e-8 to 1e8, and zero.

    Dense where the formulas change, at |x| = 1.06.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [10 ** torch.linspace(-8, 8, 200, dtype=torch.float64), torch.linspace(0, 3, 100)]
    )
    x = x * (1 + 0.01 * torch.rand(len(x), generator=generator))

    return torch.cat([x, -x, torch.tensor([1e4, -1e4])]).to(dtype)


def worst(actual: torch.Tensor, expected: list[mpf], scale: list[mpf]) -> float:
    """The largest error, in units of the dtype's eps times `scale`.

    Numbers below the smallest normal one count as 0.
    """
    info = torch.finfo(actual.dtype)
    errors = [abs(mpf(a) - e) for a, e in zip(actual.tolist(), expected, strict=True)]
    return max(
        float(max(e - mpf(info.tiny), 0) / (s * mpf(info.eps)))
        for e, s in zip(errors, scale, strict=True)
    )


# ------------------------------------------------------------------------------------ the functions


@pytest.mark.parametrize("dtype", DTYPES)
def test_tails_against_mpmath(dtype):
    x = grid(dtype)
    log_cdf, log_sf = normal_tails(x)[:2]
    assert log_cdf.dtype == log_sf.dtype == dtype
    exact = [mpf(v) for v in x.tolist()]

    # The larger tail is log1p(-exp(y)), y = log of the smaller: an error of eps y in y is relative
    # in exp(y).
    for actual, sign in ((log_cdf, 1), (log_sf, -1)):
        expected = [exact_log_ndtr(sign * v) for v in exact]
        amplification = [1 + (v * v / 2 if sign * v > 0 else 0) for v in exact]
        assert (
            worst(
                actual, expected, [abs(e) * a for e, a in zip(expected, amplification, strict=True)]
            )
            < 3
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_hazard_against_mpmath(dtype):
    x = grid(dtype)
    expected = [exact_log_prob(mpf(v)) - exact_log_ndtr(mpf(v)) for v in x.tolist()]
    assert worst(log_reversed_hazard(x), expected, [1 + abs(e) for e in expected]) < 3
    mirrored = normal_tails(-x)
    assert torch.equal(mirrored.log_sf_hazard, log_reversed_hazard(x))
    assert torch.equal(mirrored.log_sf, normal_tails(x).log_cdf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_density_against_mpmath(dtype):
    x = grid(dtype)
    expected = [exact_log_prob(mpf(v)) for v in x.tolist()]
    assert worst(normal_log_prob(x), expected, [abs(e) for e in expected]) < 1.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantile_against_mpmath(dtype):
    smallest = -37 if dtype == torch.float32 else -300
    log_p = torch.cat(
        [
            -(10 ** torch.linspace(smallest, 17, 200, dtype=torch.float64)),
            -torch.linspace(0.4, 2, 100),
        ]
    )
    log_p = log_p.to(dtype)
    x = ndtri_exp(log_p)
    assert x.dtype == dtype
    expected = []

    for value, guess in zip(log_p.tolist(), x.tolist(), strict=True):
        if value <= -math.log(2):
            expected.append(exact_ndtri_exp(mpf(value), guess))
        else:  # the other tail: log(1 - exp(log_p))
            expected.append(-exact_ndtri_exp(mpmath.log(-mpmath.expm1(mpf(value))), -guess))

    assert worst(x, expected, [1 + abs(e) for e in expected]) < 3


def test_same_functions_as_scipy():
    x = grid(torch.float64)
    log_p = torch.cat(
        [
            -(10 ** torch.linspace(-300, 17, 1000, dtype=torch.float64)),
            -torch.linspace(0.4, 2, 1000),
        ]
    )
    for ours, theirs in (
        (normal_tails(x).log_cdf, scipy.special.log_ndtr(x.numpy())),
        (normal_tails(x).log_sf, scipy.special.log_ndtr(-x.numpy())),
        (ndtri_exp(log_p), scipy.special.ndtri_exp(log_p.numpy())),
    ):
        atol = 1e-15 if ours.max() > 0 else 1e-300  # a quantile near 0 has no relative precision
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-12, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits(dtype):
    x = ndtri_exp(torch.tensor([0.0, -math.inf, 1.0], dtype=dtype))
    assert x[0] == math.inf and x[1] == -math.inf and x[2].isnan()
    far = torch.tensor(
        [1e18, -1e18], dtype=dtype
    )  # its square is within float32's range, its exponential in none
    for output in normal_tails(far):
        assert output.isfinite().all()

    assert all(function(far[:0]).shape == (0,) for function in (ndtri_exp, log_reversed_hazard))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantile_inverts_the_tail(dtype):
    x = -grid(dtype).abs()
    error = (ndtri_exp(normal_tails(x).log_cdf) - x).abs() / (1 + x.abs())
    assert error.max() < 4 * torch.finfo(dtype).eps


# -------------------------------------------------------------------------------------- root finder

NO_SLOPE = -math.inf

# name: (value and log of the derivative, lower, upper, root)
FUNCTIONS = {
    "line": (lambda x: (x - 3, torch.zeros_like(x)), -10.0, 10.0, 3.0),
    "cube": (lambda x: (x**3 - 8, torch.log(3 * x**2)), -9.0, 10.0, 2.0),
    "flat cube": (lambda x: ((x - 1) ** 3, torch.log(3 * (x - 1) ** 2)), -9.0, 10.0, 1.0),
    "cube root, Newton diverges": (
        lambda x: (
            (x - 1).sign() * (x - 1).abs() ** (1 / 3),
            -math.log(3) - 2 / 3 * (x - 1).abs().log(),
        ),
        -7.0,
        8.0,
        1.0,
    ),
    "arctan, Newton diverges": (
        lambda x: (torch.atan(x - 5), -torch.log1p((x - 5) ** 2)),
        -1e4,
        1e4,
        5.0,
    ),
    "staircase": (lambda x: (x.floor() - 2.5, torch.full_like(x, NO_SLOPE)), -10.0, 10.0, 3.0),
    "slope underestimated": (lambda x: (x - 3, torch.full_like(x, -50.0)), -10.0, 10.0, 3.0),
    "slope overestimated": (lambda x: (x - 3, torch.full_like(x, 50.0)), -10.0, 10.0, 3.0),
    "slope NaN": (lambda x: (x - 3, torch.full_like(x, math.nan)), -10.0, 10.0, 3.0),
    "flat beside the root": (
        lambda x: (torch.where(x < 4, -1e-30, x - 4), torch.where(x < 4, NO_SLOPE, 0.0)),
        0.0,
        1e4,
        4.0,
    ),
    "exponential cliff": (
        lambda x: (torch.expm1(20 * (x - 2)), 20 * (x - 2) + math.log(20)),
        -1.0,
        6.0,
        2.0,
    ),
    "root at the lower end": (lambda x: (x - 1, torch.zeros_like(x)), 1.0, 1e4, 1.0),
    "root at the upper end": (lambda x: (x**3 - 1, torch.log(3 * x**2)), -1e4, 1.0, 1.0),
    "root 0": (lambda x: (x**3 + x, torch.log1p(3 * x**2)), -1e4, 1e3, 0.0),
    "root 0 of a step": (
        lambda x: (torch.where(x < 0, -1.0, 1.0), torch.full_like(x, NO_SLOPE)),
        -1e4,
        1e3,
        0.0,
    ),
    "no bracket left": (lambda x: (x - 7.5, torch.zeros_like(x)), 7.0, 7.0, 7.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_root(name, dtype):
    function, lower, upper, root = FUNCTIONS[name]
    lower, upper = (torch.full((50,), x, dtype=dtype) for x in (lower, upper))
    share = torch.linspace(0, 1, 50, dtype=dtype)
    initial = ((1 - share) * lower + share * upper).clamp(lower, upper)
    x = find_root(function, lower, upper, initial, tolerance=torch.zeros_like(initial))

    # Bisection alone leaves the width of the bracket over 2 to the number of steps.
    eps = torch.finfo(dtype).eps
    tolerance = eps * abs(root) + (upper - lower)[0] * eps**2 * 0.5
    if name in ("flat cube", "exponential cliff"):
        tolerance = 2 * eps  # x - 1 is rounded to a multiple of eps below 1, 20 (x - 2) likewise

    if name == "slope overestimated":
        tolerance = (upper - lower)[0] * eps  # every other step is wasted

    assert ((x - root).abs() <= tolerance).all(), x


@pytest.mark.parametrize("dtype", DTYPES)
def test_root_alone_and_in_a_batch(dtype):
    """No element's steps depend on its neighbours' convergence.

    The root is the same to the last bit.
    """
    generator = torch.Generator().manual_seed(0)
    target = 10 ** (6 * torch.rand(64, dtype=dtype, generator=generator) - 3)
    target[::7], target[1::7] = 0.0, -1.0  # a triple root at 0; a root at the bracket's end
    lower, upper = torch.full((64,), -1.0, dtype=dtype), torch.full((64,), 1e4, dtype=dtype)

    def solve(rows):
        def cube(x):
            return x * x * x - target[rows], torch.log(3 * x * x)

        return find_root(
            cube, lower[rows], upper[rows], (0.5 * (lower + upper))[rows], 1e-6 * target[rows].abs()
        )

    assert torch.equal(solve(slice(None)), torch.cat([solve(slice(i, i + 1)) for i in range(64)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_root_takes_few_steps(dtype):
    """Newton's method comes from one side.

    Without a step across the root, only bisection would close the bracket.
    """
    calls = []

    def function(x):
        calls.append(x)
        return x**3 - 2, torch.log(3 * x**2)  # not 0 at any float

    lower, upper = torch.full((100,), 0.1, dtype=dtype), torch.full((100,), 5.0, dtype=dtype)
    find_root(
        function, lower, upper, torch.linspace(0.1, 5, 100, dtype=dtype), torch.zeros_like(lower)
    )
    assert len(calls) <= 15, len(calls)


def test_root_rests_within_the_tolerance():
    """The loop ends near the root although rounding noise is larger than the steps."""

    def function(x):
        return x - 1 + 1e-3 * torch.sin(1e5 * x), torch.zeros_like(x)

    start = torch.linspace(-5, 5, 100)
    x = find_root(
        function, torch.full((100,), -5.0), torch.full((100,), 5.0), start, torch.full((100,), 2e-3)
    )
    assert ((x - 1).abs() < 4e-3).all()
