"""The couplings of `test_couplings.py` against 50 digits."""

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from helpers.couplings import CASES, Case, draw, every_implementation, generator
from helpers.exact import exact_log_ndtr, exact_log_prob, exact_ndtri_exp


def exact_log_softmax(logits: list[float]) -> list[mpf]:
    logits = [mpf(x) for x in logits]
    log_sum = mpmath.log(sum(mpmath.exp(x - max(logits)) for x in logits)) + max(logits)
    return [x - log_sum for x in logits]


def exact_scalar(z, log_weight, loc, log_scale) -> tuple[mpf, mpf, list[mpf]]:
    """Returns u, log du/dz and the components' log(pi_k N(z; m_k, s_k)) of one scalar."""
    t = [(mpf(z) - mpf(m)) * mpmath.exp(-mpf(s)) for m, s in zip(loc, log_scale, strict=True)]
    cdf, sf = (
        sum(mpmath.exp(w + exact_log_ndtr(sign * x)) for w, x in zip(log_weight, t, strict=True))
        for sign in (1, -1)
    )
    log_tail = mpmath.log(min(cdf, sf))
    guess = -float(mpmath.sqrt(-2 * log_tail))
    u = exact_ndtri_exp(log_tail, guess) * (1 if cdf <= sf else -1)
    log_joint = [
        w + exact_log_prob(x) - mpf(s) for w, x, s in zip(log_weight, t, log_scale, strict=True)
    ]

    return u, mpmath.log(sum(map(mpmath.exp, log_joint))) - exact_log_prob(u), log_joint


def exact(case: Case, z, *parameters) -> tuple[list[mpf], list[mpf]]:
    """Returns u of one position and log du_i/dz_i of each dimension, in 50 digits.

    Takes the inputs as exact.
    """
    if case.kind == "affine":
        loc, log_scale = parameters
        return [(mpf(z) - mpf(loc)) * mpmath.exp(-mpf(log_scale))], [-mpf(log_scale)]

    logits, loc, log_scale = parameters
    log_weight, u, log_slope = exact_log_softmax(logits), [], []

    columns = (
        [(z, loc)] if case.kind == "mixture_cdf" else zip(z, zip(*loc, strict=True), strict=True)
    )
    for z_i, loc_i in columns:
        u_i, log_slope_i, log_joint = exact_scalar(z_i, log_weight, loc_i, log_scale)
        log_weight = exact_log_softmax(log_joint)
        u.append(u_i)
        log_slope.append(log_slope_i)

    return u, log_slope


def position(case: Case, tensors: list[Tensor], i: int) -> list:
    """Returns the arguments of position i as Python numbers.

    All positions share the components of the Rosenblatt coupling.
    """
    shared = 2 if case.kind == "mixture_rosenblatt" else 0
    return [
        x.tolist() if n >= len(tensors) - shared else x[i].tolist() for n, x in enumerate(tensors)
    ]


# Errors of u relative to 1 + |u|. The contract is 1e-6 and 1e-11; float64 is held to what it
# reaches.
U_ERROR = {torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("hardness", [0, 0.5, 1])
@every_implementation
@pytest.mark.parametrize("name", CASES)
def test_against_mpmath(run, name, dtype, hardness):
    """u, log_det, log_prob and the inverse, for u from -30 to 30 in every dimension."""
    case, count = CASES[name], 10
    eps = torch.finfo(dtype).eps
    u_asked, *parameters = draw(case, (count,), dtype, seed=7, hardness=hardness)
    u_asked = (60 * torch.rand(u_asked.shape, generator=generator(1)) - 30).to(dtype)
    if u_asked.ndim == 2:
        u_asked[: count // 2, :-1] /= 20  # a tail after a moderate beginning

    z = run(case.kind + "_inverse", u_asked, *parameters)
    u, log_det = run(case.kind, z, *parameters)
    log_prob = (
        run(case.kind + "_log_prob", z, *parameters) if "_log_prob" in case.directions else None
    )
    assert u.dtype == log_det.dtype == z.dtype == dtype

    for i in range(count):
        expected_u, expected_slope = exact(case, *position(case, [z, *parameters], i))
        actual_u, actual_z, asked = ([x[i]] if x.ndim == 1 else list(x[i]) for x in (u, z, u_asked))
        for j, (a, e) in enumerate(zip(actual_u, expected_u, strict=True)):
            assert abs(a.item() - e) <= U_ERROR[dtype] * (1 + abs(e)), (i, j)
            # The inverse can do no better than z's own rounding, and that of the past's squares,
            # always in float64.
            slack = 2 * eps * (1 + abs(e) + abs(actual_z[j].item()) * mpmath.exp(expected_slope[j]))
            slack += 2**-52 * sum(x * x for x in expected_u[:j])
            assert abs(asked[j].item() - e) <= slack, (i, j)

        # log p is made of squares, each as exact as dtype allows: u^2/2 or (z - m)^2/2s^2, and of
        # log-weights.
        square = sum(e * e for e in expected_u)
        expected = sum(expected_slope)
        assert abs(log_det[i].item() - expected) <= 3 * eps * (
            len(expected_u) + square + abs(expected)
        ), i

        if log_prob is not None:
            expected += sum(map(exact_log_prob, expected_u))
            size = len(expected_u) + square + abs(expected) + parameters[0].abs().max().item()
            assert abs(log_prob[i].item() - expected) <= 3 * eps * size, i


@every_implementation
def test_the_past_far_from_every_component(run, dtype):
    """30 scales from all components their log-densities are -450 and almost equal.

    The later weights depend on the small differences.
    """
    case, count = Case("mixture_rosenblatt", 7, 3), 10
    random = generator(0)
    logits, mean = (
        torch.randn(count, 7, generator=random),
        0.1 * torch.randn(7, 3, generator=random),
    )
    mean[:, -1] *= 20
    log_scale = 0.003 * torch.randn(7, generator=random)
    parameters = [x.to(dtype) for x in (logits, mean, log_scale)]
    u_asked = (60 * torch.rand(count, 3, generator=random) - 30).to(dtype)
    u_asked[:, -1] /= 10
    z = run("mixture_rosenblatt_inverse", u_asked, *parameters)
    u, _ = run("mixture_rosenblatt", z, *parameters)

    for i in range(count):
        for a, e in zip(
            u[i].tolist(), exact(case, *position(case, [z, *parameters], i))[0], strict=True
        ):
            assert abs(a - e) <= U_ERROR[dtype] * (1 + abs(e)), i
