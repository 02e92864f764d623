"""The Triton kernels against the reference: they may err as much against float64 as the reference does, plus a little.

On a GPU if there is one, else in Triton's interpreter (see conftest.py).
"""

import pytest
import torch

from tarflow_hf.modeling import coupling, coupling_triton

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
OPS = ["mixture_cdf", "mixture_cdf_inverse", "mixture_cdf_log_prob"]


def draw(num_rows, num_components, seed=0, spread=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(num_rows, generator=generator)
    shape = (num_rows, num_components)
    logits, loc = (spread * torch.randn(shape, generator=generator) for _ in range(2))
    log_scale = 0.3 * spread * torch.randn(shape, generator=generator)
    return [x.to(DEVICE, dtype) for x in (z, logits, loc, log_scale)]


def run(op, tensors, implementation, wanted=(0, 1, 2, 3)):
    """Outputs, and the gradients of a fixed random functional of them to the wanted arguments."""
    leaves = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    out = getattr(coupling, op)(*leaves, implementation=implementation)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in out]
    gradients = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], cotangents)
    return [x.detach() for x in out], list(gradients)


def error(actual, expected):
    return ((actual.double() - expected).abs() / (1 + expected.abs())).max().item() if expected.numel() else 0.0


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel forgets to write is NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(
        coupling_triton.torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(torch.nan)
    )


@pytest.mark.parametrize(
    "num_rows, num_components", [(1, 1), (1, 256), (127, 1), (127, 3), (127, 65), (1025, 1), (1025, 5)]
)
@pytest.mark.parametrize("op", OPS)
def test_as_exact_as_the_reference(op, num_rows, num_components):
    tensors = draw(num_rows, num_components, seed=num_rows + num_components)
    exact = run(op, [x.double() for x in tensors], "reference")
    # In log_det's gradient terms as large as u^2 cancel: as many last places are lost, in either implementation.
    size = 1 + max(x.square().max() for x in (*exact[0], tensors[0])).item() if op == "mixture_cdf" else 1
    for expected, reference, actual in zip(
        exact, run(op, tensors, "reference"), run(op, tensors, "triton"), strict=True
    ):
        for e, r, a in zip(expected, reference, actual, strict=True):
            assert a.shape == e.shape and a.isfinite().all()
            assert error(a, e) <= 3 * error(r, e) + 16 * EPS * size


def test_normal_functions_within_four_units_in_the_last_place():
    """One component of mean 0 and scale 1 is the identity; its tails are those of the normal, on [-30, 30]."""
    z = torch.linspace(-30, 30, 4001, device=DEVICE)
    zero = torch.zeros(4001, 1, device=DEVICE)
    u, log_det = coupling.mixture_cdf(z, zero, zero, zero, implementation="triton")
    torch.testing.assert_close(u, z, rtol=4 * EPS, atol=4 * EPS)
    assert log_det.abs().max() <= 4 * EPS


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 3), (0, 2)])
@pytest.mark.parametrize("op", OPS)
def test_partial_gradients(op, wanted):
    tensors = draw(9, 3)
    _, whole = run(op, tensors, "triton")
    _, some = run(op, tensors, "triton", wanted)
    assert all(torch.equal(gradient, whole[i]) for i, gradient in zip(wanted, some, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_half_precision_is_read_and_nothing_else(op, dtype):
    tensors = draw(33, 5, dtype=dtype)
    outputs, gradients = run(op, tensors, "triton")
    expected, expected_gradients = run(op, [x.float() for x in tensors], "triton")
    for a, e in zip(outputs, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e)
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, e.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("op", OPS)
def test_extremes_are_finite(op):
    generator = torch.Generator().manual_seed(0)

    def wide(*shape):
        return (torch.rand(shape, generator=generator) * 2 - 1) * 10 ** (torch.rand(shape, generator=generator) * 8 - 4)

    n, k = 512, 3
    first = wide(n) if op != "mixture_cdf_inverse" else 30 * (torch.rand(n, generator=generator) * 2 - 1)
    log_scale = 20 * torch.rand(n, k, generator=generator) - 10
    outputs, gradients = run(op, [x.to(DEVICE) for x in (first, wide(n, k), wide(n, k), log_scale)], "triton")
    for x in outputs + gradients:
        assert x.isfinite().all()


def test_non_contiguous_broadcast_and_empty():
    z, logits, loc, log_scale = draw(12, 4)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (z, logits, loc, log_scale)]
    expected = coupling.mixture_cdf(z, logits, loc, log_scale, implementation="triton")
    for a, e in zip(coupling.mixture_cdf(*strided, implementation="triton"), expected, strict=True):
        assert torch.equal(a, e)
    shared = coupling.mixture_cdf(z.reshape(3, 4), logits[0], loc[0], log_scale[0], implementation="triton")[0]
    torch.testing.assert_close(shared, coupling.mixture_cdf(z.reshape(3, 4), logits[0], loc[0], log_scale[0])[0])
    empty = coupling.mixture_cdf(z[:0], logits[:0], loc[:0], log_scale[:0], implementation="triton")
    assert empty[0].shape == (0,)


def test_where_the_kernels_cannot_run(monkeypatch):
    tensors = draw(2, 3)
    with pytest.raises(ValueError, match="float64"):
        coupling.mixture_cdf(*(x.double() for x in tensors), implementation="triton")
    with pytest.raises(ValueError, match="at most 256 components, not 257"):
        coupling.mixture_cdf(*draw(2, 257), implementation="triton")
    with pytest.raises(ValueError, match="not available here"):
        coupling.affine(tensors[0], tensors[0], tensors[0], implementation="triton")
    monkeypatch.setattr(coupling_triton, "triton", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        coupling.mixture_cdf(*tensors, implementation="triton")
