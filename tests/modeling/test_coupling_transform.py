"""The Rosenblatt transform with weights as they are: equal to the reference, or left to it."""

import pytest
import torch

from helpers.couplings import CODEBOOKS, draw_mixture, generator, with_gradients
from tarflow_hf.modeling import coupling, coupling_torch, coupling_transform

pytestmark = pytest.mark.usefixtures("one_thread")


def sweep(z, logits, mean, log_scale) -> coupling_transform._Sweep:
    return coupling_transform._sweep(z, logits, coupling_transform._prepare(mean, log_scale), True)


def sizes(at: coupling_transform._Sweep) -> list[int]:
    """The number of components that each dimension looks at."""
    return [dimension.weights.value.shape[1] for dimension in at.dimensions]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_transform_and_gradients_are_the_references(name, kept, monkeypatch):
    """In float64, with the dimensions kept for the backward pass and made again."""
    monkeypatch.setattr(coupling_transform, "KEPT_ELEMENTS", 2**20 if kept else 0)
    monkeypatch.setattr(coupling_transform, "CHUNK_ELEMENTS", 2**14)  # several chunks
    monkeypatch.setattr(coupling_transform, "MIN_ROWS", 8)
    tensors = draw_mixture(name, 40)
    assert sweep(*tensors).is_exact.double().mean() > 0.9

    actual = with_gradients(coupling_transform.mixture_rosenblatt, tensors)
    expected = with_gradients(coupling_torch.mixture_rosenblatt, tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_float32_is_no_worse_than_the_reference(name):
    tensors = draw_mixture(name, 60, torch.float32)
    exact = with_gradients(coupling_torch.mixture_rosenblatt, [x.double() for x in tensors])
    actual = with_gradients(coupling_transform.mixture_rosenblatt, tensors)
    reference = with_gradients(coupling_torch.mixture_rosenblatt, tensors)
    assert sweep(*tensors).is_exact.float().mean() > 0.9

    for a, r, e in zip(actual, reference, exact, strict=True):
        assert (a - e).norm() <= 2 * (r - e).norm() + 5e-7 * e.norm()


def test_a_separated_codebook_is_soon_a_few_components():
    at = sweep(*draw_mixture("separated", 50, torch.float32))
    assert sizes(at)[0] == 600
    assert sizes(at)[3] < 60 and sizes(at)[-1] < 10


def test_an_overlapping_codebook_keeps_all():
    assert sizes(sweep(*draw_mixture("overlapping", 50, torch.float32))) == [600] * 8


def test_rows_that_need_what_was_dropped_are_the_references():
    """Latents whose later dimensions lie far from the components that the first ones leave."""
    z, logits, mean, log_scale = draw_mixture("separated", 40, torch.float32)
    z[::2, 4:] = z[::2, 4:].roll(2, 0)
    at = sweep(z, logits, mean, log_scale)
    assert not at.is_exact[::2].any() and at.is_exact[1::2].all()

    tensors = [z, logits, mean, log_scale]
    actual = with_gradients(coupling_transform.mixture_rosenblatt, tensors)
    expected = with_gradients(coupling_torch.mixture_rosenblatt, tensors)
    assert torch.equal(actual[0][::2], expected[0][::2])
    assert torch.equal(actual[1][::2], expected[1][::2])
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 2e-5 * e.norm()


@pytest.mark.parametrize("shift", [-9.0, 9.0])
def test_tails_are_sums_of_their_own(shift):
    """A latent beyond all components has a tail far below the rounding of the other one."""
    z, logits, mean, log_scale = draw_mixture("overlapping", 40)
    z[:, 0] += shift
    actual, _ = coupling_transform.mixture_rosenblatt(z, logits, mean, log_scale)
    expected, _ = coupling_torch.mixture_rosenblatt(z, logits, mean, log_scale)
    assert expected[:, 0].abs().max() > 5
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e20])
def test_what_is_not_finite_is_left_to_the_reference(bad):
    z, *parameters = draw_mixture("separated", 30, torch.float32)
    z[7, 2] = bad
    actual = coupling_transform.mixture_rosenblatt(z, *parameters)
    expected = coupling_torch.mixture_rosenblatt(z, *parameters)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[7], e[7], rtol=0, atol=0, equal_nan=True)
        assert a[:7].isfinite().all() and a[8:].isfinite().all()


def test_auto_takes_it_from_a_size_on(monkeypatch):
    taken = []
    apply = coupling_transform._MixtureRosenblatt.apply
    monkeypatch.setattr(
        coupling_transform._MixtureRosenblatt,
        "apply",
        lambda *x: taken.append(len(x[0])) or apply(*x),
    )
    random = generator(3)
    for num_rows in (4, 400):
        z = torch.randn(num_rows, 8, generator=random)
        logits = torch.zeros(num_rows, 20)
        coupling.mixture_rosenblatt(
            z, logits, torch.randn(20, 8, generator=random), torch.zeros(20)
        )

    assert taken == [400]


def test_no_rows():
    z, logits, mean, log_scale = draw_mixture("separated", 1, torch.float32)
    u, log_det = coupling.mixture_rosenblatt(z[:0], logits[:0], mean, log_scale)
    assert u.shape == (0, 8) and log_det.shape == (0,)
