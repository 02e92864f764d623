"""The inverse over a large codebook by active sets.

`test_couplings.py` holds "auto" to everything that it holds the reference to. Here: that large
codebooks come here, that the result is the reference's, and what is left out.
"""

import math

import pytest
import torch

from helpers.couplings import generator
from tarflow_hf.modeling import (
    codebook_kept,
    coupling,
    coupling_active,
    coupling_naive,
    coupling_torch,
)
from tarflow_hf.modeling.codebook import Codebook

pytestmark = pytest.mark.usefixtures("one_thread", "without_numba")

# (components, dimensions, log scale, spread of the log scales, spread of the logits)
CODEBOOKS = {
    "separated": (300, 8, -3.5, 0.0, 3.0),
    "close": (300, 8, -1.5, 0.0, 3.0),
    "overlapping": (300, 8, 0.0, 0.0, 1.0),
    "of mixed scales": (300, 8, -2.0, 1.0, 3.0),
    "steered": (300, 8, -2.0, 0.3, 30.0),
    "larger": (3_000, 4, -3.0, 0.3, 3.0),
}


def draw_mixture(name: str, num_rows: int, dtype=torch.float64, seed=0):
    """u, logits, mean and log scale."""
    num_components, size, log_scale, spread, contrast = CODEBOOKS[name]
    random = generator(seed)
    mean = torch.randn(num_components, size, generator=random, dtype=dtype)
    jitter = torch.randn(num_components, generator=random, dtype=dtype)
    logits = contrast * torch.randn(num_rows, num_components, generator=random, dtype=dtype)
    u = torch.randn(num_rows, size, generator=random, dtype=dtype)
    return u, logits, mean, log_scale + spread * jitter


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_result_is_the_references(name):
    """In float64, over two thousand positions in all."""
    u, *parameters = draw_mixture(name, 400 if name != "larger" else 50)
    z, is_found = coupling_active.solve(u, *parameters)
    expected = coupling_torch.mixture_rosenblatt_inverse(u, *parameters)
    assert is_found.all()
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_float32_is_no_worse_than_the_reference(name):
    u, *parameters = draw_mixture(name, 50, torch.float32, seed=1)
    z, is_found = coupling_active.solve(u, *parameters)
    reference = coupling_torch.mixture_rosenblatt_inverse(u, *parameters)
    assert is_found.all()

    def error(z):
        again, _ = coupling.mixture_rosenblatt(z.double(), *(x.double() for x in parameters))
        return (again - u).abs() / (1 + u.abs())

    assert error(z).sum() <= 1.01 * error(reference).sum()


def test_a_row_alone_and_in_a_batch():
    for name in ("separated", "overlapping", "larger"):
        u, logits, *codebook = draw_mixture(name, 20, seed=2)
        z, _ = coupling_active.solve(u, logits, *codebook)
        for n in range(20):
            alone, _ = coupling_active.solve(u[n : n + 1], logits[n : n + 1], *codebook)
            torch.testing.assert_close(alone[0], z[n], rtol=1e-9, atol=1e-9)


def test_tails_and_excluded_components():
    """Noise in the tails, components with no weight, and a codebook whose components coincide."""
    u, logits, mean, log_scale = draw_mixture("close", 60, seed=3)
    u = 3 * u
    logits[:30, 5:] = -math.inf
    logits[:10, 1:] = -math.inf
    expected = coupling_torch.mixture_rosenblatt_inverse(u, logits, mean, log_scale)
    z, is_found = coupling_active.solve(u, logits, mean, log_scale)
    assert is_found.all()
    torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-8)

    z, is_found = coupling_active.solve(u, logits, torch.ones_like(mean), log_scale)
    expected = coupling_torch.mixture_rosenblatt_inverse(
        u, logits, torch.ones_like(mean), log_scale
    )
    assert is_found.all()
    torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-8)


