"""The inverse of all dimensions at once.

`test_couplings.py` and `test_couplings_exact.py` hold "auto" to everything that they hold the
reference to. Here: that this inverse is the one that answers, and which rows it leaves to the
reference.
"""

import pytest
import torch

from helpers.couplings import CASES, Case, draw
from tarflow_hf.modeling import coupling, coupling_newton, coupling_torch

pytestmark = pytest.mark.usefixtures("one_thread", "without_numba")

MIXTURES = {
    **CASES,
    "cdf, K=65": Case("mixture_cdf", 65),
    "rosenblatt, K=27, d=8": Case("mixture_rosenblatt", 27, 8),
}

MIXTURES = {name: case for name, case in MIXTURES.items() if case.kind != "affine"}


def solve(case: Case, u, logits, loc, log_scale):
    if case.kind == "mixture_cdf":
        z, is_found = coupling_newton.solve(u.unsqueeze(-1), logits, loc.unsqueeze(1), log_scale)
        return z.squeeze(-1), is_found
    return coupling_newton.solve(u, logits, loc.T.unsqueeze(0), log_scale.unsqueeze(0))


@pytest.mark.parametrize("hardness", [0, 0.3, 1])
@pytest.mark.parametrize("name", MIXTURES)
def test_rows_are_found_and_no_worse_than_by_the_reference(name, hardness):
    case = MIXTURES[name]
    u, *parameters = draw(case, (500,), torch.float32, seed=1, hardness=hardness)
    u /= 3
    z, is_found = solve(case, u, *parameters)
    assert hardness == 1 or is_found.float().mean() > 0.99
    reference = getattr(coupling_torch, case.kind + "_inverse")(u, *parameters)

    def error(z):
        transformed, _ = getattr(coupling, case.kind)(z.double(), *(x.double() for x in parameters))
        return (transformed - u).abs() / (1 + u.abs())

    ours, theirs = error(z)[is_found], error(reference)[is_found]
    assert ours.sum() <= theirs.sum()
    assert hardness == 1 or ours.max() <= 1.01 * theirs.max()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_row_alone_and_in_a_batch(name):
    """Rows leave the rounds as they come to rest: the roots agree but for the last place."""
    case = MIXTURES[name]
    u, *parameters = draw(case, (64,), torch.float32, seed=2, hardness=0.3)
    z, is_found = solve(case, u, *parameters)

    for n in range(64):
        shared = 1 if case.kind == "mixture_rosenblatt" else 3
        row = [x[n : n + 1] if i <= shared else x for i, x in enumerate([u, *parameters])]
        alone, is_found_alone = solve(case, *row)
        assert is_found_alone == is_found[n]
        if is_found[n]:
            torch.testing.assert_close(alone[0], z[n], rtol=2e-7, atol=0)


def test_what_is_not_found_is_left_to_the_reference():
    """The reference inverts what the rounds do not find.

    That is noise in the far tail, components thinner than float32 resolves, and values that are no
    numbers.
    """
    log_scale = torch.tensor([[0.0, 0.0], [-10.0, -10.0], [0.0, 0.0], [0.0, 0.0]])
    loc = torch.tensor([[-1.0, 1.0], [9900.0, 10000.0], [-1.0, 1.0], [-1.0, torch.nan]])
    u = torch.tensor([31.0, 1.0, 1.0, 1.0])
    logits = torch.zeros(4, 2)
    _, is_found = coupling_newton.solve(u.unsqueeze(-1), logits, loc.unsqueeze(1), log_scale)
    assert is_found.tolist() == [False, False, True, False]
    z = coupling.mixture_cdf_inverse(u, logits, loc, log_scale)
    expected = coupling.mixture_cdf_inverse(u, logits, loc, log_scale, implementation="reference")
    assert torch.equal(z[:2], expected[:2])
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_parts_change_nothing(monkeypatch):
    u, *parameters = draw(MIXTURES["rosenblatt, K=27, d=8"], (30,), torch.float32, seed=3)
    whole = coupling.mixture_rosenblatt_inverse(u, *parameters)
    monkeypatch.setattr(coupling_newton, "CHUNK_ELEMENTS", 7 * 27 * 8)
    torch.testing.assert_close(
        coupling.mixture_rosenblatt_inverse(u, *parameters), whole, rtol=1e-6, atol=1e-6
    )


def test_few_rounds(monkeypatch):
    """All dimensions rest after a few rounds.

    Each round is a fixed number of calls, so the rounds are the cost of a position.
    """
    num_rounds, ndtri = [], torch.special.ndtri
    monkeypatch.setattr(torch.special, "ndtri", lambda x: num_rounds.append(1) or ndtri(x))
    u, *parameters = draw(MIXTURES["rosenblatt, K=27, d=8"], (50,), torch.float32, seed=4)
    for n in range(50):
        coupling.mixture_rosenblatt_inverse(u[n : n + 1], parameters[0][n : n + 1], *parameters[1:])

    assert sum(num_rounds) / 50 <= 9


@pytest.mark.parametrize("name", MIXTURES)
def test_no_rows(name):
    case = MIXTURES[name]
    u, *parameters = draw(case, (0,), torch.float32, seed=0)
    assert getattr(coupling, case.kind + "_inverse")(u, *parameters).shape == u.shape
