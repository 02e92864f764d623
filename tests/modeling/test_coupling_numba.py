"""The compiled inverses. `test_couplings.py` holds "auto" to everything that it holds the reference to.

Here: that "auto" comes here, that roots are the reference's in both dtypes, and what is left to it.
"""

import math

import pytest
import torch

from helpers.couplings import CASES, CODEBOOKS, draw, draw_mixture, generator
from tarflow_hf.modeling import coupling, coupling_active, coupling_numba, coupling_torch

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("one_thread")

SCALARS = {name: case for name, case in CASES.items() if case.kind == "mixture_cdf"}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_result_is_the_references(name):
    u, *parameters = draw_mixture(name, 10)
    z, is_found = coupling_numba.solve(u, *parameters)
    expected = coupling_torch.mixture_rosenblatt_inverse(u, *parameters)
    assert is_found.all()
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_float32_is_no_worse_than_the_reference(name):
    u, *parameters = draw_mixture(name, 20, torch.float32, seed=1)
    z, is_found = coupling_numba.solve(u, *parameters)
    assert is_found.all()
    reference = coupling_torch.mixture_rosenblatt_inverse(u, *parameters)

    def error(z):
        whole = (x.double() for x in parameters)
        transformed, _ = coupling.mixture_rosenblatt(z.double(), *whole)
        return (transformed - u).abs() / (1 + u.abs())

    assert error(z).sum() <= 1.01 * error(reference).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hardness", [0, 0.3, 1])
@pytest.mark.parametrize("name", SCALARS)
def test_mixtures_of_scalars(name, hardness, dtype):
    """The transform of a root is the noise, as far as the dtype resolves it."""
    u, *parameters = draw(SCALARS[name], (500,), dtype, seed=1, hardness=hardness)
    u /= 3
    z = coupling_numba.solve_scalars(u, *parameters)
    is_found = z.isfinite()
    assert is_found.float().mean() > (0.9 if hardness == 1 else 0.99)
    reference = coupling_torch.mixture_cdf_inverse(u, *parameters)

    def error(z):
        transformed, _ = coupling.mixture_cdf(z.double(), *(x.double() for x in parameters))
        return (transformed - u).abs() / (1 + u.abs())

    ours, theirs = error(z)[is_found], error(reference)[is_found]
    assert ours.sum() <= 1.01 * theirs.sum() + 1e-9


@pytest.mark.parametrize("name", ["separated", "overlapping"])
def test_a_row_alone_and_in_a_batch(name):
    u, *parameters = draw_mixture(name, 20, torch.float32, seed=2)
    logits, *codebook = parameters
    z, _ = coupling_numba.solve(u, logits, *codebook)
    for n in range(20):
        alone, _ = coupling_numba.solve(u[n : n + 1], logits[n : n + 1], *codebook)
        assert torch.equal(alone[0], z[n])


def test_both_ways_without_pytorch_s_calls_find_the_same_roots():
    """A thousand positions in float64: those of `coupling_active.py` to rounding."""
    u, *parameters = draw_mixture("separated", 1000, seed=3)
    z, _ = coupling_numba.solve(u, *parameters)
    other, _ = coupling_active.solve(u, *parameters)
    torch.testing.assert_close(z, other, rtol=1e-10, atol=1e-10)


def test_auto_comes_here_with_the_references_gradients(monkeypatch):
    calls = []
    solve = coupling_numba.solve
    monkeypatch.setattr(coupling_numba, "solve", lambda *x: calls.append(1) or solve(*x))
    tensors = [x.requires_grad_() for x in draw_mixture("separated", 5, seed=7)]
    z = coupling.mixture_rosenblatt_inverse(*tensors)
    assert calls
    expected = coupling.mixture_rosenblatt_inverse(*tensors, implementation="reference")
    assert len(calls) == 1

    cotangent = torch.randn(z.shape, generator=generator(8), dtype=z.dtype)
    gradients = (torch.autograd.grad(x, tensors, cotangent) for x in (z, expected))
    for actual, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-6)


def test_what_is_not_found_is_left_to_the_reference():
    u, logits, mean, log_scale = draw_mixture("separated", 5, seed=4)
    u[0, 2], u[1, 0] = 31.0, math.nan
    logits[2] = math.nan
    logits[3, 1:] = -math.inf  # a single component
    _, is_found = coupling_numba.solve(u, logits, mean, log_scale)
    assert is_found.tolist() == [False, False, False, True, True]

    z = coupling.mixture_rosenblatt_inverse(u, logits, mean, log_scale)
    expected = coupling_torch.mixture_rosenblatt_inverse(u, logits, mean, log_scale)
    for n in (0, 3, 4):
        torch.testing.assert_close(z[n], expected[n])

    assert z[1].isnan().any() and z[2].isnan().all()
    torch.testing.assert_close(z[3], mean[0] + log_scale[0].exp() * u[3])


def test_scalars_that_are_not_found():
    u = torch.tensor([31.0, math.nan, 1.0, 1.0, 1.0, 1.0])
    logits = torch.zeros(6, 2)
    logits[2, 0], logits[3, 0] = math.nan, -math.inf
    loc = torch.tensor([[-1.0, 1.0]]).repeat(6, 1)
    loc[4, 1] = math.inf
    log_scale = torch.zeros(6, 2)
    log_scale[5, 0] = -1000.0
    z = coupling_numba.solve_scalars(u, logits, loc, log_scale)
    assert z.isfinite().tolist() == [False, False, False, True, False, False]
    assert z[3] == 2.0


def test_a_codebook_that_is_no_number():
    u, logits, mean, log_scale = draw_mixture("separated", 2, seed=5)
    for broken in (math.nan, math.inf):
        where = mean.clone()
        where[3, 1] = broken
        assert not coupling_numba.solve(u, logits, where, log_scale)[1].any()

    assert not coupling_numba.solve(u, logits, mean, log_scale - 2000)[1].any()