def test_what_is_not_found_is_left_to_the_reference():
    u, logits, mean, log_scale = draw_mixture("close", 4, seed=4)
    u[0, 2] = 31.0
    u[1, 0] = math.nan
    mean = mean.clone()
    mean[:, 0] += torch.where(mean[:, 0] > 0, 1e4, -1e4)  # two clusters, with nothing in between
    u[2, 0] = torch.special.ndtri(logits[2].softmax(-1)[mean[:, 0] < 0].sum())
    _, is_found = coupling_active.solve(u, logits, mean, log_scale)
    assert not is_found[:2].any() and is_found[3]

    z = coupling.mixture_rosenblatt_inverse(u, logits, mean, log_scale)
    expected = coupling_torch.mixture_rosenblatt_inverse(u, logits, mean, log_scale)
    torch.testing.assert_close(z[0], expected[0])
    torch.testing.assert_close(z[3], expected[3])


# ------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("last", [-29.9, 29.9])
def test_a_density_that_underflows_is_left_to_the_reference(size, last):
    """Scales of a million put the density at such a root below what weights can be made of."""
    random = generator(0)
    mean = torch.randn(5, size, generator=random, dtype=torch.float64)
    logits = torch.randn(2, 5, generator=random, dtype=torch.float64)
    u = torch.randn(2, size, generator=random, dtype=torch.float64)
    u[0, -1] = last
    parameters = logits, mean, torch.full((5,), 14.0, dtype=torch.float64)
    z = coupling_active.mixture_rosenblatt_inverse(u, *parameters)
    expected = coupling_torch.mixture_rosenblatt_inverse(u, *parameters)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_window_changes_the_tail_by_no_more_than_is_said(name):
    """Steps in place of far components change the tail at the root by less than a share of 2e-11."""
    u, logits, mean, log_scale = draw_mixture(name, 100, torch.float32, seed=5)
    logits, mean, log_scale = (x.double() for x in (logits, mean, log_scale))
    bins = coupling_active.make_bins(mean, log_scale)
    for n in range(100):
        noise = [-abs(u[n, 0].item())]
        sign = torch.tensor([-1.0 if u[n, 0] > 0 else 1.0], dtype=torch.float64)
        row = logits[n : n + 1]
        dimension = coupling_active._FirstDimension(row.exp(), mean, bins, noise, sign)
        active, (root,) = coupling_active._solve_windows(
            dimension, noise, [2.0**-40], bins.min_scale, torch.float64
        )
        assert active.weight.sum().item() == pytest.approx(1)

        t = (root - sign * mean[:, 0]) / log_scale.exp()
        tail = (row[0].softmax(-1) * torch.special.ndtr(t)).sum().item()
        target = coupling_active._cdf(noise[0])
        assert tail == pytest.approx(target, rel=2e-11)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_density_is_within_the_bound(name, monkeypatch):
    """The drawn density is q(z) <= p(z) / (1 - MAX_DROPPED)^(d - 1), tried at a large MAX_DROPPED.

    By induction that follows from the two facts that are checked here: no step drops more than it
    may, and the tail in the next dimension moves by no more than that.
    """
    max_dropped = 0.05
    dropped = []
    largest = coupling_active._largest

    def spy(active, rarest):
        kept = largest(active, rarest)
        dropped.append(1 - kept.weight.sum(-1) / active.weight.sum(-1))
        return kept

    monkeypatch.setattr(coupling_active, "_largest", spy)
    monkeypatch.setattr(coupling_active, "FEW", 0)
    monkeypatch.setitem(coupling_active.MAX_DROPPED, torch.float64, max_dropped)
    u, *parameters = draw_mixture(name, 20, seed=6)
    coupling_active.solve(u, *parameters)
    assert all((x <= max_dropped).all() for x in dropped)

    # The exact noise of these z differs, but by no more than the dropped weight in any tail.
    z, is_found = coupling_active.solve(u, *parameters)
    again, _ = coupling_naive.mixture_rosenblatt(z, *parameters)
    assert is_found.all()
    first = torch.special.ndtr(again[:, :2]) - torch.special.ndtr(u[:, :2])
    assert first.abs().max() <= max_dropped


def test_numbers_are_rounded_as_tensors_are():
    z = torch.randn(200, dtype=torch.float64) * 10.0 ** torch.randint(-6, 6, (200,))
    rounded = [coupling_active._round(x, torch.float32) for x in z.tolist()]
    assert rounded == z.float().tolist()
    assert coupling_active._round(z[0].item(), torch.float64) == z[0].item()
    assert coupling_active._round(0.0, torch.float32) == 0


def test_in_the_tails_less_is_dropped():
    """The share that may be dropped falls with the rarest tail that is still to come."""
    shares = coupling_active._rarest([[-1.0], [-6.0], [-2.0]], 1e-9)
    expected = [[1e-9 * coupling_active._cdf(-6.0)], [1e-9 * coupling_active._cdf(-2.0)], [1e-9]]
    assert shares == expected


# ---------------------------------------------------------------------- large codebooks come here


def test_large_codebooks_come_here_with_the_references_gradients(monkeypatch):
    calls = []
    solve = coupling_active.solve
    monkeypatch.setattr(coupling_active, "solve", lambda *x: calls.append(1) or solve(*x))
    tensors = [x.requires_grad_() for x in draw_mixture("larger", 5, seed=7)]
    z = coupling.mixture_rosenblatt_inverse(*tensors)
    assert calls
    expected = coupling.mixture_rosenblatt_inverse(*tensors, implementation="reference")
    assert len(calls) == 1
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)

    cotangent = torch.randn(z.shape, generator=generator(8), dtype=z.dtype)
    gradients = (torch.autograd.grad(x, tensors, cotangent) for x in (z, expected))
    for actual, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    u, *parameters = draw_mixture("larger", 10, seed=9)
    whole = coupling.mixture_rosenblatt_inverse(u, *parameters)
    monkeypatch.setattr(coupling_active, "CHUNK_ELEMENTS", 3 * 3_000)
    parts = coupling.mixture_rosenblatt_inverse(u, *parameters)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change", ["step", "data", "one number", "two rows", "replaced", "inference"]
)
def test_a_codebook_that_has_changed_is_looked_at_again(change):
    u, logits, mean, log_scale = draw_mixture("larger", 4, torch.float32, seed=10)
    codebook = Codebook(*mean.shape)
    with torch.no_grad():
        codebook.mean.copy_(mean)
        codebook.log_scale.copy_(log_scale)

    coupling.mixture_rosenblatt_inverse(u, logits, *codebook())
    other = draw_mixture("larger", 4, torch.float32, seed=11)[2]
    if change == "step":
        codebook.mean.grad = codebook.mean.detach() - other
        torch.optim.SGD([codebook.mean], lr=1.0).step()
    elif change == "data":
        codebook.mean.data.copy_(other)
    elif change == "one number":
        codebook.mean.data[1, 0] += 2.0
    elif change == "two rows":
        codebook.mean.data[:2] = codebook.mean.data[:2].flip(0)
    elif change == "replaced":
        codebook.mean.data = other.clone()
    else:
        with torch.inference_mode():
            moved = [x.clone() for x in codebook()]
            coupling.mixture_rosenblatt_inverse(u, logits, *moved)
            moved[0].copy_(other)
            z = coupling.mixture_rosenblatt_inverse(u, logits, *moved)
            again, _ = coupling.mixture_rosenblatt(z, logits, *moved)
            torch.testing.assert_close(again, u, rtol=1e-3, atol=1e-3)
        return

    z = coupling.mixture_rosenblatt_inverse(u, logits, *codebook())
    expected = coupling.mixture_rosenblatt_inverse(
        u, logits, *codebook(), implementation="reference"
    )
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_only_the_last_codebooks_are_kept():
    *_, mean, log_scale = draw_mixture("larger", 1, torch.float32, seed=12)
    for _ in range(6):
        codebook_kept.kept(coupling_active.make_bins, mean.clone(), log_scale)
    assert len(codebook_kept._entries) <= codebook_kept.MAX_CODEBOOKS
